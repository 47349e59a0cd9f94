"""The base class of eviction policies: it scores the entries and keeps the K best."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kv_transition.cache.quantize import Packed
from kv_transition.cache.state import CacheState, Layer, LayerCache
from kv_transition.errors import UserError

BeforeAttention = Callable[[LayerCache, Tensor, Tensor], LayerCache]
"""The change of an evictable layer before the attention of the new tokens is computed; it receives their rotated
queries [*B, H, q, d] and keys [*B, Hkv, q, d]"""


class Watcher(Protocol):
    """Observes each step of one answer before it is computed."""

    def before_attention(self, logits: Tensor) -> BeforeAttention | None:
        """Return what the next step does in each layer; None: nothing. logits [1, V] produced the token that it
        reads.
        """

    def record(self, state: CacheState) -> dict[str, Any]:
        """Return facts to record about the answer that ends with ``state``."""


@dataclass(frozen=True)
class Policy:
    """Chooses the entries to keep. Pure: the same state and seed give the same result.

    A subclass is a frozen dataclass. Its fields are the hyper-parameters (with defaults), and its module is named after
    its kind. It names the statistics of the cache that it reads, says when it acts, and scores entries.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """statistics of the cache that the policy reads, from `cache.state.STATISTICS`"""
    acts_each_step: ClassVar[bool] = False
    """whether the policy holds the cache at K while decoding, instead of compressing once"""
    one_at_a_time: ClassVar[bool] = False
    """whether answers are decoded one by one, never as a batch"""
    ignores_budget: ClassVar[bool | tuple[str, str]] = False
    """whether the hyper-parameters alone determine the footprint: always (True), or if hyper-parameter ``name`` has
    ``value``, given as (name, value)"""

    draws: ClassVar[bool] = False
    """whether the choice depends on the seed; the seed differs between questions about one context"""
    statistics_where: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {}
    """further statistics that the policy reads if a hyper-parameter has a value: {(name, value): statistics}"""

    def __post_init__(self) -> None:
        more = (names for (name, value), names in self.statistics_where.items() if getattr(self, name) == value)
        every = self.statistics.union(*more)
        if every != self.statistics:
            object.__setattr__(self, "statistics", every)  # set once on this frozen object

    @property
    def by_score(self) -> bool:
        """Return whether each head keeps its `layer_budget` entries with the highest `score`."""
        kind = type(self)
        return kind.score is not Policy.score and kind.compress_layer is Policy.compress_layer

    @property
    def uniform(self) -> bool:
        """Return whether every head of every layer keeps the same number of entries."""
        return type(self).layer_budget is Policy.layer_budget

    def protected(self, k: int) -> int:
        """Return the number of entries that are kept whatever their scores are; at most half of ``k``."""
        return 0

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        """Return the score of each entry of a layer: [Hkv, n] fp32, or [1, n] for one set in all heads.

        index: the layer's number. k: number of entries that will be kept. length: number of tokens read so far. seed:
        of this example. Protected entries have the score +inf.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score entries")

    def score_basis(self, k: int) -> Hashable:
        """Return what the scores depend on of ``k``: where two are equal, the scores are, and are computed once."""
        return k

    def keep(self, k: int) -> int:
        """Return the number of entries that are kept if ``k`` are allowed."""
        return k

    def layer_budget(self, k: int, index: int, layers: int, n: int) -> int:
        """Return the number of entries that layer ``index`` of ``layers`` evictable layers keeps; the mean is ``k``.

        n: entries of the fullest of these layers.
        """
        return k

    def layer_budgets(self, layers: Sequence[Layer], k: int, length: int) -> list[int]:
        """Return the number of entries that each of the evictable ``layers`` keeps; the mean is ``k``.

        length: number of tokens read so far.
        """
        n = max((int(layer.n) for layer in layers), default=0)
        return [self.layer_budget(k, rank, len(layers), n) for rank in range(len(layers))]

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the state with ``k`` entries per KV head on average; a state with ``k`` entries or fewer is unchanged.

        keep_last: keep the newest entry in every head, because the last token will be read again. Raises
        UserError if a statistic that the policy reads was not maintained.
        """
        return self._thinned(state, k, lambda *layer: self.compress_layer(*layer, seed, keep_last))

    def hold(self, state: CacheState, k: int) -> CacheState:
        """Return the result of `compress` for a policy that acts each step, and allow the state's storage to be reused.

        If each head has one entry too many, the entry is removed in place (see `LayerCache.drop`) instead of copying
        all others. Neither the state nor any state that it grew from since the last `hold` may be used again.
        """
        if type(self).compress is not Policy.compress:
            return self.compress(state, k)
        return self._thinned(state, k, self._one_less)

    def due(self, state: CacheState, k: int) -> bool:
        """Return whether `hold` would evict."""
        return state.entries > self.keep(k)

    def growth(self, tokens: int) -> int:
        """Return how many entries a cache may hold beyond its budget while ``tokens`` more are read."""
        return 0 if self.acts_each_step else tokens

    def _thinned(self, state: CacheState, k: int, thin: Callable[[Layer, int, int, int], Layer]) -> CacheState:
        """Return the state after ``thin(layer, index, K, length)`` for each layer that holds more than its budget."""
        k = self.keep(k)
        evictable = [number for number, layer in enumerate(state.layers) if layer.window is None]
        compressed = list(state.layers)
        for layer in state.evictable:
            self._require_statistics(layer)
        budgets = self.layer_budgets(state.evictable, k, state.length)
        for number, budget in zip(evictable, budgets, strict=True):
            layer = state.layers[number]
            if layer.n > budget:
                length = on_device_of(layer, state.length)
                compressed[number] = thin(layer, number, budget, length)
        return replace(state, layers=tuple(compressed))

    def _one_less(self, layer: Layer, index: int, k: int, length: int) -> Layer:
        if not self.by_score or type(layer) is not LayerCache or isinstance(layer.keys, Packed) or layer.n != k + 1:
            return self.compress_layer(layer, index, k, length, 0, False)
        return layer.drop(lowest(self.score(layer, index, k, length, 0)).expand(*layer.positions.shape[:-1], -1))

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        """Return the layer with its ``k`` best entries in each KV head."""
        score = self.score(layer, index, k, length, seed)
        if keep_last:
            score = score.clone()
            score[..., -1] = torch.inf
        return layer.select(top(score, k).expand(*layer.positions.shape[:-1], -1))

    def record(self, state: CacheState, k: int, *, keep_last: bool = False) -> dict[str, float | None]:
        """Return facts to record about ``compress`` with these arguments, beside the footprint."""
        return {}

    def watch(self, seed: int, pace: tuple[int, int] | None = None) -> Watcher | None:
        """Return an observer of the steps of an answer, for a policy that acts before their attention.

        seed: of the answer. pace: how often another policy acted on the same prompt, and in how many steps.
        """
        return None

    def _require_statistics(self, layer: Layer) -> None:
        for part in layer.parts:
            if missing := sorted(name for name in self.statistics if getattr(part, name) is None):
                raise UserError(
                    f"the policy {type(self).__module__.rpartition('.')[2]} reads {', '.join(missing)}, "
                    "which this cache does not have; read the prompt again with these statistics"
                )


def on_device_of(layer: Layer, number: int | Tensor) -> int | Tensor:
    """Return a number, or the numbers of a batch on the device of the layer, since a large model lies on several
    devices.
    """
    return number.to(layer.parts[0].positions.device) if isinstance(number, Tensor) else number


def top(score: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` highest scores [..., n] -> [..., k], rising; ties go to the lower index."""
    n = score.shape[-1]
    if k == n - 1:  # the usual case at a decode step: only the last of the lowest entries is evicted
        rest = torch.arange(k, device=score.device)
        return rest + (rest >= lowest(score))
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def lowest(score: Tensor) -> Tensor:
    """Return the index of the lowest score [..., n] -> [..., 1]; among equals the higher index, the one that `top`
    omits.
    """
    return score.shape[-1] - 1 - score.flip(-1).argmin(-1, keepdim=True)
