"""TOVA: entries that the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_transition.attention.blocks import window_sums
from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps the entries that the last query attends to most, mean over all heads of the layer, so that all heads keep
    the same entries. The last token itself always stays.

    Source: Oren et al., "Transformers are multi-state RNNs", arXiv 2401.06104.

    Cost: the attention of one query to all entries at each step, O(N d) time and O(N) memory.

    Differences: kvpress acts on the prompt only, and scales by 1 / sqrt(d) whatever the model's own scale is.
    """

    statistics = frozenset({"recent_queries"})
    acts_each_step = True

    def protected(self, k: int) -> int:
        return min(1, k // 2)

    def score_basis(self, k: int) -> None:
        return None

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        last = length - 1 + torch.arange(1, device=layer.positions.device)
        queries = layer.recent_queries[..., -1:, :]
        at = last.view(*last.shape[:-2], 1)  # [1], or [B, 1]
        attention = window_sums(queries, at, layer.keys, layer.positions, layer.scale, bias=layer.bias)
        # Every head holds the same entries, since one set has always been chosen for the whole layer.
        return attention.mean(-2, keepdim=True).masked_fill(layer.positions[..., :1, :] == last, torch.inf)
