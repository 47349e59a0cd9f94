"""Entropy merging: where attention is diffuse, neighbours become one entry."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transition.cache.merge import merge
from kv_transition.cache.state import LayerCache
from kv_transition.errors import UserError
from kv_transition.policies._spans import EntropySpans, Plan


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

    def reduced(self, layer: LayerCache, plan: Plan) -> LayerCache:
        if layer.rotary is None:
            raise UserError(
                "the policy entropy_merge turns keys to one position before it averages them, and how this model "
                "rotates its keys is not known here; use entropy_drop, or another policy, for this model"
            )
        return merge(layer, plan.spans, count_bias=self.count_bias)
