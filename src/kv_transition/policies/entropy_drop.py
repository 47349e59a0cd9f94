"""Entropy dropping: the control of entropy merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kv_transition.cache.merge import members, outcome
from kv_transition.cache.state import LayerCache
from kv_transition.policies._spans import EntropySpans, Plan


@dataclass(frozen=True)
class EntropyDrop(EntropySpans):
    """Uses the spans of entropy_merge at the same footprint. Of each span it keeps only the entry that received most
    attention in its KV head (the first among equals), unchanged. The difference between the two policies is the effect
    of merging.

    Source: the study of entropy-guided merging, as its control.

    Cost: as entropy_merge, without the merging.
    """

    def reduced(self, layer: LayerCache, plan: Plan) -> LayerCache:
        device = layer.positions.device
        kept = outcome(layer.n, plan.spans).to(device).expand(*layer.positions.shape[:-1], -1).clone()
        if plan.spans:
            index, real = (tensor.to(device) for tensor in members(plan.spans))
            # -1: below any sum of attention
            best = layer.attn_sum[..., index].masked_fill(~real, -1).argmax(-1)
            slots = torch.searchsorted(kept[0].contiguous(), index[:, 0].contiguous())
            kept[..., slots] = index[:, 0] + best
        return layer.select(kept)
