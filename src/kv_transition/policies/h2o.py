"""H2O: recent entries, and the entries that received the most attention so far (heavy hitters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the newest entries and, of the others, those that received the largest sum of attention from all queries so
    far. The sums of kept entries grow with every token that is read or generated.

    Source: Zhang et al., "H2O: heavy-hitter oracle for efficient generative inference of large language models", arXiv
    2306.14048.

    Cost: the sums are maintained during the prefill, O(N^2) time in addition to the attention itself and O(N) memory;
    one choice is a sort, O(N log N).

    Differences: the query heads of a group share their entries, so the sum of a KV head is the mean over its query
    heads. kvpress has no equivalent: its ObservedAttention divides each sum by the number of queries that could see the
    entry, keeps no recent entries, and acts on the prompt only.
    """

    statistics = frozenset({"attn_sum"})
    acts_each_step = True

    recent_share: Annotated[float, (0, 1)] = 0.5
    """share of the budget that goes to the newest tokens, rounded down"""

    def protected(self, k: int) -> int:
        return int(k * self.recent_share)

    def score_basis(self, k: int) -> int:
        return self.protected(k)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        recent = layer.positions >= length - self.protected(k)
        return layer.attn_sum.masked_fill(recent, torch.inf)
