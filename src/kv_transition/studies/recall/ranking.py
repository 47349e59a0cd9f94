"""Rankings of the entries by score, and the sets of the best entries.

Scores are rows [R, n]: one row with granularity ``global``, one row for each KV head of each evictable layer with
``per_head``. Several budgets, memories and shadows read one ranking, so whatever they share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kv_transition.cache.state import CacheState
from kv_transition.policies.base import Policy


def as_rows(layers: Sequence[Tensor], granularity: str) -> Tensor:
    """Return [R, n] from [Hkv, n] of each evictable layer; global: the mean over all layers and KV heads, fp64."""
    device = layers[0].device
    rows = torch.cat([layer.to(device) for layer in layers])
    return rows.mean(0, keepdim=True, dtype=torch.float64) if granularity == "global" else rows


def mask_of(relation: Callable[..., Tensor], x: Tensor, bound: Tensor | int) -> Tensor:
    """Return ``relation(x, bound)``, for example with `torch.ge`, as a mask [R, n]."""
    # torch uses vector instructions of a CPU only where the result has the type of the operands
    return relation(x, bound, out=torch.empty_like(x)).bool()


class Ranking:
    """Scores [R, n] of n entries; in each row the highest comes first, and in a tie the lower index."""

    def __init__(self, score: Tensor, several: bool = True):
        """Set up the ranking. several: whether sets of several sizes are likely to be asked for, which one sort serves;
        it changes no result.
        """
        self.score = score
        self._several = several
        self._best: dict[int, Tensor] = {}

    def best(self, k: int) -> Tensor:
        """Return the mask [R, n] of the first ``k`` entries of each row, the same tensor for the same ``k``.

        The entries are those that `policies.base.top` chooses.
        """
        if k not in self._best:
            self._best[k] = self._first(k)
        return self._best[k]

    def _first(self, k: int) -> Tensor:
        n = self.score.shape[-1]
        if k >= n or k <= 0:
            return torch.full_like(self.score, k > 0, dtype=torch.bool)
        least = self._rising(n - k)[:, n - k, None]
        held = mask_of(torch.ge, self.score, least)
        if bool((held.sum(-1, dtype=torch.int32) == k).all()):
            return held
        # more entries have the least score than there are places for
        above, equal = self.score > least, self.score == least
        return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))

    def _rising(self, place: int) -> Tensor:
        """Return the scores of each row in rising order, or at least so that the one at ``place`` stands there."""
        if self._several or self.score.device.type != "cpu":
            return self._sorted
        return torch.from_numpy(np.partition(self.score.numpy(), place, axis=-1))

    @cached_property
    def _sorted(self) -> Tensor:
        if self.score.device.type != "cpu":
            return self.score.sort(dim=-1).values
        # NumPy sorts values with vector instructions, which takes a fifth of the time of torch's sort on a CPU
        return torch.from_numpy(np.sort(self.score.numpy(), axis=-1))

    @cached_property
    def places(self) -> Tensor:
        """The place of each entry in its row, [R, n] int32: 0 for the first."""
        order = self.score.sort(dim=-1, descending=True, stable=True).indices
        places = torch.arange(self.score.shape[-1], device=self.score.device, dtype=torch.int32).expand_as(order)
        return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, places)


def without_lowest(score: Tensor, held: Tensor) -> Tensor:
    """Return the mask of the held entries [R, n] without the lowest of each row; the higher index in a tie."""
    # -inf where an entry is held, else +inf; on a CPU faster than a masked copy, and than argmin
    outside = (0.5 - held.view(torch.uint8).to(score.dtype)) * torch.inf
    of_held = torch.maximum(score, outside)
    lowest = mask_of(torch.eq, of_held, of_held.amin(-1, keepdim=True))
    index = torch.arange(score.shape[-1], dtype=torch.int32, device=score.device)
    last = (lowest.view(torch.uint8) * index).amax(-1, keepdim=True)
    return held.scatter(-1, last.long(), False)


class Scores:
    """The scores of one state. Each is computed once, although every budget of a policy has a shadow of its own."""

    def __init__(self, state: CacheState):
        self.state = state
        self._layers: dict[tuple, list[Tensor]] = {}
        self._rankings: dict[tuple, Ranking] = {}

    def ranking(self, policy: Policy, budgets: Sequence[int], seed: int, granularity: str) -> Ranking:
        """Return the ranking by the policy's scores when each evictable layer keeps its number of ``budgets``."""
        key = (id(policy), seed, *map(policy.score_basis, budgets))
        if (key, granularity) not in self._rankings:
            if key not in self._layers:
                self._layers[key] = self._scores(policy, budgets, seed)
            # policies whose scores do not depend on the budget have the same ranking under all budgets
            several = all(policy.score_basis(k) == policy.score_basis(k // 2) for k in budgets)
            self._rankings[key, granularity] = Ranking(as_rows(self._layers[key], granularity), several)
        return self._rankings[key, granularity]

    def _scores(self, policy: Policy, budgets: Sequence[int], seed: int) -> list[Tensor]:
        """Return the scores of each evictable layer, [Hkv, n]."""
        numbers = [i for i, layer in enumerate(self.state.layers) if layer.window is None]
        scores = []
        for number, k in zip(numbers, budgets, strict=True):
            layer = self.state.layers[number]
            score = policy.score(layer, number, k, self.state.length, seed)
            scores.append(score.expand(layer.positions.shape))
        return scores
