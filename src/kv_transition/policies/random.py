"""Random eviction: the lower reference for every policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class Random(Scored):
    """Keeps the entries with the highest random scores, which are uniform and drawn for each example, layer and KV
    head.

    Cost: O(N) time, no statistic.

    Differences: with a seed, kvpress' RandomPress draws the same pattern in every layer; without one it depends on the
    global generator.
    """

    draws: ClassVar[bool] = True
    per_head: bool = True
    """false: one draw for all heads and layers, as in the memory study's control"""

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        # Drawn on the CPU, so that the choice does not depend on the device.
        generator = torch.Generator().manual_seed(seed * 10_007 + (index + 1 if self.per_head else 0))
        rows = layer.positions.shape[-2] if self.per_head else 1
        return torch.rand(rows, layer.n, generator=generator).to(layer.positions.device)
