"""SnapKV: entries that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from kv_transition.attention.blocks import window_sums
from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class SnapKV(Scored):
    """Keeps the last ``window`` entries. Of the entries before them it keeps those that receive the most attention from
    the window's queries: summed over the window, mean over the group, pooled over neighbours in the cache.

    Source: Li et al., "SnapKV: LLM knows what you are looking for before generation", arXiv 2404.14469.

    Cost: the attention of the window to all entries, O(w N d) time and O(w N) temporary memory.

    Differences: the window takes at most half of the budget, and only the queries of that window are used; kvpress uses
    the whole window whatever K is, so the kept sets differ if K is below twice the window. kvpress has window 64,
    kernel 5 and mean pooling by default, scales by 1 / sqrt(d) whatever the model's own scale is, rounds attention to
    the model's dtype, and pools each query head before it averages over the group, which gives other scores with max
    pooling.
    """

    statistics = frozenset({"recent_queries"})

    window: Annotated[int, (1, 64)] = 32
    """last queries whose attention is used and whose entries are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 7
    """width of the pooling, in entries"""

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        observers = self._observers(layer, k)
        at = length - observers + torch.arange(observers, device=layer.positions.device)
        queries = layer.recent_queries[..., -observers:, :]
        return window_sums(queries, at, layer.keys, layer.positions, layer.scale, bias=layer.bias)

    def whole(self, layer: LayerCache, k: int) -> float:
        return float(self._observers(layer, k))

    def _observers(self, layer: LayerCache, k: int) -> int:
        # A tiny budget has no space for the window; the last query is used nevertheless.
        return max(1, min(self.in_window(k), layer.recent_queries.shape[-2]))
