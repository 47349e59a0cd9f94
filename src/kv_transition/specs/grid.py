"""What an experiment runs: its policies with their budgets, as cells, observations, perplexities, conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.settings import Settings

FULL = "full"
FULL_BUDGET = "r1"
RECALL = "entropy_recall"
TEXT_DROP = "text_drop"
ORACLE = "oracle"
_UNOBSERVED = {
    FULL: "keeps everything",
    "entropy_merge": "holds entries that stand for several",
    "entropy_recall": "chooses by the step's own query",
}


def resolve(settings: Settings, policy: str) -> tuple[str, dict[str, Any]]:
    """Kind and hyper-parameters of a policy; those of a kind that only its endpoint knows as they are given."""
    options = settings.kv.policies[policy]
    if _endpoints_own(settings, policy):
        return options.get("kind", policy), {key: value for key, value in options.items() if key != "kind"}
    return catalog.resolve(policy, options)


def _endpoints_own(settings: Settings, policy: str) -> bool:
    """Whether a policy is one of the endpoint's, which this project knows by name only."""
    declared = settings.engine.kind == "openai" and not settings.engine.serves
    kind = settings.kv.policies[policy].get("kind", policy)
    return declared and isinstance(kind, str) and kind not in catalog.kinds()


def endpoint(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """``base_url``, ``model`` and ``extra_body`` of what stands for a (policy, budget).

    Raises UserError if nothing does: the full cache, and a server that takes the policy with the request, stand at the
    engine's own address; every other needs an entry.
    """
    engine = settings.engine
    key = next((key for key in (f"{policy}@{budget}", policy) if key in engine.endpoints), None)
    if key is None and policy != FULL and not engine.serves:
        raise UserError(
            f"engine.endpoints: nothing stands for {policy} at {budget}; add '{policy}@{budget}', or '{policy}' where "
            "it has one budget, with the base_url, the model or the extra_body of what serves it"
        )
    own = engine.endpoints[key] if key else None
    return {
        "base_url": (own and own.base_url) or engine.base_url,
        "model": (own and own.model) or engine.model or settings.model.name,
        "extra_body": engine.extra_body | (own.extra_body if own else {}),
    }


def recall_of(settings: Settings, policy: str | None) -> dict[str, Any] | None:
    """The hyper-parameters of an entropy_recall; None of any other policy."""
    if policy not in settings.kv.policies:
        return None
    kind, hyper_parameters = resolve(settings, policy)
    return hyper_parameters if kind == RECALL else None


def calibrated(settings: Settings, policy: str) -> bool:
    """Whether a policy's cells take the calibration of their task."""
    own = recall_of(settings, policy)
    return own is not None and own["tau_quantile"] is not None


def treated(settings: Settings, policy: str) -> str | None:
    """The policy whose cell a control's cell takes, in the same task, mode, budget and bin; None for all others."""
    own = recall_of(settings, policy)
    return None if own is None else own["like"]


def cells(settings: Settings) -> list[tuple[str, str, str]]:
    """Every (mode, policy, budget) that is run.

    The full cache, and policies whose footprint is their own, are run once a mode, as budget r1.
    """
    grid = []
    for mode in settings.kv.modes:
        grid.append((mode, FULL, FULL_BUDGET))
        for policy in settings.kv.policies:
            if _once(settings, policy):
                grid.append((mode, policy, FULL_BUDGET))
            elif policy != FULL:
                grid.extend((mode, policy, str(b)) for b in settings.kv.all_budgets() if not b.is_full)
    return grid


def _once(settings: Settings, policy: str) -> bool:
    if policy == FULL or _endpoints_own(settings, policy):
        return False
    return catalog.ignores_budget(*catalog.resolve(policy, settings.kv.policies[policy]))


def aliases(settings: Settings) -> list[tuple[str, str]]:
    """(policy, budget) pairs that keep everything: the full cache's rows stand for them."""
    full_asked = any(budget.is_full for budget in settings.kv.all_budgets())
    policies = [policy for policy in settings.kv.policies if policy != FULL and not _once(settings, policy)]
    return [(policy, FULL_BUDGET) for policy in policies] if full_asked else []


def statistics(settings: Settings) -> list[str]:
    """The attention statistics that some cell of the experiment reads, sorted."""
    if settings.engine.kind == "openai":
        return []
    kinds = [catalog.resolve(name, options)[0] for name, options in settings.kv.policies.items()]
    # an observation follows the attention received whatever the policies read
    observed = ["attn_sum"] if settings.observe.enabled else []
    return sorted(frozenset(observed).union(*(catalog.statistics(kind) for kind in kinds)))


def why_not_observed(kind: str, hyper_parameters: Mapping[str, Any]) -> str | None:
    """Why what a policy holds cannot be compared with what a step needs; None if it can."""
    if catalog.is_press(kind):
        return "reads the prompt itself"
    if catalog.ignores_budget(kind, hyper_parameters):
        return "has a footprint of its own"
    return _UNOBSERVED.get(kind)


def observed(settings: Settings) -> dict[str, dict[str, Any]]:
    """Kind and hyper-parameters of each policy that is observed, by its name.

    Raises UserError if one is asked for that is not there or cannot be observed.
    """
    if ORACLE in settings.kv.policies:
        raise UserError("kv.policies.oracle: this name is that of observation's upper bound; choose another one")
    there = {name: catalog.resolve(name, options) for name, options in settings.kv.policies.items()}
    why = {name: reason for name, resolved in there.items() if (reason := why_not_observed(*resolved))}
    there[ORACLE] = ORACLE, {}
    fitting = [name for name in there if name not in why]
    for name in settings.observe.policies or []:
        if name in why:
            raise UserError(f"observe.policies: {name} {why[name]}, so that it has no recall; leave it out")
        if name not in there:
            raise UserError(f"observe.policies: there is no {name!r}; choose from {', '.join(fitting)}")
    names = settings.observe.policies or fitting
    return {name: {"kind": there[name][0], "hyper_parameters": there[name][1]} for name in names}


def scored(settings: Settings) -> list[str]:
    """Names of the policies that texts are scored under."""
    chosen = settings.perplexity.policies
    return [name for name in settings.kv.policies if chosen is None or name in chosen or name == FULL]


def perplexity_cells(settings: Settings) -> list[tuple[str, str]]:
    """Every (policy, budget) that texts are scored under, by the same rules as `cells`; none without the section."""
    grid = []
    for policy in scored(settings) if settings.perplexity else []:
        if policy == FULL or _once(settings, policy):
            grid.append((policy, FULL_BUDGET))
        else:
            grid.extend((policy, str(b)) for b in settings.kv.all_budgets() if not b.is_full)
    return grid


def chat_cells(settings: Settings) -> list[tuple[str, str]]:
    """Every (policy, budget) that conversations are played under.

    The full cache, and policies whose footprint is their own, once, as budget r1; all others and the controls at each
    budget below 1.
    """
    if settings.chat is None:
        return []
    budgets = [str(budget) for budget in settings.kv.all_budgets() if not budget.is_full]
    once = [policy for policy in settings.kv.policies if policy == FULL or _once(settings, policy)]
    others = [policy for policy in settings.kv.policies if policy not in once] + settings.chat.controls
    return [(policy, FULL_BUDGET) for policy in once] + [(policy, b) for policy in others for b in budgets]
