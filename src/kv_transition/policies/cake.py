"""CAKE: entries by the mean and the shift of attention, layers by its spread and its shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._allocation import observed
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class Cake(Scored):
    """Keeps the last ``window`` entries and, of those before, the ones with the largest mean plus ``gamma`` variances
    of the attention that they receive from the window's queries; mean over the group, pooled.

    Layers share what their windows leave of the budget in proportion to H^(1 / tau1) V^(1 / tau2). H is the entropy of
    the window's attention to the entries before it, summed over queries and heads (how far attention spreads), V its
    variance over the queries, summed over entries and heads (how much it shifts). Shares are rounded down, and what
    that leaves goes to the first layers, equally; what a layer cannot use is shared equally by those that can.

    Source: Qin et al., "CAKE: cascading and adaptive KV cache eviction with layer preferences", arXiv 2503.12491.

    Cost: two attentions of the window over all entries, O(w N d) time and O(w N) memory while they last.

    Differences: the paper compresses layer by layer while the prompt is read, which has the same result and a lower
    peak of memory; here the whole prompt is read first. The window takes at most half of a layer's budget, as in
    snapkv. The authors choose ``tau1`` and ``tau2`` for each model.
    """

    statistics = frozenset({"recent_queries"})

    window: Annotated[int, (1, 64)] = 32
    """last queries that observe, and whose entries are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 5
    """neighbours that are pooled"""
    pooling: Literal["max", "mean"] = "mean"
    """how they are pooled"""
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
