"""Entropy merging: where attention is diffuse, neighbouring entries are merged into one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from kv_transition.cache.merge import merge
from kv_transition.cache.state import Layer, LayerCache
from kv_transition.errors import UserError
from kv_transition.policies._spans import EntropySpans, Plan
from kv_transition.policies.entropy_drop import EntropyDrop


@dataclass(frozen=True)
class EntropyMerge(EntropySpans):
    """Merges each chosen span into one entry in each KV head. The new value is the mean of the span's values, and the
    new key the mean of its un-rotated keys, both weighted by the attention received so far. The new key is rotated to
    the weighted mean of the positions.

    Source: the study of entropy-guided merging.

    Cost: sums and entropies of attention during the prefill, O(N^2) time in addition to the attention itself and O(N)
    memory; one choice sorts N / max_span spans, and merging takes O(N d).
    """

    count_bias: bool = False
    """true: the log of the number of tokens that were merged into an entry is added to its attention logit"""
    average: Literal["both", "keys", "values"] = "both"
    """what is averaged; the other part, key or value, is taken from the entry of the span with the most attention"""
    first_layer: Annotated[int, (0, None)] = 0
    """first layer that merges; the layers before it keep the entry with the most attention of each span, as
    entropy_drop"""
    last_layer: Annotated[int | None, (0, None)] = None
    """last layer that merges; null: the model's last"""

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        inside = self.first_layer <= index and (self.last_layer is None or index <= self.last_layer)
        policy = super() if inside else self._dropping()
        return policy.compress_layer(layer, index, k, length, seed, keep_last)

    def reduced(self, layer: LayerCache, plan: Plan) -> LayerCache:
        if layer.rotary is None:
            raise UserError(
                "the policy entropy_merge rotates keys to one position before it averages them, but the rotary "
                "embedding of this model is not known; use entropy_drop, or another policy, for this model"
            )
        averaged = {part: self.average in ("both", part) for part in ("keys", "values")}
        return merge(layer, plan.spans, count_bias=self.count_bias, **averaged)

    def _dropping(self) -> EntropyDrop:
        """Return the policy entropy_drop with the same spans."""
        return EntropyDrop(**{field.name: getattr(self, field.name) for field in fields(EntropySpans)})
