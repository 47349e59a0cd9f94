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
from kv_transition.studies.recall.ranking import Ranking, Scores, mask_of, without_lowest

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
    token. Both receive the scores of the full state, which all shadows share.
    """

    name: str
    policy: Policy
    budget: Budget
    granularities: tuple[str, ...]
    memories: tuple[str, ...]
    seed: int = 0

    def begin(self, prompt: Scores) -> None:
        """Start after the prompt. Raises UserError if its state lacks a statistic that the policy reads."""
        for layer in prompt.state.evictable:
            self.policy._require_statistics(layer)

    def predict(self, scores: Scores) -> Sets:
        """Return the sets held before the next token is read. Sets that agree may be the same tensor."""
        raise NotImplementedError

    def _k(self, n: int) -> int:
        return self.policy.keep(self.budget.kept(n))

    def _budgets(self, k: int, n: int, layers: int) -> list[int]:
        return [self.policy.layer_budget(k, rank, layers, n) for rank in range(layers)]

    def _rankings(self, scores: Scores, budgets: Sequence[int]) -> dict[str, Ranking]:
        """Return the ranking by the policy's scores at each granularity."""
        return {g: scores.ranking(self.policy, budgets, self.seed, g) for g in self.granularities}

    def _in_all(self, masks: dict[str, Tensor]) -> Sets:
        """Return the same sets for every memory."""
        return {(granularity, memory): mask for granularity, mask in masks.items() for memory in self.memories}


@dataclass
class Once(Shadow):
    """The shadow of a policy that acts once, on the prompt, with the scores at the end of the prompt.

    Generated entries are held. If more entries are held than the budget allows, the prompt's entries with the lowest
    scores are dropped first. The policy never recalls an entry, so both memories have the same sets.
    """

    _places: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def begin(self, prompt: Scores) -> None:
        super().begin(prompt)
        layers = prompt.state.evictable
        self._n, self._layers = prompt.state.length, len(layers)
        self._heads = [layer.positions.shape[0] for layer in layers]
        rankings = self._rankings(prompt, self._budgets(self._k(self._n), self._n, self._layers))
        self._places = {g: ranking.places for g, ranking in rankings.items()}

    def predict(self, scores: Scores) -> Sets:
        length = scores.state.length
        k, generated = self._k(length), length - self._n
        held = {g: mask_of(torch.lt, places, self._limit(k - generated, places)) for g, places in self._places.items()}
        return self._in_all({g: _with_generated(mask, k, generated) for g, mask in held.items()})

    def _limit(self, m: int, places: Tensor) -> int | Tensor:
        """Return how many of the prompt's entries each row keeps when it is ``m`` on average."""
        if m <= 0 or len(places) == 1:
            return m
        budgets = self._budgets(m, self._n, self._layers)
        if len(set(budgets)) == 1:
            return budgets[0]
        each = [k for k, heads in zip(budgets, self._heads, strict=True) for _ in range(heads)]
        return torch.tensor(each, dtype=places.dtype, device=places.device)[:, None]


@dataclass
class Reduced(Shadow):
    """The shadow of a policy that acts once and selects by more than a score.

    As `Once`, but it selects again for each remaining number of the prompt's entries.
    """

    _last: tuple[int, Tensor] | None = field(default=None, repr=False)

    def begin(self, prompt: Scores) -> None:
        super().begin(prompt)
        self._prompt, self._last = prompt.state, None

    def predict(self, scores: Scores) -> Sets:
        length = scores.state.length
        k, n = self.budget.kept(length), self._prompt.length
        generated = length - n
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
    _k_held: int | None = None
    """size of the held sets, if it is the same in all layers"""

    def begin(self, prompt: Scores) -> None:
        super().begin(prompt)
        self._held, self._k_held = {}, None

    def predict(self, scores: Scores) -> Sets:
        budgets = self._budgets(self._k(scores.state.length), scores.state.length, len(scores.state.evictable))
        heads = [len(layer.positions) for layer in scores.state.evictable]
        return self._kept(self._rankings(scores, budgets), budgets, heads)

    def _kept(self, rankings: dict[str, Ranking], budgets: list[int], heads: list[int]) -> Sets:
        """Return the sets by the ranking at each granularity; ``budgets`` and ``heads`` of each layer."""
        sets: Sets = {}
        for granularity, ranking in rankings.items():
            if "ideal" in self.memories:
                sets[granularity, "ideal"] = _best(ranking, budgets, heads)
            if "irreversible" in self.memories:
                held = self._held.get(granularity)
                kept = _best(ranking, budgets, heads) if held is None else self._cut(ranking, held, budgets, heads)
                sets[granularity, "irreversible"] = self._held[granularity] = kept
        self._k_held = budgets[0] if len(set(budgets)) == 1 else None
        return sets

    def _cut(self, ranking: Ranking, held: Tensor, budgets: list[int], heads: list[int]) -> Tensor:
        """Return the mask of the entries that are kept, of the held entries and those added since."""
        new = ranking.score.shape[-1] - held.shape[-1]
        grown = functional.pad(held, (0, new), value=True)
        if new == 1 and self._k_held is not None and len(set(budgets)) == 1:
            if budgets[0] == self._k_held + 1:
                return grown
            if budgets[0] == self._k_held:
                return without_lowest(ranking.score, grown)
        return _best(Ranking(ranking.score.masked_fill(~grown, -torch.inf)), budgets, heads) & grown


@dataclass
class Ends(EachStep):
    """The shadow of StreamingLLM, which holds the first and the newest entries, equal in all heads."""

    def predict(self, scores: Scores) -> Sets:
        n, layers = scores.state.length, scores.state.evictable
        k, held = self._k(n), self._held.get("row")
        there = torch.ones(1, n, dtype=torch.bool, device=layers[0].positions.device)
        ideal = kept = self._of(there, k)
        if held is not None:
            there = functional.pad(held, (0, n - held.shape[-1]), value=True)
            # all of the ideal set is held unless the number of sinks has changed
            kept = ideal if torch.equal(ideal & there, ideal) else self._of(there, k)
        self._held["row"] = kept
        sets: Sets = {}
        for granularity in self.granularities:
            rows = 1 if granularity == "global" else sum(len(layer.positions) for layer in layers)
            wide = {id(mask): mask.expand(rows, n) for mask in (ideal, kept)}
            found = {"ideal": wide[id(ideal)], "irreversible": wide[id(kept)]}
            sets |= {(granularity, memory): found[memory] for memory in self.memories}
        return sets

    def _of(self, there: Tensor, k: int) -> Tensor:
        """Return the mask [1, n] of the entries that are kept, of the available entries ``there``."""
        kept = there.clone()
        sinks = self.policy.protected(k)
        others = there[0, sinks:].nonzero()[:, 0]
        kept[0, sinks + others[: max(len(others) - k + int(there[0, :sinks].sum()), 0)]] = False
        return kept


@dataclass
class Oracle(EachStep):
    """The upper bound, whose scores are the attention of the step itself."""

    def predict(self, scores: Scores) -> Sets:
        return {}

    def hindsight(self, needed: dict[str, Ranking], heads: list[int]) -> Sets:
        """Return the sets by the attention of the step; ``heads`` of each layer."""
        rankings = {g: needed[g] for g in self.granularities}
        n = next(iter(rankings.values())).score.shape[-1]
        return self._kept(rankings, [self._k(n)] * len(heads), heads)


def _best(ranking: Ranking, budgets: list[int], heads: list[int]) -> Tensor:
    """Return the mask of the best entries, as many as the budget of each layer."""
    if len(set(budgets)) == 1 or len(ranking.score) == 1:
        return ranking.best(budgets[0])
    of_layers = ranking.score.split(heads)
    return torch.cat([Ranking(own).best(k) for own, k in zip(of_layers, budgets, strict=True)])


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
