"""Key norm: entries with small keys, which receive most attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class KNorm(Scored):
    """Keeps the entries whose keys have the smallest Euclidean norm.

    Source: Devoto et al., "A simple and effective L2 norm-based strategy for KV cache compression", arXiv 2406.11430.

    Cost: O(N d) time, no statistic.

    Differences: every layer is compressed; the paper leaves the first two layers alone.
    """

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        return -layer.keys.float().norm(dim=-1)
