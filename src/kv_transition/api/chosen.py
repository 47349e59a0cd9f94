"""Conversion and checks of a policy and a budget that a caller gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from kv_transition.budget import Budget
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.policies.base import Policy
from kv_transition.run.decode import Setting

PolicyLike = str | Mapping[str, Any] | Policy | type[Policy]
"""a kind, a file, {"kind": ..., hyper-parameters}, a `Policy` object, or its class"""

BudgetLike = float | str | Mapping[str, int] | Budget
"""a fraction of the entries, ``r0.2`` or ``t128`` as in results, or {"tokens": 128}"""


def setting_of(policy: PolicyLike, budget: BudgetLike | None, mode: str, temperature: float = 0.0) -> Setting:
    """Return the setting of the compression. Raises UserError if the policy needs a budget, or for a budget of another
    form.
    """
    if mode not in ("before_question", "after_prompt"):
        raise UserError(f"mode: {mode!r} is neither before_question nor after_prompt")
    own = policy_of(policy)
    own.watch(0)  # raises if the keys that determine its recalls are missing
    return Setting(own, budget_of(budget, own), mode, temperature=temperature)


def policy_of(policy: PolicyLike) -> Policy:
    """Return the policy object. Raises UserError if the argument is not a policy."""
    if isinstance(policy, Policy):
        return policy
    if inspect.isclass(policy) and issubclass(policy, Policy):
        return policy()
    options = {"kind": policy} if isinstance(policy, str) else policy
    if not isinstance(options, Mapping) or not isinstance(options.get("kind"), str):
        raise UserError(
            f"policy: {policy!r} is not a policy; give a Policy, its class, or one of {', '.join(catalog.kinds())}"
        )
    if catalog.is_press(options["kind"]):
        raise UserError(f"policy: {options['kind']} prefills the prompt itself; run presses in the workflow")
    try:
        return catalog.create(*catalog.resolve(options["kind"], options))
    except UserError as error:
        raise UserError(str(error).removeprefix(f"kv.policies.{options['kind']}").lstrip(".: ")) from None


def budget_of(budget: BudgetLike | None, policy: Policy) -> Budget:
    """Return the budget. Raises UserError if it is missing, or if the policy itself determines it."""
    name = name_of(policy)
    if not needs_budget(policy):
        if budget is not None and not _parsed(budget).is_full:
            raise UserError(f"budget: the hyper-parameters of {name} determine what it keeps; give no budget")
        return Budget.of_fraction(1)
    if budget is None:
        raise UserError(f'budget: {name} needs a budget: a fraction such as budget=0.2, or budget={{"tokens": 128}}')
    return _parsed(budget)


def name_of(policy: Policy) -> str:
    """Return the kind of a policy, or the name of its class if it is not from this package."""
    package, _, kind = type(policy).__module__.rpartition(".")
    return kind if package == catalog.GROUP else type(policy).__name__


def needs_budget(policy: Policy) -> bool:
    """Return whether a policy needs a budget."""
    declared = policy.ignores_budget
    own = declared if isinstance(declared, bool) else getattr(policy, declared[0]) == declared[1]
    return not own and name_of(policy) != "full"


def _parsed(budget: BudgetLike) -> Budget:
    match budget:
        case Budget():
            return budget
        case str():
            return Budget.parse(budget)
        case {"tokens": tokens, **rest} if not rest:
            return Budget.of_tokens(tokens)
        case bool() | int() if budget != 1:
            raise UserError(f'budget: {budget} is not in (0, 1]; a number of tokens is {{"tokens": {budget}}}')
    return Budget.of_fraction(budget)
