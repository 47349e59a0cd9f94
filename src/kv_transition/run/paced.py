"""Compression while a model reasons: any policy is applied again and again as the answer grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kv_transition.budget import Budget
from kv_transition.cache.batch import row, stack
from kv_transition.cache.state import CacheState
from kv_transition.policies.base import Policy
from kv_transition.run.decode import Setting

SAMPLES = 64
"""largest number of points of the entries over time in a row"""


@dataclass(frozen=True)
class Paced(Policy):
    """A policy that compresses again whenever the answer has added ``every`` entries beyond its budget.

    It does so whether the inner policy acts at each step or not. inner: the policy. budget: a fraction of all tokens
    read so far, prompt and answer; None: the budget stays that of the prompt. cap: upper limit of the budget in
    entries; None: no limit.
    """

    acts_each_step = True

    inner: Policy = field(default_factory=Policy)
    every: int = 1
    budget: Budget | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", self.inner.statistics)
        object.__setattr__(self, "ignores_budget", self.inner.ignores_budget)
        object.__setattr__(self, "draws", self.inner.draws)
        # a policy that compresses once is applied to single sequences, and growing budgets differ within a batch
        alone = self.inner.one_at_a_time or not self.inner.acts_each_step or self.budget is not None
        object.__setattr__(self, "one_at_a_time", alone)

    def protected(self, k: int) -> int:
        return self.inner.protected(self.capped(k))

    def keep(self, k: int) -> int:
        return self.inner.keep(self.capped(k))

    def capped(self, k: int) -> int:
        """Return the budget ``k``, or the cap if that is smaller."""
        return k if self.cap is None else min(k, self.cap)

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        return self.inner.compress(state, self.capped(k), seed=seed, keep_last=keep_last)

    def hold(self, state: CacheState, k: int) -> CacheState:
        """Return the state, compressed to its budget if it has at least ``every`` entries more than that."""
        if not self.due(state, k):
            return state
        k = self._allowed(state, k)
        if self.inner.acts_each_step:
            # not in place, because the cache has grown by more than one entry
            return self.inner.compress(state, k)
        if not isinstance(state.length, Tensor):
            return self.inner.compress(state, k)
        return stack([self.inner.compress(row(state, 0), k)], self.statistics)

    def growth(self, tokens: int) -> int:
        return min(self.every, tokens)

    def due(self, state: CacheState, k: int) -> bool:
        """Return whether `hold` with the same arguments compresses."""
        return state.entries >= self._allowed(state, k) + self.every

    def _allowed(self, state: CacheState, k: int) -> int:
        """Return the entries that are kept of ``state``, if ``k`` is what the prompt allows."""
        if self.budget is not None:
            k = self.budget.kept(int(state.length.flatten()[0]) if isinstance(state.length, Tensor) else state.length)
        return self.keep(k)

    def record(self, state: CacheState, k: int, *, keep_last: bool = False) -> dict[str, Any]:
        return self.inner.record(state, self.capped(k), keep_last=keep_last)


def with_pace(setting: Setting, decoding: dict[str, Any]) -> Setting:
    """Return the setting with the pace of ``decoding``: its keys compress_every, budget_of and max_entries."""
    every = decoding.get("compress_every")
    if every is None or not setting.evicts or setting.policy.ignores_budget:
        return setting
    growing = setting.budget if decoding.get("budget_of") == "length" else None
    policy = Paced(inner=setting.policy, every=every, budget=growing, cap=decoding.get("max_entries"))
    return Setting(policy, setting.budget, setting.mode, setting.first_token, setting.temperature, setting.compile)


def over_time(kept: Sequence[float]) -> list[list[float]]:
    """Return [step, entries per KV head before its token] of at most `SAMPLES` evenly spaced steps and the last."""
    stride = -(-len(kept) // SAMPLES) or 1
    steps = [*range(0, len(kept), stride)]
    if kept and steps[-1] != len(kept) - 1:
        steps.append(len(kept) - 1)
    return [[step, kept[step]] for step in steps]
