"""Entropy merging: where attention is diffuse, neighbours become one entry."""

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
    """Each chosen span becomes one entry in each KV head: the mean, weighted by the attention received so far, of its
    values and of its un-rotated keys, the new key rotated to the weighted mean of the positions.

    Source: the study of entropy-guided merging.

    Cost: the sums and entropies of attention while reading, O(N^2) time beside the attention itself and O(N) memory; a
    choice is a sort of N / max_span spans, merging is O(N d).
    """

    count_bias: bool = False
    """true: the log of the number of tokens that an entry stands for is added to its attention logit"""
    average: Literal["both", "keys", "values"] = "both"
    """what is averaged; the other one, key or value, is that of the span's most attended entry"""
    first_layer: Annotated[int, (0, None)] = 0
    """first layer that merges; the layers before it keep of each span the most attended entry, as entropy_drop"""
    last_layer: Annotated[int | None, (0, None)] = None
    """last layer that merges; null: the model's last"""

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        inside = self.first_layer <= index and (self.last_layer is None or index <= self.last_layer)
        policy = super() if inside else self._dropping()
        return policy.compress_layer(layer, index, k, length, seed, keep_last)

    def reduced(self, layer: LayerCache, plan: Plan) -> LayerCache:
        if layer.rotary is None:
            raise UserError(
                "the policy entropy_merge turns keys to one position before it averages them, and how this model "
                "rotates its keys is not known here; use entropy_drop, or another policy, for this model"
            )
        averaged = {part: self.average in ("both", part) for part in ("keys", "values")}
        return merge(layer, plan.spans, count_bias=self.count_bias, **averaged)

    def _dropping(self) -> EntropyDrop:
        """Return the policy that drops what this one merges."""
        return EntropyDrop(**{field.name: getattr(self, field.name) for field in fields(EntropySpans)})
