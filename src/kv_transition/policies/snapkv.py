"""SnapKV: what the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.attention.blocks import window_sums
from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """Li et al., "SnapKV: LLM knows what you are looking for before generation" (arXiv 2404.14469).

    window: last queries that observe, and whose entries are kept. kernel: width of the pooling over positions (odd).
    pooling: max or mean over the kernel.
    """

    window: Annotated[int, (1, 64)] = 32
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 7
    pooling: Literal["max", "mean"] = "max"

    def protected(self, k: int) -> int:
        return min(self.window, k // 2)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        # A tiny budget leaves no room for the window; the last query still observes.
        observers = max(1, min(self.protected(k), layer.recent_queries.shape[1]))
        at = torch.arange(length - observers, length, device=layer.keys.device)
        queries = layer.recent_queries[:, -observers:]
        attention = window_sums(queries, at, layer.keys, layer.positions, layer.scale)
        window = layer.positions >= length - self.protected(k)
        return self._pooled(attention.masked_fill(window, 0)).masked_fill(window, torch.inf)

    def _pooled(self, attention: Tensor) -> Tensor:
        """[Hkv, n] -> [Hkv, n], over neighbours in the cache."""
        padding = self.kernel // 2
        if self.pooling == "max":
            return functional.max_pool1d(attention[:, None], self.kernel, stride=1, padding=padding)[:, 0]
        return functional.avg_pool1d(attention[:, None], self.kernel, stride=1, padding=padding)[:, 0]
