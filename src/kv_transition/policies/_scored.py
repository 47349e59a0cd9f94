"""Policies that score entries once, when compressing, and the parts that they are made of.

No policy by itself, as the leading underscore says. Each part is an option of every such policy: which entries are
protected, how scores are pooled over neighbours, how layers and heads share the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.cache.state import Layer, LayerCache, SplitLayer
from kv_transition.policies import _allocation
from kv_transition.policies.base import Policy, top


@dataclass(frozen=True)
class Scored(Policy):
    """An entry's score is its importance, pooled over its neighbours in the cache (what is protected counts as 0, or as
    the least importance where that is below 0). The last ``window`` entries and then the first ``n_sink`` tokens of the
    text are protected.

    Allocation uniform: K for each head of each layer. pyramid: falling linearly from the lowest layer to the highest
    (see pyramidkv). cake: by the layers' attention (see cake). adaptive: the heads of a layer share its budget (see
    adakv).
    """

    statistics_where: ClassVar = {("allocation", "cake"): frozenset({"recent_queries"})}

    window: Annotated[int, (0, 1_048_576)] = 0
    """last entries that are kept"""
    n_sink: Annotated[int, (0, None)] = 0
    """first tokens of the text that are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 1
    """neighbours that are pooled"""
    pooling: Literal["max", "mean"] = "max"
    """how they are pooled"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive"] = "uniform"
    """how layers and heads share the budget"""
    beta: Annotated[float, (1, None)] = 20.0
    """allocation pyramid: how steep; the top layer keeps 1 / beta of the mean share"""
    floor: Annotated[float, (0, 1)] = 0.2
    """allocation adaptive: share of the mean budget that each head keeps for itself, rounded down but at least one
    entry"""
    tau1: Annotated[float, (0.1, 100)] = 1.0
    """allocation cake: temperature of the attention's entropy"""
    tau2: Annotated[float, (0.1, 100)] = 1.0
    """allocation cake: temperature of the attention's variance"""

    @property
    def by_score(self) -> bool:
        return self.allocation in ("uniform", "pyramid")

    @property
    def uniform(self) -> bool:
        return self.allocation == "uniform"

    def protected(self, k: int) -> int:
        return self.in_window(k) + self.sinks(k)

    def in_window(self, k: int) -> int:
        """How many of the last entries are protected when ``k`` are kept."""
        return min(self.window, k // 2)

    def sinks(self, k: int) -> int:
        """How many of the first tokens are protected when ``k`` entries are kept."""
        return min(self.n_sink, k // 2 - self.in_window(k))

    def shielded(self, layer: LayerCache, k: int, length: int) -> Tensor:
        """Which entries are protected: bool, of the shape of the layer's positions."""
        return (layer.positions >= length - self.in_window(k)) | (layer.positions < self.sinks(k))

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """What makes entries worth keeping, before pooling and protection: [Hkv, n] fp32, or [1, n] for all heads.

        Arguments as of `score`. What it says of protected entries is not used.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what makes entries important")

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        shielded = self.shielded(layer, k, length)
        raw = self.importance(layer, index, k, length, seed)
        if self.kernel > 1:
            raw = self._pooled(raw, shielded)
        return raw.masked_fill(shielded, torch.inf)

    def _pooled(self, raw: Tensor, shielded: Tensor) -> Tensor:
        """[*, n] -> [*, n], over neighbours in the cache."""
        least = raw.amin(-1, keepdim=True).clamp_max(0)
        raw = (raw - least).masked_fill(shielded, 0)
        pool = functional.max_pool1d if self.pooling == "max" else functional.avg_pool1d
        flat = raw.reshape(-1, 1, raw.shape[-1])
        return pool(flat, self.kernel, stride=1, padding=self.kernel // 2).view(raw.shape) + least

    def layer_budget(self, k: int, index: int, layers: int, n: int) -> int:
        """Entries that layer ``index`` keeps, where that does not depend on what the layers hold."""
        if self.allocation != "pyramid":
            return k
        return _allocation.pyramid(k, layers, n, max(1, self.protected(k)), self.beta)[index]

    def layer_budgets(self, layers: Sequence[Layer], k: int, length: int) -> list[int]:
        if self.allocation != "cake" or all(layer.n <= k for layer in layers):
            return super().layer_budgets(layers, k, length)
        observers = max(1, self.in_window(k))
        preferences = [_allocation.preference(layer, length, observers, self.tau1, self.tau2) for layer in layers]
        return _allocation.by_preference(k, preferences, [int(layer.n) for layer in layers], max(1, self.protected(k)))

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        if self.allocation != "adaptive":
            return super().compress_layer(layer, index, k, length, seed, keep_last)
        heads = _allocation.by_head(layer)
        scores = []
        for head in heads:
            score = self.score(head, index, k, length, seed)[0]
            if keep_last:
                score[-1] = torch.inf
            scores.append(score)
        counts = _allocation.shared(heads, scores, k, max(1, int(self.floor * k)))
        kept = (top(score, count) for score, count in zip(scores, counts, strict=True))
        return SplitLayer(tuple(head.select(mine[None]) for head, mine in zip(heads, kept, strict=True)))
