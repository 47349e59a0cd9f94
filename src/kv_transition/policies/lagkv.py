"""LagKV: entries that the tokens after them do not foretell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored

_TINY = 1e-6
"""least range of a channel within a partition"""


@dataclass(frozen=True)
class LagKV(Scored):
    """No attention is read. The entries after the sinks are cut, from the front, into partitions of ``lag``; the next
    partition is the reference of each. Keys, and values, are scaled channel by channel by the reference's least and
    greatest value; an entry scores the standard deviation over its channels, put through a softmax over the partition;
    keys and values count equally. Its importance is its rank within the partition, so that each partition keeps equally
    many. The last whole partition and what is left behind it have no reference and are kept.

    A partition is shorter than ``lag`` where K asks for it: what is kept without a score is at most half of K.

    Source: Liang et al., "LagKV: lag-relative information of the KV cache tells which tokens are important",
    arXiv 2504.04704.

    Cost: O(N d) time, no statistic.

    Differences: the paper evicts partition by partition while it reads; here the whole prompt is read first. kvpress
    keeps ``lag`` whatever K is, and gives equal ranks of several partitions in no order; here the lower position goes
    first.
    """

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are kept"""
    lag: Annotated[int, (1, 65_536)] = 128
    """entries of a partition"""

    def sinks(self, k: int) -> int:
        return min(self.n_sink, k // 2)

    def partition(self, k: int) -> int:
        """Entries of a partition when ``k`` are kept."""
        return max(1, min(self.lag, (k // 2 - self.sinks(k) + 1) // 2))

    def in_window(self, k: int) -> int:
        """How many of the last entries are kept at most: a partition and what is left behind it."""
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
        """Entries in front of the first partition: the sinks, as far as the cache still has them."""
        return int((layer.positions < self.sinks(k)).sum(-1).amax())


def _relative(x: Tensor, lag: int) -> Tensor:
    """x [Hkv, parts lag, d] -> [Hkv, parts - 1, lag], of all partitions but the last."""
    parts = x.unflatten(1, (-1, lag))
    before, after = parts[:, :-1], parts[:, 1:]
    least, most = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
    return ((before - least) / (most - least).clamp_min(_TINY)).std(-1).softmax(-1)
