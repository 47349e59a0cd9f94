"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Xiao et al., "Efficient streaming language models with attention sinks" (arXiv 2309.17453).

    Keys keep their original rotation; the paper re-rotates them to their place in the cache.

    n_sink: first tokens of the text that are never evicted. recent: newest tokens kept; None: the rest of the budget.
    """

    acts_each_step = True

    n_sink: Annotated[int, (0, None)] = 4
    recent: Annotated[int | None, (1, None)] = None

    def protected(self, k: int) -> int:
        return min(self.n_sink, k // 2)

    def keep(self, k: int) -> int:
        return k if self.recent is None else min(k, self.protected(k) + self.recent)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        sinks = layer.positions < self.protected(k)
        return layer.positions.to(torch.float64).masked_fill(sinks, torch.inf)
