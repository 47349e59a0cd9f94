"""What every eviction policy is: a score for each entry, and the K best kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState, LayerCache


@dataclass(frozen=True)
class Policy:
    """Chooses what to keep of a cache. Pure: the same state and seed give the same result.

    A subclass is a frozen dataclass whose fields are its hyper-parameters (with defaults) and whose module is named
    after its kind. It says which running statistics of the cache it reads and when it acts, and scores entries.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """running statistics that must be kept up while decoding: ``attn_sum``"""
    acts_each_step: ClassVar[bool] = False
    """holds the cache at K while decoding, rather than compressing once"""

    def protected(self, k: int) -> int:
        """Entries that are kept whatever their score; at most half of the ``k`` kept ones."""
        return 0

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """How much each entry of a layer is worth keeping: [Hkv, n] fp32, or [1, n] for one set in all heads.

        index: the layer's number. k: entries that will be kept. length: tokens read so far. seed: of this example.
        Protected entries score +inf.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score entries")

    def keep(self, k: int) -> int:
        """Entries that are kept when ``k`` may be."""
        return k

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """The state with at most ``k`` entries per KV head; unchanged where a layer has no more than that.

        keep_last: keep the newest entry in every head, because the last token is about to be read again.
        """
        k = self.keep(k)
        indices = []
        for number, layer in enumerate(state.layers):
            if layer.n <= k:
                indices.append(_everything(layer))
                continue
            score = self.score(layer, number, k, state.length, seed)
            if keep_last:
                score = score.clone()
                score[:, -1] = torch.inf
            indices.append(top(score, k).expand(layer.keys.shape[0], -1))
        return state.select(indices)


def top(score: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` highest scores [..., n] -> [..., k], rising; ties go to the lower index."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def _everything(layer: LayerCache) -> Tensor:
    return torch.arange(layer.n, device=layer.keys.device).expand(layer.keys.shape[0], -1)
