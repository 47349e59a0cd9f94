"""The specs of the chat jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.budget import Budget
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash
from kv_transition.specs.model import content, model
from kv_transition.specs.policies import FULL, FULL_BUDGET, needs_answers, needs_the_model, once

if TYPE_CHECKING:
    from kv_transition.settings import Settings

RUBRIC = Path(__file__).with_name("rubric.txt")


def cells(settings: Settings) -> list[tuple[str, str]]:
    """Return every (policy, budget) under which conversations are played.

    The full cache, and policies with their own footprint, run once, as budget r1. All others and the controls run at
    each budget below 1.
    """
    if settings.chat is None:
        return []
    budgets = [str(budget) for budget in settings.kv.all_budgets() if not budget.is_full]
    alone = [policy for policy in settings.kv.policies if policy == FULL or once(settings, policy)]
    others = [policy for policy in settings.kv.policies if policy not in alone] + settings.chat.controls
    return [(policy, FULL_BUDGET) for policy in alone] + [(policy, b) for policy in others for b in budgets]


def conversations(settings: Settings) -> dict[str, Any]:
    """Return the spec of the job that writes conversations in one form."""
    section = settings.chat
    modules = ["kv_transition.studies.chat.multiturn"]
    if section.source == "generated":
        modules.append("kv_transition.studies.chat.conversations")
    return {
        "chat": section.model_dump(include={"source", "path", "n", "seed", "max_turns"}) | {"name": section.set},
        "content": content(section.path) if section.path else None,
        "code": code_hash(*modules),
    }


def cell(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """Return the spec of a (policy, budget); its digest is the ``chat_hash`` of the rows."""
    if policy in settings.chat.controls:
        kind, hyper_parameters, modules, policy_content = policy, {}, [f"kv_transition.studies.chat.{policy}"], None
    else:
        kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
        modules, policy_content = catalog.modules(kind), catalog.content(kind)
    return {
        "chat_set": settings.chat.set,
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        "max_tokens": settings.chat.max_tokens,
        "max_length": settings.model.max_length,
        "chat_template": settings.model.chat_template,
        # without hold, all policies act at the end of a turn and their footprints are equal
        "hold": settings.chat.hold and settings.kv.match == "none",
        "answer_nll": settings.chat.answer_nll,
        "seed": settings.decoding.seed,
        "model": model(settings),
        "code": code_hash("kv_transition.studies.chat.run", *modules),
        "policy_content": policy_content,
    }


def judge(settings: Settings) -> dict[str, Any]:
    """Return the spec of the judge's job, whose input are the answers."""
    return {
        "judge": settings.chat.judge.model_dump(),
        "rubric": content(str(RUBRIC)),
        "code": code_hash("kv_transition.studies.chat.judge"),
    }


def check(settings: Settings) -> None:
    """Raise UserError if the keys of ``chat`` contradict others or name something that does not exist."""
    if settings.chat is None:
        return
    needs_the_model(settings, "chat")
    path = settings.chat.path
    if path is not None and not Path(path).is_file():
        raise UserError(f"chat.path: there is no file {path}; give the file of conversations")
    for name, options in settings.kv.policies.items():
        kind, _ = catalog.resolve(name, options)
        if catalog.is_press(kind):
            raise UserError(
                f"kv.policies.{name}: {kind} compresses only during a prefill, so it cannot play a conversation"
            )
        if needs_answers(settings, name):
            raise UserError(f"kv.policies.{name}: it cannot be calibrated on conversations; give tau, in nats")
        if name in settings.chat.controls:
            raise UserError(f"kv.policies.{name}: this name is used by a control in chat.controls; choose another one")
