"""The spec of the observation job, and the choice of the observed policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import code_hash
from kv_transition.specs.model import prefill
from kv_transition.specs.policies import FULL, needs_the_model

if TYPE_CHECKING:
    from kv_transition.settings import Settings

ORACLE = "oracle"
_UNOBSERVED = {
    FULL: "keeps everything",
    "entropy_merge": "holds merged entries",
    "entropy_recall": "selects by the query of the step itself",
}


def why_not_observed(kind: str, hyper_parameters: Mapping[str, Any]) -> str | None:
    """Return the reason why a policy cannot be observed; None if it can."""
    if catalog.is_press(kind):
        return "reads the prompt itself"
    if catalog.ignores_budget(kind, hyper_parameters):
        return "has a footprint of its own"
    return _UNOBSERVED.get(kind)


def observed(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return kind and hyper-parameters of each policy that is observed, by its name.

    Raises UserError if a requested policy does not exist or cannot be observed.
    """
    if ORACLE in settings.kv.policies:
        raise UserError(
            "kv.policies.oracle: this name is reserved for the upper bound of observations; choose another one"
        )
    there = {name: catalog.resolve(name, options) for name, options in settings.kv.policies.items()}
    why = {name: reason for name, resolved in there.items() if (reason := why_not_observed(*resolved))}
    there[ORACLE] = ORACLE, {}
    fitting = [name for name in there if name not in why]
    for name in settings.observe.policies or []:
        if name in why:
            raise UserError(f"observe.policies: {name} {why[name]}, so it has no recall; leave it out")
        if name not in there:
            raise UserError(f"observe.policies: there is no {name!r}; choose from {', '.join(fitting)}")
    names = settings.observe.policies or fitting
    return {name: {"kind": there[name][0], "hyper_parameters": there[name][1]} for name in names}


def observe(settings: Settings) -> dict[str, Any]:
    """Return the spec of every observation; its digest is the ``observe_hash`` of the files."""
    reading = prefill(settings)
    policies = observed(settings)
    kinds = [options["kind"] for options in policies.values() if options["kind"] != ORACLE]
    section = settings.observe.model_dump(exclude={"enabled", "policies", "budgets"})
    return section | {
        "policies": policies,
        "budgets": [str(budget) for budget in settings.observe.all_budgets()],
        "seed": settings.decoding.seed,
        "model": reading["model"],
        "prefill_code": reading["code"],
        "code": code_hash("kv_transition.studies.recall.run", *(m for kind in kinds for m in catalog.modules(kind))),
        "policy_content": {kind: catalog.content(kind) for kind in kinds},
    }


def check(settings: Settings) -> None:
    """Raise UserError if there is nothing to observe, or if a requested policy cannot be observed."""
    if not settings.observe.enabled:
        return
    if not settings.dataset:
        raise UserError("observe.enabled: true needs a dataset; add one, or set it to false")
    needs_the_model(settings, "observe.enabled")
    observed(settings)


def statistics(settings: Settings) -> frozenset[str]:
    """Return the statistics that every observation needs: the received attention."""
    return frozenset({"attn_sum"} if settings.observe.enabled else ())
