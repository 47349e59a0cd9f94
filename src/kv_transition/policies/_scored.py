"""Policies that score entries once, when compressing, and the parts that they are made of.

No policy by itself, as the leading underscore says. Each part is an option of every such policy: which entries are
protected, how scores are pooled over neighbours, how layers and heads share the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.cache.state import CacheState, Layer, LayerCache, SplitLayer
from kv_transition.policies import _allocation
from kv_transition.policies.base import Policy, top

_EPSILON = 1e-4
"""added to a score before it is weighted, as CriticalKV's authors do"""


@dataclass(frozen=True)
class Scored(Policy):
    """An entry's score is its importance, pooled over its neighbours in the cache (what is protected counts as 0, or as
    the least importance where that is below 0). The last ``window`` entries and then the first ``n_sink`` tokens of the
    text are protected.

    Allocation uniform: K for each head of each layer. pyramid: falling linearly from the lowest layer to the highest
    (see pyramidkv). cake: by the layers' attention (see cake). adaptive: the heads of a layer share its budget (see
    adakv). global: all heads of all layers share one budget, each with at least one entry (see kvzip).

    Weighting projected_values: the best K / 2 scores (rounded down, at least one) stay, and of the others the best by
    score times the L1 norm of the value as the output projection makes it, mean over the group. To the score 0.0001 of
    all attention is added, and where there are scores below 0 they count from the least one.
    """

    statistics_where: ClassVar = {
        ("allocation", "cake"): frozenset({"recent_queries"}),
        ("weighting", "projected_values"): frozenset({"output_norm"}),
    }

    window: Annotated[int, (0, 1_048_576)] = 0
    """last entries that are kept"""
    n_sink: Annotated[int, (0, None)] = 0
    """first tokens of the text that are kept"""
    kernel: Literal[1, 3, 5, 7, 9, 11, 13, 15] = 1
    """neighbours that are pooled"""
    pooling: Literal["max", "mean"] = "max"
    """how they are pooled"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "uniform"
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

    weighting: Literal["none", "projected_values"] = "none"
    """what scores are multiplied by"""

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
        return self.weighted(self.plain_score(layer, index, k, length, seed), layer, k)

    def weighted(self, score: Tensor, layer: LayerCache, k: int) -> Tensor:
        """The scores of a layer that keeps ``k``, with the first half of the choice raised to +inf; see ``weighting``.

        Source: CriticalKV, arXiv 2502.03805, algorithm 1.
        """
        if self.weighting == "none":
            return score
        score = score.expand(layer.positions.shape)
        shielded = score.isinf()
        least = score.amin(-1, keepdim=True).clamp_max(0)
        epsilon = _EPSILON * self.whole(layer, k)
        product = ((score - least).masked_fill(shielded, 0) + epsilon) * layer.output_norm
        chosen = top(score, min(max(1, k // 2), layer.n))
        return product.masked_fill(shielded, torch.inf).scatter(-1, chosen, torch.inf)

    def whole(self, layer: LayerCache, k: int) -> float:
        """The score of an entry that all attention went to, which 0.0001 is a share of."""
        return 1.0

    def plain_score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """The scores before they are weighted; as of `score`."""
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
            if self.weighting == "none" or isinstance(layer, SplitLayer) or not keep_last:
                return super().compress_layer(layer, index, k, length, seed, keep_last)
            # the last entry is among the first half of the choice, before scores are weighted
            score = self.plain_score(layer, index, k, length, seed).expand(layer.positions.shape).clone()
            score[..., -1] = torch.inf
            return layer.select(top(self.weighted(score, layer, k), k))
        heads = _allocation.by_head(layer)
        scores = self._of_heads(heads, index, k, length, seed, keep_last)
        counts = _allocation.shared(heads, scores, k, max(1, int(self.floor * k)))
        return self._split(heads, scores, counts)

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """As any policy."""
        if self.allocation != "global" or state.entries <= k:
            return super().compress(state, k, seed=seed, keep_last=keep_last)
        of_layers, scores = {}, []
        for number, layer in enumerate(state.layers):
            if layer.window is None:
                self._require_statistics(layer)
                of_layers[number] = _allocation.by_head(layer)
                scores += self._of_heads(of_layers[number], number, k, state.length, seed, keep_last)
        counts = _allocation.shared([head for heads in of_layers.values() for head in heads], scores, k, 1)
        layers, first = list(state.layers), 0
        for number, heads in of_layers.items():
            own = slice(first, first + len(heads))
            layers[number] = self._split(heads, scores[own], counts[own])
            first += len(heads)
        return replace(state, layers=tuple(layers))

    def _of_heads(
        self, heads: Sequence[LayerCache], index: int, k: int, length: int, seed: int, keep_last: bool
    ) -> list[Tensor]:
        """Scores [n] of each head, not weighted."""
        scores = [self.plain_score(head, index, k, length, seed)[0] for head in heads]
        if keep_last:
            for score in scores:
                score[-1] = torch.inf
        return scores

    def _split(self, heads: Sequence[LayerCache], scores: Sequence[Tensor], counts: Sequence[int]) -> SplitLayer:
        """The heads with the best ``counts`` of each."""
        kept = []
        for head, score, count in zip(heads, scores, counts, strict=True):
            kept.append(head.select(top(self.weighted(score[None], head, count), count)))
        return SplitLayer(tuple(kept))
