"""The base class of policies that score entries once, when compressing, and the options that they share.

The leading underscore says that this module is not a policy. Each option applies to every such policy: the entries that
are protected, the pooling of scores over neighbours, and how layers and heads share the budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.cache.state import CacheState, Layer, LayerCache, SplitLayer
from kv_transition.policies import _allocation
from kv_transition.policies.base import Policy, top

_EPSILON = 1e-4
"""added to a score before it is weighted, as in the code of CriticalKV's authors"""


@dataclass(frozen=True)
class Scored(Policy):
    """The score of an entry is its importance, pooled over its neighbours in the cache. In the pooling, a protected
    entry counts as 0, or as the least importance if that is negative. The last ``window`` entries are protected, and
    then the first ``n_sink`` tokens of the text.

    Allocation: ``uniform`` gives K entries to each head of each layer. ``pyramid`` lets the budget fall linearly from
    the lowest layer to the highest (see pyramidkv). ``cake`` derives the layers' budgets from their attention (see
    cake). With ``adaptive``, the heads of a layer share its budget (see adakv). With ``global``, all heads of all
    layers share one budget, and each keeps at least one entry (see kvzip).

    Weighting: with ``projected_values``, the K / 2 entries with the best scores stay (rounded down, at least one). The
    other places go to the entries with the largest product of score and L1 norm of the projected value (the value after
    the output projection), mean over the group. Before the product, 0.0001 of the total attention is added to each
    score; if there are negative scores, the least score is subtracted first.
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
    """width of the pooling, in entries"""
    pooling: Literal["max", "mean"] = "max"
    """method of pooling"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "uniform"
    """how layers and heads share the budget"""
    beta: Annotated[float, (1, None)] = 20.0
    """allocation pyramid: steepness; the top layer keeps 1 / beta of the mean share"""
    floor: Annotated[float, (0, 1)] = 0.2
    """allocation adaptive: share of the mean budget that each head keeps in any case, rounded down, at least one
    entry"""
    tau1: Annotated[float, (0.1, 100)] = 1.0
    """allocation cake: temperature of the attention's entropy"""
    tau2: Annotated[float, (0.1, 100)] = 1.0
    """allocation cake: temperature of the attention's variance"""

    weighting: Literal["none", "projected_values"] = "none"
    """the factor that scores are multiplied by"""

    @property
    def by_score(self) -> bool:
        return self.allocation in ("uniform", "pyramid")

    @property
    def uniform(self) -> bool:
        return self.allocation == "uniform"

    def protected(self, k: int) -> int:
        return self.in_window(k) + self.sinks(k)

    def in_window(self, k: int) -> int:
        """Return the number of last entries that are protected when ``k`` are kept."""
        return min(self.window, k // 2)

    def sinks(self, k: int) -> int:
        """Return the number of first tokens that are protected when ``k`` entries are kept."""
        return min(self.n_sink, k // 2 - self.in_window(k))

    def score_basis(self, k: int) -> Hashable:
        """Return the protected numbers, since plain scores depend on ``k`` only through them; weights depend on it
        directly.
        """
        return (self.in_window(k), self.sinks(k)) if self.weighting == "none" else k

    def shielded(self, layer: LayerCache, k: int, length: int) -> Tensor:
        """Return which entries are protected, as bool in the shape of the layer's positions."""
        return (layer.positions >= length - self.in_window(k)) | (layer.positions < self.sinks(k))

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """Return the importance of each entry before pooling and protection: [Hkv, n] fp32, or [1, n] for all heads.

        Arguments as of `score`. The importance of protected entries is not used. A class whose importance depends on
        ``k`` by more than the protected numbers overrides `score_basis`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define the importance of entries")

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        return self.weighted(self.plain_score(layer, index, k, length, seed), layer, k)

    def weighted(self, score: Tensor, layer: LayerCache, k: int) -> Tensor:
        """Return the weighted scores of a layer that keeps ``k``; the first half of the choice has +inf (see
        ``weighting``).

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
        """Return the score of an entry that receives all attention; ``weighting`` adds 0.0001 of it."""
        return 1.0

    def plain_score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """Return the scores before they are weighted; arguments and shape as of `score`."""
        shielded = self.shielded(layer, k, length)
        raw = self.importance(layer, index, k, length, seed)
        if self.kernel > 1:
            raw = self._pooled(raw, shielded)
        return raw.masked_fill(shielded, torch.inf)

    def _pooled(self, raw: Tensor, shielded: Tensor) -> Tensor:
        """Return scores pooled over neighbours in the cache: [*, n] -> [*, n]."""
        least = raw.amin(-1, keepdim=True).clamp_max(0)
        raw = (raw - least).masked_fill(shielded, 0)
        pool = functional.max_pool1d if self.pooling == "max" else functional.avg_pool1d
        flat = raw.reshape(-1, 1, raw.shape[-1])
        return pool(flat, self.kernel, stride=1, padding=self.kernel // 2).view(raw.shape) + least

    def layer_budget(self, k: int, index: int, layers: int, n: int) -> int:
        """Return the number of entries that layer ``index`` keeps, if the attention of the layers
        does not decide it.
        """
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
            # the last entry must be in the first half of the choice, which is made before scores are weighted
            score = self.plain_score(layer, index, k, length, seed).expand(layer.positions.shape).clone()
            score[..., -1] = torch.inf
            return layer.select(top(self.weighted(score, layer, k), k))
        heads = _allocation.by_head(layer)
        scores = self._of_heads(heads, index, k, length, seed, keep_last)
        counts = _allocation.shared(heads, scores, k, max(1, int(self.floor * k)))
        return self._split(heads, scores, counts)

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the compressed state, as `Policy.compress` does."""
        if self.allocation != "global":
            return super().compress(state, k, seed=seed, keep_last=keep_last)
        if state.entries <= k:
            return state  # as a whole, although a layer may hold more than K
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
        """Return the unweighted scores [n] of each head."""
        scores = [self.plain_score(head, index, k, length, seed)[0] for head in heads]
        if keep_last:
            for score in scores:
                score[-1] = torch.inf
        return scores

    def _split(self, heads: Sequence[LayerCache], scores: Sequence[Tensor], counts: Sequence[int]) -> SplitLayer:
        """Return the layer with the best ``counts[i]`` entries of head i."""
        kept = []
        for head, score, count in zip(heads, scores, counts, strict=True):
            kept.append(head.select(top(self.weighted(score[None], head, count), count)))
        return SplitLayer(tuple(kept))
