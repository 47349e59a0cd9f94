"""R-KV: entries that receive attention and are not redundant; for long reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from kv_transition.attention.blocks import logits_of
from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.policies._scored import Scored

_ROWS = 256
"""number of keys that are compared with the others at a time"""


@dataclass(frozen=True)
class RKV(Scored):
    """Keeps the last ``window`` entries. Of the entries before them it keeps those with the highest score weight A - (1
    - weight) S. A is the attention of the window's queries to the entries before it: the greatest logit of the group,
    softmax, mean over the queries, pooled over neighbours. S is redundancy: the mean cosine of an entry's key with all
    other keys of its head, softmax over the entries. From the cosines of each key one is left out: the one with the
    last entry whose cosine is above ``similar``, or with the first entry if there is none. Therefore, of several
    similar entries the newest stays.

    While decoding, the policy waits until the cache has ``every`` entries more than K, and then evicts down to K.

    Source: Cai et al., "R-KV: redundancy-aware KV cache compression for training-free reasoning models acceleration",
    arXiv 2505.24133.

    Cost: the attention of the window to all entries, and the cosines of each key with the newest ``horizon`` keys: O((w
    + horizon) N d) time and O((w + horizon) N) temporary memory, once in ``every`` steps.

    Differences: the authors search for the last similar entry among all entries, in O(N^2 d) time (as here with
    ``horizon`` null); the choice is the same if that entry is among the newest ``horizon``. Their code has weight 0.07,
    the paper 0.1, and the code scales by 1 / sqrt(d) whatever the model's own scale is. The window takes at most half
    of the budget, as in snapkv.
    """

    statistics = frozenset({"recent_queries"})
    acts_each_step = True

    window: Annotated[int, (1, 64)] = 8
    """last queries whose attention is used and whose entries are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 7
    """width of the pooling of attention, in entries"""
    weight: Annotated[float, (0, 1)] = 0.07
    """weight of attention; redundancy has 1 minus this weight"""
    similar: Annotated[float, (-1, 1)] = 0.5
    """cosine above which two keys are similar"""
    horizon: Annotated[int | None, (1, 1_048_576)] = 512
    """number of newest entries that are searched for the last similar one; null: all"""
    every: Annotated[int, (1, 65_536)] = 128
    """number of tokens that are generated between two evictions"""

    def hold(self, state: CacheState, k: int) -> CacheState:
        """Return the state, compressed as by `Policy.hold` if it has at least ``every`` entries more than ``k``."""
        return state if state.entries < k + self.every else super().hold(state, k)

    def growth(self, tokens: int) -> int:
        return min(self.every, tokens)

    def plain_score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        shielded = self.shielded(layer, k, length)
        score = self.weight * self._attention(layer, shielded, k) - (1 - self.weight) * self._redundancy(layer)
        return score.masked_fill(shielded, torch.inf)

    def _attention(self, layer: LayerCache, shielded: Tensor, k: int) -> Tensor:
        observers = max(1, min(self.in_window(k), layer.recent_queries.shape[-2]))
        logits = logits_of(layer.recent_queries[..., -observers:, :], layer.keys, layer.scale).amax(-3)
        if layer.bias is not None:
            logits = logits + layer.bias[..., None, :]
        weights = logits.masked_fill(shielded.unsqueeze(-2), -torch.inf).softmax(-1).nan_to_num(0)
        return self._pooled(weights.mean(-2), shielded)

    def _redundancy(self, layer: LayerCache) -> Tensor:
        """Return the redundancy of each entry, [*B, Hkv, n]: mean cosine with the other keys, softmax over entries."""
        keys = layer.keys.float()
        unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
        n = layer.n
        # sum of each key's cosines with the other keys, computed without holding all pairs in memory
        sums = (unit @ unit.sum(-2, keepdim=True).mT).squeeze(-1) - unit.square().sum(-1)
        start = 0 if self.horizon is None else max(0, n - self.horizon)
        places = torch.arange(start, n, device=keys.device)
        first = unit[..., :1, :]
        for begin in range(0, n, _ROWS):
            rows = unit[..., begin : begin + _ROWS, :]
            own = torch.arange(begin, begin + rows.shape[-2], device=keys.device)
            cosines = rows @ unit[..., start:, :].mT
            alike = (cosines > self.similar) & (places != own[:, None])
            last = torch.where(alike, places, -1).amax(-1)
            found = cosines.gather(-1, (last - start).clamp_min(0).unsqueeze(-1)).squeeze(-1)
            with_first = (rows @ first.mT).squeeze(-1).masked_fill(own == 0, 0)
            left_out = torch.where(last < 0, with_first, found)
            sums = sums.scatter_add(-1, last.clamp_min(0), -left_out)
        return (sums / n).softmax(-1)
