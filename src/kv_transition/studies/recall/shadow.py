"""Shadows: predictions of the entries that a policy would hold, beside a cache from which nothing is evicted.

Sets are masks [R, n] over the n entries before a step: one row with granularity ``global``, one row for each KV head of
each layer with ``per_head``. Sliding-window layers, which are never evicted, are not included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from kv_transition.budget import Budget
from kv_transition.cache.state import CacheState, Layer, LayerCache, SplitLayer
from kv_transition.policies._allocation import by_head
from kv_transition.policies.base import Policy
from kv_transition.policies.streaming_llm import StreamingLLM

GRANULARITIES = ("global", "per_head")
MEMORIES = ("ideal", "irreversible")
ORACLE = "oracle"

_NOT_OF_A_POSITION = ("random", "tova")
"""kinds whose score is drawn separately in each head, or defined for a whole layer"""

Sets = dict[tuple[str, str], Tensor]
"""(granularity, memory) -> mask [R, n]"""


def has_global_score(policy: Policy, kind: str) -> bool:
    """Return whether the policy's scores can be averaged over layers and heads."""
    return policy.by_score and policy.uniform and kind not in _NOT_OF_A_POSITION


def as_rows(layers: Sequence[Tensor], granularity: str) -> Tensor:
    """Return [R, n] from [Hkv, n] of each evictable layer; global: the mean over all layers and KV heads, fp64."""
    device = layers[0].device
    rows = torch.cat([layer.to(device) for layer in layers])
    return rows.mean(0, keepdim=True, dtype=torch.float64) if granularity == "global" else rows


def best(score: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` highest of each row [R, n], ties to the lower index, as `policies.base.top` does."""
    n = score.shape[-1]
    if k >= n or k <= 0:
        return torch.full_like(score, k > 0, dtype=torch.bool)
    least = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, score == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def without_lowest(score: Tensor, held: Tensor) -> Tensor:
    """Return the mask of the held entries [R, n] without the lowest of each row; the higher index in a tie."""
    of_held = score.masked_fill(~held, torch.inf)
    return held.scatter(-1, score.shape[-1] - 1 - of_held.flip(-1).argmin(-1, keepdim=True), False)


def ranks(score: Tensor) -> Tensor:
    """Return the rank of each entry, [R, n] int64: 0 for the highest of a row, ties to the lower index."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def held_by(state: CacheState, n: int) -> Tensor:
    """Return the mask [R, n] of the entries that the KV heads of a compressed state hold."""
    rows = []
    for layer in state.evictable:
        for part in layer.parts:
            mask = torch.zeros(part.positions.shape[0], n, dtype=torch.bool, device=part.positions.device)
            rows.append(mask.scatter_(-1, part.positions, True))
    return torch.cat([row.to(rows[0].device) for row in rows])


def thinned(state: CacheState, mask: Tensor) -> CacheState:
    """Return a full state with only the entries of a mask [R, n]; R is 1, or the number of KV heads of all evictable
    layers.
    """
    layers, first = [], 0
    for layer in state.layers:
        if layer.window is not None:
            layers.append(layer)
            continue
        heads = layer.positions.shape[0]
        own = mask.expand(heads, -1) if len(mask) == 1 else mask[first : first + heads]
        layers.append(_chosen(layer, own.to(layer.positions.device)))
        first += heads
    return CacheState(tuple(layers), state.length, state.logits, state.shift)


def _chosen(layer: LayerCache, mask: Tensor) -> Layer:
    counts = mask.sum(-1).tolist()
    if len(set(counts)) == 1:
        return layer.select(mask.nonzero()[:, 1].view(len(counts), counts[0]))
    heads = zip(by_head(layer), mask, strict=True)
    return SplitLayer(tuple(head.select(row.nonzero().T) for head, row in heads))


@dataclass
class Shadow:
    """The shadow of one policy under one budget. Call `begin` at the end of the prompt, and `predict` before each
    token.
    """

    name: str
    policy: Policy
    budget: Budget
    granularities: tuple[str, ...]
    memories: tuple[str, ...]
    seed: int = 0

    def begin(self, prompt: CacheState) -> None:
        """Start after the prompt. prompt: its full state. Raises UserError if it lacks a statistic that the policy
        reads.
        """
        for layer in prompt.evictable:
            self.policy._require_statistics(layer)

    def predict(self, state: CacheState) -> Sets:
        """Return the sets held before the next token is read; ``state`` is the full state."""
        raise NotImplementedError

    def _k(self, n: int) -> int:
        return self.policy.keep(self.budget.kept(n))

    def _budgets(self, k: int, n: int, layers: int) -> list[int]:
        return [self.policy.layer_budget(k, rank, layers, n) for rank in range(layers)]

    def _scores(self, state: CacheState, budgets: Sequence[int]) -> list[Tensor]:
        """Return the policy's scores of each evictable layer, [Hkv, n]."""
        numbers = [i for i, layer in enumerate(state.layers) if layer.window is None]
        scores = []
        for number, k in zip(numbers, budgets, strict=True):
            layer = state.layers[number]
            score = self.policy.score(layer, number, k, state.length, self.seed)
            scores.append(score.expand(layer.positions.shape))
        return scores

    def _in_all(self, masks: dict[str, Tensor]) -> Sets:
        """Return the same sets for every memory."""
        return {(granularity, memory): mask for granularity, mask in masks.items() for memory in self.memories}


@dataclass
class Once(Shadow):
    """The shadow of a policy that acts once, on the prompt, with the scores at the end of the prompt.

    Generated entries are held. If more entries are held than the budget allows, the prompt's entries with the lowest
    scores are dropped first. The policy never recalls an entry, so both memories have the same sets.
    """

    _ranks: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def begin(self, prompt: CacheState) -> None:
        super().begin(prompt)
        self._n, self._layers = prompt.length, len(prompt.evictable)
        self._heads = [layer.positions.shape[0] for layer in prompt.evictable]
        scores = self._scores(prompt, self._budgets(self._k(self._n), self._n, self._layers))
        self._ranks = {g: ranks(as_rows(scores, g)) for g in self.granularities}

    def predict(self, state: CacheState) -> Sets:
        k, generated = self._k(state.length), state.length - self._n
        held = {g: rank < self._limit(k - generated, rank) for g, rank in self._ranks.items()}
        return self._in_all({g: _with_generated(mask, k, generated) for g, mask in held.items()})

    def _limit(self, m: int, rank: Tensor) -> int | Tensor:
        """Return how many of the prompt's entries each row keeps when it is ``m`` on average."""
        if m <= 0 or len(rank) == 1:
            return m
        budgets = self._budgets(m, self._n, self._layers)
        if len(set(budgets)) == 1:
            return budgets[0]
        each = [k for k, heads in zip(budgets, self._heads, strict=True) for _ in range(heads)]
        return torch.tensor(each, device=rank.device)[:, None]


@dataclass
class Reduced(Shadow):
    """The shadow of a policy that acts once and selects by more than a score.

    As `Once`, but it selects again for each remaining number of the prompt's entries.
    """

    _last: tuple[int, Tensor] | None = field(default=None, repr=False)

    def begin(self, prompt: CacheState) -> None:
        super().begin(prompt)
        self._prompt, self._last = prompt, None

    def predict(self, state: CacheState) -> Sets:
        k, n = self.budget.kept(state.length), self._prompt.length
        generated = state.length - n
        m = max(k - generated, 0)
        if self._last is None or self._last[0] != m:
            kept = self.policy.compress(self._prompt, m, seed=self.seed) if m else None
            self._last = m, self._nothing() if kept is None else held_by(kept, n)
        return self._in_all({"per_head": _with_generated(self._last[1], k, generated)})

    def _nothing(self) -> Tensor:
        layers = self._prompt.evictable
        rows, device = sum(len(layer.positions) for layer in layers), layers[0].positions.device
        return torch.zeros(rows, self._prompt.length, dtype=torch.bool, device=device)


@dataclass
class EachStep(Shadow):
    """The shadow of a policy that acts at each step, by scores of the full cache.

    ``ideal`` keeps the best of all entries. ``irreversible`` keeps the best of the new entry and the entries kept at
    the previous step, because an evicted entry has no score.
    """

    _held: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _k_held: int = 0

    def begin(self, prompt: CacheState) -> None:
        super().begin(prompt)
        self._held, self._k_held = {}, 0

    def predict(self, state: CacheState) -> Sets:
        n, layers = state.length, len(state.evictable)
        budgets = self._budgets(self._k(n), n, layers)
        return self._kept(self._scores(state, budgets), budgets)

    def _kept(self, scores: list[Tensor], budgets: list[int]) -> Sets:
        """Return the sets by scores [Hkv, n] of each layer."""
        sets: Sets = {}
        for granularity in self.granularities:
            rows = as_rows(scores, granularity)
            if "ideal" in self.memories:
                sets[granularity, "ideal"] = self._best(rows, budgets, scores)
            if "irreversible" in self.memories:
                held = self._held.get(granularity)
                kept = self._best(rows, budgets, scores) if held is None else self._cut(rows, held, budgets, scores)
                sets[granularity, "irreversible"] = self._held[granularity] = kept
        self._k_held = budgets[0]
        return sets

    def _cut(self, rows: Tensor, held: Tensor, budgets: list[int], scores: list[Tensor]) -> Tensor:
        """Return the mask of the entries that are kept, of the held entries and those added since."""
        new = rows.shape[-1] - held.shape[-1]
        grown = functional.pad(held, (0, new), value=True)
        k = budgets[0]
        if k == self._k_held and new == 1 and len(set(budgets)) == 1:
            return without_lowest(rows, grown)
        return self._best(rows.masked_fill(~grown, -torch.inf), budgets, scores) & grown

    @staticmethod
    def _best(rows: Tensor, budgets: list[int], scores: list[Tensor]) -> Tensor:
        if len(set(budgets)) == 1 or len(rows) == 1:
            return best(rows, budgets[0])
        of_layers = rows.split([len(score) for score in scores])
        return torch.cat([best(own, k) for own, k in zip(of_layers, budgets, strict=True)])


@dataclass
class Ends(EachStep):
    """The shadow of StreamingLLM, which holds the first and the newest entries, equal in all heads."""

    def predict(self, state: CacheState) -> Sets:
        n, layers = state.length, state.evictable
        k, held = self._k(n), self._held.get("row")
        everything = torch.ones(1, n, dtype=torch.bool, device=layers[0].positions.device)
        ideal = self._of(everything, k)
        kept = ideal if held is None else self._of(functional.pad(held, (0, n - held.shape[-1]), value=True), k)
        self._held["row"] = kept
        heads = sum(len(layer.positions) for layer in layers)
        rows = {"global": 1, "per_head": heads}
        found = {"ideal": ideal, "irreversible": kept}
        return {(g, m): found[m].expand(rows[g], n) for g in self.granularities for m in self.memories}

    def _of(self, there: Tensor, k: int) -> Tensor:
        """Return the mask [1, n] of the entries that are kept, of the available entries ``there``."""
        first = torch.zeros_like(there)
        first[:, : self.policy.protected(k)] = there[:, : self.policy.protected(k)]
        others = there & ~first
        newer = others.flip(-1).cumsum(-1).flip(-1)
        return first | (others & (newer <= k - first.sum(-1, keepdim=True)))


@dataclass
class Oracle(EachStep):
    """The upper bound, whose scores are the attention of the step itself."""

    def predict(self, state: CacheState) -> Sets:
        return {}

    def hindsight(self, attention: list[Tensor]) -> Sets:
        """Return the sets by the ``attention`` [Hkv, n] of the step in each evictable layer."""
        return self._kept(attention, [self._k(attention[0].shape[-1])] * len(attention))


def _with_generated(prompt: Tensor, k: int, generated: int) -> Tensor:
    """Return [R, N + generated]: held entries of the prompt [R, N] and the newest generated ones, at most ``k``."""
    mask = functional.pad(prompt, (0, generated), value=True)
    if generated > k:
        mask[:, : mask.shape[-1] - k] = False
    return mask


def shadow(
    name: str,
    kind: str,
    policy: Policy | None,
    budget: Budget,
    granularities: Sequence[str],
    memories: Sequence[str],
    seed: int = 0,
) -> Shadow | None:
    """Return the shadow of a policy (None: of the oracle) at the granularities that it supports; None if it supports
    none.
    """
    if policy is None:
        return Oracle(name, Policy(), budget, tuple(granularities), tuple(memories), seed)
    fitting = tuple(g for g in granularities if g == "per_head" or has_global_score(policy, kind))
    if not fitting:
        return None
    if policy.by_score:
        form = EachStep if policy.acts_each_step else Once
        form = Ends if type(policy).score is StreamingLLM.score else form
    elif not policy.acts_each_step:
        form = Reduced
    else:
        raise ValueError(f"{kind} acts at each step and selects by more than a score, so it has no shadow")
    return form(name, policy, budget, fitting, tuple(memories), seed)
