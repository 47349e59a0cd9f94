"""Log-likelihoods of continuations on a compressed cache, read in batches wherever each stays what it is alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kv_transition.cache.batch import row, stack
from kv_transition.cache.state import MOMENTS, CacheState
from kv_transition.engines.loading import length_dependent_rope
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Watcher
from kv_transition.run.decode import Setting

_PIECE = 256
"""tokens whose logits are held at a time, over all sequences of a batch"""

_OF_ONE = MOMENTS | {"reconstruction"}
"""statistics that are kept up for one sequence at a time"""

Found = tuple[float, bool]
"""log p of a continuation, and whether each of its tokens is the most likely one"""

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What one continuation follows, or several."""

    tokens: tuple[int, ...]
    place: int | None = None
    """tokens that are compressed before the rest is read; None: all, and then the last one is read again"""
    held_over: int | None = None
    """for a text that is read from its first token: how many tokens the budget is a part of; nothing is read again"""
    number: int | None = None
    """of the request, where no other one may use what is left of the prompt"""

    @property
    def rest(self) -> tuple[int, ...]:
        """Return the tokens that are read after the compression."""
        if self.held_over is not None:
            return ()
        return self.tokens[-1:] if self.place is None else self.tokens[self.place :]


@dataclass(frozen=True)
class _Left:
    """What is left of a prompt."""

    state: CacheState
    k: int
    """entries per KV head that the budget allows"""
    watcher: Watcher | None


class Likelihoods:
    """The log-likelihoods of requests under one policy, budget and mode."""

    def __init__(self, engine: LocalEngine, setting: Setting, seed: int):
        self._engine, self._setting, self._seed = engine, setting, seed
        self._statistics = setting.policy.statistics if setting.evicts else frozenset()
        self._acts_each_step = setting.evicts and setting.policy.acts_each_step
        # these turn the keys of a pass as its longest sequence needs it
        self._one_length = bool(length_dependent_rope(engine.model.config))

    def of(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], size: int
    ) -> Iterator[tuple[int, Found]]:
        """Yield number and result of each request, the longest prompts first.

        A prompt of several requests is read and compressed once. size: sequences that are read together at most.
        """
        size = 1 if self._setting.evicts and self._setting.policy.one_at_a_time else size
        asked: dict[Prompt, list[int]] = {}
        for number, prompt in enumerate(prompts):
            asked.setdefault(prompt, []).append(number)
        for some in _runs(sorted(asked, key=lambda prompt: -len(prompt.tokens)), self._read_alike, size):
            left = dict(zip(some, self._begin(some), strict=True))
            requests = [(left[prompt], number) for prompt in some for number in asked[prompt]]
            requests.sort(key=lambda request: -len(continuations[request[1]]))
            for batch in _runs(requests, lambda request: self._held_alike(request[0]), size):
                numbers = [number for _, number in batch]
                found = self._follow([own for own, _ in batch], [continuations[number] for number in numbers])
                yield from zip(numbers, found, strict=True)

    def _read_alike(self, prompt: Prompt) -> Hashable:
        """Return what prompts have in common that are read together.

        What pads a shorter one would be counted in statistics, and push entries out of a sliding window.
        """
        if self._statistics & _OF_ONE:
            return prompt
        padded = not (self._statistics or self._one_length or any(self._engine.windows))
        return len(prompt.rest), prompt.held_over, None if padded else len(prompt.tokens)

    def _held_alike(self, left: _Left) -> Hashable:
        """Return what caches have in common that are read on together: their size, where each step evicts."""
        return (left.k, left.state.entries) if self._acts_each_step or self._one_length else None

    def _begin(self, prompts: Sequence[Prompt]) -> list[_Left]:
        """Return what is left of prompts that are `_read_alike`, after their last tokens were read."""
        setting, found = self._setting, []
        for prompt, state in zip(
            prompts, self._read([prompt.tokens[: prompt.place] for prompt in prompts]), strict=True
        ):
            watcher = setting.policy.watch(self._seed) if setting.evicts else None
            if prompt.held_over is not None:
                k = setting.entries(prompt.held_over)
                found.append(_Left(setting.hold(state, k), k, watcher))
                continue
            k, whole = setting.entries(state.length), prompt.place is None
            left = setting.compress(state, k, self._seed, keep_last=whole)
            # the last token is read again, so that nothing is drawn from the full cache
            left = replace(left.without_last(), logits=state.logits) if whole else left
            found.append(_Left(left, k, watcher))
        if not prompts[0].rest:
            return found
        done: dict[int, _Left] = {}
        for batch in _runs(range(len(found)), lambda i: self._held_alike(found[i]), len(found)):
            k, watcher = found[batch[0]].k, found[batch[0]].watcher
            state = stack([found[i].state for i in batch], setting.while_decoding)
            before = watcher.before_attention(state.logits) if watcher and prompts[0].place is None else None
            rest = [list(prompts[i].rest) for i in batch]
            state = self._engine.extend(state, rest, setting.while_decoding, before_attention=before)
            state = setting.hold(state, k)
            done |= {i: replace(found[i], state=row(state, at)) for at, i in enumerate(batch)}
        return [done[i] for i in range(len(found))]

    def _read(self, texts: Sequence[Sequence[int]]) -> list[CacheState]:
        """Return the state after each of several texts; the shorter ones are padded behind."""
        if len(texts) == 1:
            return [self._engine.extend(None, list(texts[0]), self._statistics)]
        length = torch.zeros(len(texts), 1, 1, dtype=torch.int64, device=self._engine.device)
        state = self._engine.extend(CacheState(layers=(), length=length), _padded(texts), self._statistics)
        return [_up_to(row(state, i), len(text)) for i, text in enumerate(texts)]

    def _follow(self, left: Sequence[_Left], texts: Sequence[Sequence[int]]) -> list[Found]:
        """Return the result of each continuation of caches that are `_held_alike`.

        The shorter ones are padded behind, which nothing before it sees.
        """
        setting, k, watcher = self._setting, left[0].k, left[0].watcher
        state = stack([own.state for own in left], setting.while_decoding)
        tokens = torch.tensor(_padded(texts), device=state.logits.device)
        nats, right = [], []

        def note(logits: Tensor, start: int) -> None:
            wanted = tokens[:, start : start + logits.shape[1]].to(logits.device)
            nats.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
            right.append(logits.argmax(-1) == wanted)

        note(state.logits.float()[:, None], 0)
        step = 1 if self._acts_each_step else max(1, _PIECE // len(texts))
        last = tokens.shape[1] - 1
        for start in range(0, last, step):
            piece = tokens[:, start : min(start + step, last)]
            before = watcher.before_attention(state.logits) if watcher else None
            state, logits = self._engine.logits(state, piece.tolist(), setting.while_decoding, before_attention=before)
            state = setting.hold(state, k, given_up=True)
            note(logits, start + 1)
        every, all_right = torch.cat(nats, 1), torch.cat(right, 1)
        return [(-float(every[i, : len(t)].sum()), bool(all_right[i, : len(t)].all())) for i, t in enumerate(texts)]


def _runs(items: Iterable[T], key: Callable[[T], Hashable], size: int) -> Iterator[list[T]]:
    """Yield items with equal keys together, at most ``size`` at a time, in their order."""
    alike: dict[Hashable, list[T]] = {}
    for item in items:
        alike.setdefault(key(item), []).append(item)
    for group in alike.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _padded(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    longest = max(map(len, texts))
    return [[*text, *[0] * (longest - len(text))] for text in texts]


def _up_to(state: CacheState, n: int) -> CacheState:
    """Return a state of one sequence without what was read after its first ``n`` tokens, which no statistic saw."""
    if state.length == n:
        return state
    layers = tuple(layer.with_parts([part.cut(0, n) for part in layer.parts]) for layer in state.layers)
    return replace(state, layers=layers, length=n)
