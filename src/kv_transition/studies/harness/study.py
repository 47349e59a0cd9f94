"""Tasks of lm-evaluation-harness under every policy, budget and mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash
from kv_transition.specs.model import content, model
from kv_transition.specs.policies import FULL, budgeted, check_known, needs_answers, needs_the_model
from kv_transition.studies.study import Study, Work

if TYPE_CHECKING:
    from kv_transition.settings import Settings

FULL_MODE = "after_prompt"
"""mode of the full cache, which is run only once because its answers are the same in each mode"""


def _policies(settings: Settings) -> list[str]:
    chosen = settings.harness.policies
    return [name for name in settings.kv.policies if chosen is None or name in chosen or name == FULL]


def cells(settings: Settings) -> list[tuple[str, str, str]]:
    """Return every (mode, policy, budget) that the tasks are run with; none without the section ``harness``."""
    section = settings.harness
    if section is None:
        return []
    names = section.budgets
    pairs = [
        (policy, budget)
        for policy, budget in budgeted(settings, _policies(settings))
        if names is None or budget in names or budget == "r1"
    ]
    modes = section.modes or settings.kv.modes
    return [
        (mode, policy, budget)
        for policy, budget in pairs
        for mode in ([FULL_MODE] if policy == FULL else modes)
    ]  # fmt: skip


def spec(settings: Settings, mode: str, policy: str, budget: str) -> dict[str, Any]:
    """Return the spec of a job; its digest is the ``harness_hash`` of the rows."""
    kind, hyper_parameters = catalog.resolve(policy, settings.kv.policies[policy])
    section = settings.harness
    own = ("name", "revision", "dtype", "device", "device_map", "quantization", "fingerprint")
    known = model(settings)
    return {
        **section.model_dump(exclude={"policies", "budgets", "modes"}),
        "tasks_content": content(section.include_path) if section.include_path else None,
        "mode": mode,
        "policy": policy,
        "kind": kind,
        "hyper_parameters": hyper_parameters,
        "budget": budget,
        "seed": settings.decoding.seed,
        "resamples": settings.statistics.resamples,
        "model": {key: known[key] for key in own},
        "code": code_hash("kv_transition.studies.harness.run", *catalog.modules(kind)),
        "policy_content": catalog.content(kind),
    }


def check(settings: Settings) -> None:
    """Raise UserError if the keys of ``harness`` contradict others or name something that does not exist."""
    section = settings.harness
    if section is None:
        return
    needs_the_model(settings, "harness")
    check_known("harness.policies", section.policies, list(settings.kv.policies))
    check_known("harness.budgets", section.budgets, [str(budget) for budget in settings.kv.all_budgets()])
    if section.include_path and not Path(section.include_path).is_dir():
        raise UserError(
            f"harness.include_path: there is no folder {section.include_path}; give one with task files (.yaml), "
            "or remove this key for the harness's own tasks"
        )
    for name in _policies(settings):
        kind, _ = catalog.resolve(name, settings.kv.policies[name])
        where = f"list the policies to run in harness.policies, without {name}"
        if catalog.is_press(kind):
            raise UserError(f"kv.policies.{name}: a press cannot run the harness's tasks; {where}")
        if needs_answers(settings, name):
            raise UserError(
                f"kv.policies.{name}: its moments are derived from the answers to a task of this project; {where}"
            )


def work(settings: Settings, answer_tokens: Mapping[str, float]) -> Work:
    """Return a remark for the plan: the jobs' size is unknown, because the harness reads its tasks only in the job."""
    n = len(cells(settings))
    return Work(notes=(f"harness: the time of its {n} jobs is not estimated",)) if n else Work()


STUDY = Study(
    name="harness",
    there=lambda settings: settings.harness is not None,
    lacking="the experiment runs no task of lm-evaluation-harness; add the section harness, such as "
    "harness: {tasks: [gsm8k]}",
    rules={"run": ("harness",), "harness": ("harness_table", "harness_plots")},
    command="harness",
    help="Run tasks of lm-evaluation-harness on compressed caches.",
    check=check,
    work=work,
)
