"""Ada-KV: the heads of a layer share its budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from kv_transition.cache.state import Layer, LayerCache, SplitLayer
from kv_transition.policies.base import top
from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, but one choice for all KV heads of a layer: its K Hkv entries are the best of all heads
    together, once each head has its window and at least ``floor`` K entries of its own. Heads then hold different
    numbers of entries, and what a head does not hold is really freed.

    Equal scores go to the lower position, and among equal positions to the lower head.

    Source: Feng et al., "Ada-KV: optimizing KV cache eviction by adaptive budget allocation for efficient LLM
    inference", arXiv 2407.11550.

    Cost: as snapkv, and a sort of all heads' scores; decoding attends head by head.

    Differences: as snapkv; and kvpress' AdaKVPress masks what it evicts rather than freeing it.
    """

    floor: Annotated[float, (0, 1)] = 0.2
    """share of the mean budget that each head keeps for itself, rounded down but at least one entry"""

    def compress_layer(self, layer: Layer, index: int, k: int, length: int, seed: int, keep_last: bool) -> Layer:
        heads = [head for part in layer.parts for head in by_head(part)]
        safe = max(1, int(self.floor * k))
        scores = []
        for head in heads:
            score = self.score(head, index, k, length, seed)[0]
            if keep_last:
                score[-1] = torch.inf
            score[top(score, min(safe, head.n))] = torch.inf
            scores.append(score)
        pooled = torch.cat(scores)
        # by position, then by head: so that ties go to the lower position
        order = torch.cat([head.positions[0] for head in heads]).sort(stable=True).indices
        chosen = torch.zeros_like(pooled, dtype=torch.bool)
        chosen[order[top(pooled[order], k * len(heads))]] = True
        kept = chosen.split([head.n for head in heads])
        return SplitLayer(tuple(head.select(mine.nonzero().T) for head, mine in zip(heads, kept, strict=True)))


def by_head(layer: LayerCache) -> list[LayerCache]:
    """The KV heads of one sequence's layer, each a layer of its own with the query heads of its group."""
    heads = layer.positions.shape[0]
    of_kv_heads = ("keys", "values", "positions", "attn_sum", "query_entropy", "angles", "bias")
    of_query_heads = ("recent_queries", "query_mean", "query_cov")
    pieces = {
        name: tensor.chunk(heads)
        for name in (*of_kv_heads, *of_query_heads)
        if (tensor := getattr(layer, name)) is not None
    }
    return [replace(layer, room=None, **{name: own[i] for name, own in pieces.items()}) for i in range(heads)]
