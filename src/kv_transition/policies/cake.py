"""CAKE: entries with a large mean or variance of attention; layers by the spread and shift of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._allocation import observed
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class Cake(Scored):
    """Keeps the last ``window`` entries. Of the entries before them it keeps those with the largest sum of two terms:
    the mean of the attention that the entry receives from the window's queries, and ``gamma`` times its variance over
    these queries. The sum is averaged over the group and pooled over neighbours.

    Each layer keeps its window; the rest of the total budget is shared among the layers in proportion to H^(1 / tau1)
    V^(1 / tau2). H is the entropy of the window's attention to the entries before it, summed over queries and heads: it
    measures how widely attention spreads. V is the variance over the queries, summed over entries and heads: it
    measures how much attention shifts. Shares are rounded down, and the remainder is divided equally among the first
    layers. Entries that a layer cannot use are divided equally among the layers that can use them.

    Source: Qin et al., "CAKE: cascading and adaptive KV cache eviction with layer preferences", arXiv 2503.12491.

    Cost: the attention of the window to all entries is computed twice, O(w N d) time and O(w N) temporary memory.

    Differences: the paper compresses layer by layer during the prefill, which gives the same result with a lower peak
    of memory; here the whole prompt is read first. The window takes at most half of a layer's budget, as in snapkv. The
    authors choose ``tau1`` and ``tau2`` for each model, do not compress a prompt that is not longer than K plus the
    window, and hold each layer at its budget while they decode.
    """

    statistics = frozenset({"recent_queries"})

    window: Annotated[int, (1, 64)] = 32
    """last queries whose attention is used and whose entries are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 5
    """width of the pooling, in entries"""
    pooling: Literal["max", "mean"] = "mean"
    """method of pooling"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "cake"
    """how layers and heads share the budget"""
    gamma: Annotated[float, (0, 1_000_000)] = 200.0
    """weight of the variance in an entry's importance"""

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        weights = observed(layer, length, max(1, self.in_window(k)))
        found = weights.mean(-2)
        if weights.shape[-2] > 1:
            found = found + self.gamma * weights.var(-2)
        return found.mean(-2)
