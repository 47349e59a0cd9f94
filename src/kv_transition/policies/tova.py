"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_transition.attention.blocks import window_sums
from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Oren et al., "Transformers are multi-state RNNs" (arXiv 2401.06104): one set per layer, averaged over its heads.

    The last token itself always stays.
    """

    acts_each_step = True

    def protected(self, k: int) -> int:
        return min(1, k // 2)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        last = torch.tensor([length - 1], device=layer.keys.device)
        attention = window_sums(layer.recent_queries[:, -1:], last, layer.keys, layer.positions, layer.scale)
        # Every head holds the same entries, since one set has always been chosen for the whole layer.
        return attention.mean(0, keepdim=True).masked_fill(layer.positions[:1] == last, torch.inf)
