"""The specs of the perplexity jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.budget import Budget
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash
from kv_transition.specs.model import content, prefill, tokenizer_content
from kv_transition.specs.policies import FULL, RECALL, budgeted, check_known, needs_answers, needs_the_model
from kv_transition.studies.perplexity.corpus import hub_repository

if TYPE_CHECKING:
    from kv_transition.settings import Settings


def scored(settings: Settings) -> list[str]:
    """Return the names of the policies under which texts are scored."""
    chosen = settings.perplexity.policies
    return [name for name in settings.kv.policies if chosen is None or name in chosen or name == FULL]


def cells(settings: Settings) -> list[tuple[str, str]]:
    """Return every (policy, budget) under which texts are scored; none without the section ``perplexity``."""
    return budgeted(settings, scored(settings)) if settings.perplexity else []


def windows(settings: Settings) -> dict[str, Any]:
    """Return the spec of the windows of a corpus."""
    section = settings.perplexity.model_dump(exclude={"policies", "streaming", "streaming_chunk"})
    path = section["path"]
    named = settings.model.model_dump(include={"name", "revision"})
    return {
        "perplexity": section,
        "content": content(path) if path and Path(path).exists() else None,
        "model": named | {"tokenizer": tokenizer_content(named["name"])},
        "code": code_hash("kv_transition.studies.perplexity.windows"),
    }


def cell(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """Return the spec of a (policy, budget) for every length bin.

    Its digest is the ``perplexity_hash`` of the rows.
    """
    kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
    if kind == "streaming_llm" and "positions" not in settings.kv.policies[policy]:
        # as in the paper, and the only way for texts that are longer than the model's maximum length
        hyper_parameters |= {"positions": "cache"}
    reading = prefill(settings)
    return {
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": str(Budget.parse(budget)),
        "match": settings.kv.match,
        **settings.perplexity.model_dump(include={"streaming", "streaming_chunk", "seed"}),
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.perplexity.run", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def check(settings: Settings) -> None:
    """Raise UserError if the keys of ``perplexity`` contradict others or name something that does not exist."""
    section = settings.perplexity
    if section is None:
        return
    needs_the_model(settings, "perplexity")
    check_known("perplexity.policies", section.policies, list(settings.kv.policies))
    if section.streaming and settings.kv.match != "none":
        raise UserError(
            "kv.match: perplexity.streaming evicts while the text is read, so all policies hold K; use none"
        )
    for name in scored(settings):
        kind, _ = catalog.resolve(name, settings.kv.policies[name])
        where = f"list the policies to score in perplexity.policies, without {name}"
        if catalog.is_press(kind):
            raise UserError(f"kv.policies.{name}: a press compresses only during its own prefill of a prompt; {where}")
        if needs_answers(settings, name):
            raise UserError(f"kv.policies.{name}: its moments depend on the answers to a task; {where}")
        if section.streaming and name != FULL and (kind == RECALL or not catalog.acts_each_step(kind)):
            raise UserError(
                f"kv.policies.{name}: {kind} cannot evict while a text is read, as perplexity.streaming needs; {where}"
            )
    hub_repository(section.model_dump())  # raises if the corpus is neither local nor a pinned repository
