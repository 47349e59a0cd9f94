"""LagKV: entries whose keys and values differ most from those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored

_TINY = 1e-6
"""lower limit of the range of a channel within a partition"""


@dataclass(frozen=True)
class LagKV(Scored):
    """Scores entries by their keys and values only; it reads no attention. The entries after the sinks are cut, from
    the front, into partitions of ``lag`` entries. The reference of a partition is the next partition. The channels of
    the keys are scaled by the minimum and maximum of the same channel in the reference; the standard deviation over an
    entry's scaled channels, after a softmax over the partition, is the score of its key. The score of its value is
    computed in the same way, and both count equally. The importance of an entry is its rank within its partition, so
    that each partition keeps the same number of entries. The last whole partition and the entries after it have no
    reference and are kept.

    A partition is shorter than ``lag`` if K requires it, because the entries that are kept without a score take at most
    half of K.

    Source: Liang et al., "LagKV: lag-relative information of the KV cache tells which tokens are important", arXiv
    2504.04704.

    Cost: O(N d) time, no statistic.

    Differences: the paper evicts partition by partition during the prefill; here the whole prompt is read first.
    kvpress keeps ``lag`` whatever K is, and does not define the order of equal ranks in several partitions; here the
    lower position has priority.
    """

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are kept"""
    lag: Annotated[int, (1, 65_536)] = 128
    """entries of a partition"""

    def sinks(self, k: int) -> int:
        return min(self.n_sink, k // 2)

    def partition(self, k: int) -> int:
        """Return the number of entries of a partition when ``k`` are kept."""
        return max(1, min(self.lag, (k // 2 - self.sinks(k) + 1) // 2))

    def score_basis(self, k: int) -> int:
        return k

    def in_window(self, k: int) -> int:
        """Return the largest number of last entries that are kept: one partition and the entries after it."""
        return min(max(self.window, 2 * self.partition(k) - 1), k // 2 - self.sinks(k))

    def shielded(self, layer: LayerCache, k: int, length: int) -> Tensor:
        sinks = self._leading(layer, k)
        lag = self.partition(k)
        tail = min(max(self.window, lag + (layer.n - sinks) % lag), layer.n - sinks, self.in_window(k))
        place = torch.arange(layer.n, device=layer.positions.device)
        last = (place >= layer.n - tail).expand(layer.positions.shape)
        return last | (layer.positions < self.sinks(k))

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        sinks, lag = self._leading(layer, k), self.partition(k)
        parts = (layer.n - sinks) // lag
        stop = sinks + parts * lag
        found = torch.ones(layer.positions.shape, device=layer.positions.device)
        if parts > 1:
            keys, values = (_relative(x[:, sinks:stop].float(), lag) for x in (layer.keys, layer.values))
            order = ((keys + values) / 2).sort(dim=-1, descending=True, stable=True).indices
            ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(lag, device=order.device).expand_as(order))
            found[:, sinks : stop - lag] = ((lag - 1 - ranks) / lag).flatten(1)
        return found

    def _leading(self, layer: LayerCache, k: int) -> int:
        """Return the number of entries before the first partition: the sinks that the cache still has."""
        return int((layer.positions < self.sinks(k)).sum(-1).amax())


def _relative(x: Tensor, lag: int) -> Tensor:
    """Return the scores of all partitions but the last: x [Hkv, parts lag, d] -> [Hkv, parts - 1, lag]."""
    parts = x.unflatten(1, (-1, lag))
    before, after = parts[:, :-1], parts[:, 1:]
    least, most = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
    return ((before - least) / (most - least).clamp_min(_TINY)).std(-1).softmax(-1)
