"""Spans of neighbouring tokens with diffuse attention, for entropy_merge and entropy_drop.

The leading underscore says that this module is not a policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.cache.merge import Span
from kv_transition.cache.state import CacheState, Layer, LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class Plan:
    """The spans of one layer that become one entry each."""

    spans: tuple[Span, ...]
    """(start, stop) of each span that becomes one entry, in rising order, without overlap"""
    max_span: int
    """longest allowed span, in entries"""
    lowest: float | None
    """least normalised entropy of a chosen span: its mean, or its lowest token under target threshold"""


@dataclass(frozen=True)
class EntropySpans(Policy):
    """The first ``n_sink`` and the last ``recent`` entries stay unchanged; together they take at most half of the
    budget, and the sinks come first. The other entries are cut, from the front, into spans of ``max_span``. The
    normalised entropy h of a token is the entropy of its query's attention divided by log(position + 1), mean over the
    heads of the layer. It lies in [0, 1]; h of position 0 is 0.

    Target budget: spans become one entry each, in falling order of their mean h (the earlier span first among equals),
    until K entries are left. The last of these spans is shortened from its front to the number of tokens that K
    requires. If spans of ``max_span`` are too short to reach K, longer spans are used. Target threshold: every span
    whose tokens all have h of at least ``threshold`` becomes one entry, and the footprint follows from that.
    """

    statistics = frozenset({"attn_sum", "query_entropy"})
    ignores_budget = ("target", "threshold")

    target: Literal["budget", "threshold"] = "budget"
    """what decides how many spans become one entry"""
    threshold: Annotated[float, (0, 1)] = 0.5
    """least h under target threshold"""
    max_span: Annotated[int, (2, None)] = 8
    """longest span in entries"""
    n_sink: Annotated[int, (0, None)] = 4
    """first entries that stay unchanged"""
    recent: Annotated[int, (0, None)] = 32
    """last entries that stay unchanged"""

    def protected(self, k: int) -> int:
        return min(self.n_sink + self.recent, k // 2)

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the compressed state, as `Policy.compress` does; with target threshold ``k`` has no effect."""
        if self.target == "budget":
            return super().compress(state, k, seed=seed, keep_last=keep_last)
        layers = list(state.layers)
        for number, layer in self._evictable(state):
            layers[number] = self.compress_layer(layer, number, layer.n, state.length, seed, keep_last)
        return replace(state, layers=tuple(layers))

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        if k == 1 and keep_last:
            # only the last entry fits
            return layer.select(layer.positions.new_full((*layer.positions.shape[:-1], 1), layer.n - 1))
        return self.reduced(layer, self.plan(layer, k, keep_last=keep_last))

    def reduced(self, layer: LayerCache, plan: Plan) -> LayerCache:
        """Return the layer with each span of the plan as one entry."""
        raise NotImplementedError

    def record(self, state: CacheState, k: int, *, keep_last: bool = False) -> dict[str, float | None]:
        """Return, over all layers, the longest allowed span, the number of spans, and the lowest h among them."""
        plans = [
            self.plan(layer, layer.n if self.target == "threshold" else k, keep_last=keep_last)
            for _, layer in self._evictable(state)
            if self.target == "threshold" or (layer.n > k and not (k == 1 and keep_last))
        ]
        return {
            "max_span": max((plan.max_span for plan in plans), default=self.max_span),
            "spans": sum(len(plan.spans) for plan in plans),
            "lowest_entropy": min((plan.lowest for plan in plans if plan.lowest is not None), default=None),
        }

    def plan(self, layer: LayerCache, k: int, *, keep_last: bool = False) -> Plan:
        """Return the spans of a layer that become one entry each, so that ``k`` of its n entries are left.

        With target threshold ``k`` only limits the protected entries. keep_last: the last entry stays unchanged even if
        ``k`` is too small for recent entries.
        """
        last = int(keep_last)
        sinks = min(self.n_sink, max(k // 2 - last, 0))
        recent = max(last, min(self.recent, k // 2 - sinks))
        between = layer.n - sinks - recent
        width = self.max_span
        if self.target == "budget":
            width = max(width, -(-between // (k - sinks - recent)))
        starts = range(sinks, sinks + between, width)
        lengths = [min(width, sinks + between - start) for start in starts]
        if not lengths:
            return Plan((), width, None)
        h = _normalised(layer)[sinks : sinks + between]
        if self.target == "threshold":
            lowest = _rows(h, width, torch.inf).amin(-1).tolist()
            chosen = [i for i, m in enumerate(lengths) if m > 1 and lowest[i] >= self.threshold]
            spans = [(starts[i], starts[i] + lengths[i]) for i in chosen]
            return Plan(tuple(spans), width, min((lowest[i] for i in chosen), default=None))
        means = (_rows(h, width, 0).sum(-1) / torch.tensor(lengths, dtype=torch.float64)).tolist()
        excess = layer.n - k
        spans, least = [], None
        for i in sorted(range(len(starts)), key=lambda i: -means[i]):
            if excess == 0:
                break
            if lengths[i] > 1:
                freed = min(lengths[i] - 1, excess)
                spans.append((starts[i], starts[i] + freed + 1))
                excess -= freed
                least = means[i]
        return Plan(tuple(sorted(spans)), width, least)

    def _evictable(self, state: CacheState) -> Iterator[tuple[int, LayerCache]]:
        for number, layer in enumerate(state.layers):
            if layer.window is None:
                self._require_statistics(layer)
                yield number, layer


def _normalised(layer: LayerCache) -> Tensor:
    """Return h of each entry, [n] fp64 on the CPU, in [0, 1]."""
    most = (layer.positions.double() + 1).log()
    h = torch.where(most > 0, layer.query_entropy.double() / most, 0)
    return h.mean(0).cpu()


def _rows(h: Tensor, width: int, fill: float) -> Tensor:
    """Return [spans, width] from [n], with the last span padded; the width is n if it is larger."""
    width = min(width, len(h))
    return functional.pad(h, (0, -len(h) % width), value=fill).view(-1, width)
