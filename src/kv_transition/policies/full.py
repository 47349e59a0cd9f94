"""The full cache: nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transition.cache.state import CacheState
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every entry. It is the reference of every comparison.

    Cost: none.
    """

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        return state
