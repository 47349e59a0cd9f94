"""H2O: heavy hitters, the entries that received the most attention so far, and recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Zhang et al., "H2O: heavy-hitter oracle" (arXiv 2306.14048), through decoding: sums grow with every query.

    recent_share: share of the budget that goes to the newest tokens, rounded down.
    """

    statistics = frozenset({"attn_sum"})
    acts_each_step = True

    recent_share: Annotated[float, (0, 1)] = 0.5

    def protected(self, k: int) -> int:
        return int(k * self.recent_share)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        recent = layer.positions >= length - self.protected(k)
        return layer.attn_sum.masked_fill(recent, torch.inf)
