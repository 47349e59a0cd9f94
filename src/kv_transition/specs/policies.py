"""The policies of an experiment: kind, hyper-parameters, budgets and endpoints of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kv_transition.errors import UserError
from kv_transition.policies import catalog

if TYPE_CHECKING:
    from kv_transition.settings import Settings

FULL = "full"
FULL_BUDGET = "r1"
RECALL = "entropy_recall"


def resolve(settings: Settings, policy: str) -> tuple[str, dict[str, Any]]:
    """Return kind and hyper-parameters of a policy; if only the endpoint knows the kind, they are returned as given."""
    options = settings.kv.policies[policy]
    if endpoints_own(settings, policy):
        return options.get("kind", policy), {key: value for key, value in options.items() if key != "kind"}
    return catalog.resolve(policy, options)


def endpoints_own(settings: Settings, policy: str) -> bool:
    """Return whether only the endpoint implements a policy, and this project knows nothing of it but its name."""
    declared = settings.engine.kind == "openai" and not settings.engine.serves
    kind = settings.kv.policies[policy].get("kind", policy)
    return declared and isinstance(kind, str) and kind not in catalog.kinds()


def endpoint(settings: Settings, policy: str, budget: str) -> dict[str, Any]:
    """Return ``base_url``, ``model`` and ``extra_body`` of the endpoint for a (policy, budget).

    The full cache uses the engine's own address, as does every policy if the server accepts policies in requests; every
    other pair needs an entry. Raises UserError if it has none.
    """
    engine = settings.engine
    key = next((key for key in (f"{policy}@{budget}", policy) if key in engine.endpoints), None)
    if key is None and policy != FULL and not engine.serves:
        raise UserError(
            f"engine.endpoints: no server is given for {policy} at {budget}; add '{policy}@{budget}', or '{policy}' if "
            "it has one budget, with the base_url, model or extra_body of its server"
        )
    own = engine.endpoints[key] if key else None
    return {
        "base_url": (own and own.base_url) or engine.base_url,
        "model": (own and own.model) or engine.model or settings.model.name,
        "extra_body": engine.extra_body | (own.extra_body if own else {}),
    }


def recall_of(settings: Settings, policy: str | None) -> dict[str, Any] | None:
    """Return the hyper-parameters of an entropy_recall; None for any other policy."""
    if policy not in settings.kv.policies:
        return None
    kind, hyper_parameters = resolve(settings, policy)
    return hyper_parameters if kind == RECALL else None


def needs_answers(settings: Settings, policy: str) -> bool:
    """Return whether a policy is an entropy_recall whose moments follow from the answers to a task."""
    own = recall_of(settings, policy)
    return own is not None and (own["tau_quantile"] is not None or own["like"] is not None)


def check_known(key: str, given: list[str] | None, known: list[str]) -> None:
    """Raise UserError if the names ``given`` for a key are not all ``known``."""
    if unknown := [name for name in given or [] if name not in known]:
        raise UserError(f"{key}: there is no {unknown[0]!r}; choose from {', '.join(known)}")


def once(settings: Settings, policy: str) -> bool:
    """Return whether a policy runs only once instead of at each budget, because its hyper-parameters determine the
    footprint.
    """
    if policy == FULL or endpoints_own(settings, policy):
        return False
    return catalog.ignores_budget(*catalog.resolve(policy, settings.kv.policies[policy]))


def budgeted(settings: Settings, policies: list[str]) -> list[tuple[str, str]]:
    """Return each (policy, budget) that is run.

    The full cache, and policies whose hyper-parameters determine the footprint, run once, at budget r1; all others run
    at each budget below 1.
    """
    grid = []
    for policy in policies:
        if policy == FULL or once(settings, policy):
            grid.append((policy, FULL_BUDGET))
        else:
            grid.extend((policy, str(b)) for b in settings.kv.all_budgets() if not b.is_full)
    return grid


def needs_the_model(settings: Settings, key: str) -> None:
    """Raise UserError if answers come from an endpoint, for a study that reads the model's own cache."""
    if settings.engine.kind == "openai":
        raise UserError(f"{key}: this needs the model itself; set engine.kind to local, or remove this key")
