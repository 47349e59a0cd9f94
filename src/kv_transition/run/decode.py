"""Compute answers from a compressed cache: compress to the budget, read the question, decode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kv_transition.budget import Budget
from kv_transition.cache.batch import gather, row, stack, take
from kv_transition.cache.state import MOMENTS, CacheState
from kv_transition.cache.store import Prefill
from kv_transition.engines.compiled import CompiledDecoder, decoder_of
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import BeforeAttention, Policy, Watcher
from kv_transition.run.matched import Course, Match, entries


@dataclass(frozen=True)
class Setting:
    """How the cache is compressed and how the answer is decoded."""

    policy: Policy
    budget: Budget
    mode: str
    first_token: str = "compressed"
    temperature: float = 0.0
    compile: bool = False
    match: Match = "none"
    """mean, final: choose K such that the mean or final footprints of all policies are equal"""

    @property
    def matches(self) -> bool:
        """Return whether K depends on what follows the compression."""
        return self.match != "none" and not self.budget.is_full and not self.policy.ignores_budget

    @property
    def evicts(self) -> bool:
        return bool(self.policy.ignores_budget) or not self.budget.is_full

    def entries(self, n: int) -> int:
        """Return the number of ``n`` entries that the budget keeps."""
        return n if self.budget.is_full else self.budget.kept(n)

    def entries_over(self, course: Course) -> int:
        """Return the number of entries that remain of those compressed, given what follows them."""
        if not self.matches:
            return self.entries(course.n)
        return entries(self.budget, course, self.match, acts_each_step=self.policy.acts_each_step)

    @property
    def while_decoding(self) -> frozenset[str]:
        """Return the statistics that are needed after the question."""
        return self.policy.statistics if self.evicts and self.policy.acts_each_step else frozenset()

    def room(self, tokens: int) -> int:
        """Return the entries to leave space for behind a compressed cache, for ``tokens`` that follow."""
        return self.policy.growth(tokens) if self.evicts else tokens

    def compress(self, state: CacheState, k: int, seed: int = 0, *, keep_last: bool = False) -> CacheState:
        return self.policy.compress(state, k, seed=seed, keep_last=keep_last) if self.evicts else state

    def watch(self, answer: Answer) -> Watcher | None:
        """Return the observer of the steps of an answer; it is created before the first step."""
        if answer.watcher is None and self.evicts:
            answer.watcher = self.policy.watch(answer.seed, answer.pace)
        return answer.watcher

    def hold(self, state: CacheState, k: int, *, given_up: bool = False) -> CacheState:
        """Return the state held at K if the policy acts while decoding. given_up: the state may be changed, as in
        `Policy.hold`.
        """
        if not (self.evicts and self.policy.acts_each_step):
            return state
        return self.policy.hold(state, k) if given_up else self.policy.compress(state, k)


@dataclass
class Answer:
    """Generated tokens, the size of the cache and the seconds of each step."""

    seed: int
    max_new_tokens: int
    pace: tuple[int, int] | None = None
    """(number of recalls, number of steps) of the answer that this one is a control of"""
    watcher: Watcher | None = None
    """observer of its steps"""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    steps: int = 1
    """expected number of decode steps, if K depends on it (`Setting.matches`)"""
    course: Course | None = None
    """number of entries that were compressed, and of those that follow"""
    budget_entries: int = 0
    kept: list[float] = field(default_factory=list)
    """entries per KV head before each token"""
    unrepeated: Sequence[int] = ()
    """last tokens of the prompt that the model did not repeat, for a policy that reads ``reconstruction``"""
    record: dict[str, Any] = field(default_factory=dict)
    """facts that the policy records about its compression and its steps"""
    listener: Callable[[Sequence[int]], bool] | None = None
    """function that gets all tokens after each token; true ends the answer"""
    token_bytes: float = 0.0
    """bytes of one token in a full cache"""
    cache_bytes: int = 0
    total_bytes: int = 0
    full_bytes: int = 0
    prefill_s: float = 0.0
    compress_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    batch_size: int = 1

    def takes(self, token: int, kept: float, eos: Container[int]) -> bool:
        """Record the next token, drawn from a cache of ``kept`` entries per KV head; return whether the answer
        continues.
        """
        self.kept.append(kept)
        if token in eos:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            if self.listener and self.listener(self.tokens):
                self.finish_reason = "stop"
        return self.finish_reason != "stop" and len(self.tokens) < self.max_new_tokens

    def ends(self, state: CacheState) -> None:
        """Record the size of the cache after the last token."""
        self.decode_s += self.first_token_s
        self.cache_bytes = state.nbytes
        self.total_bytes = state.total_nbytes
        self.full_bytes = round(state.length * self.token_bytes)


@dataclass(frozen=True)
class Compressed:
    """A compressed cache; reading on top of it does not change it."""

    state: CacheState
    budget_entries: int
    token_bytes: float
    seconds: float
    record: dict[str, Any]


def compress(
    engine: LocalEngine, state: CacheState, setting: Setting, seed: int, course: Course | None = None
) -> Compressed:
    """Return the cache compressed to the budget; ``course``: what follows, if K depends on it."""
    k = setting.entries_over(course) if course else setting.entries(state.length)
    keep_last = setting.mode != "before_question"
    started = engine.clock()
    left = setting.compress(state, k, seed, keep_last=keep_last)
    seconds = engine.clock() - started
    record = setting.policy.record(state, k, keep_last=keep_last) if setting.evicts else {}
    # bytes per token are measured before anything is evicted, merged or quantized
    return Compressed(left, k, state.nbytes / state.length, seconds, record)


def begin(
    engine: LocalEngine, prefill: Prefill, question_ids: Sequence[int], setting: Setting, answer: Answer,
    left: Compressed | None = None,
) -> CacheState:  # fmt: skip
    """Compress to the budget and read the question; return the state that the first token is drawn from.

    left: the compressed prefill, if it was computed before.
    """
    (state,) = begin_all(engine, [(prefill, left)], [question_ids], setting, [answer])
    return state


def begin_all(
    engine: LocalEngine, prefills: Iterable[tuple[Prefill, Compressed | None]], questions: Sequence[Sequence[int]],
    setting: Setting, answers: Sequence[Answer],
) -> list[CacheState]:  # fmt: skip
    """Return the states of several answers as `begin` does, with questions that are read together where they can be.

    prefills: each with its compressed state, if there is one. They are taken one by one, so that only one is held.
    """
    before_question = setting.mode == "before_question"
    states = []
    for (prefill, left), question, answer in zip(prefills, questions, answers, strict=True):
        state = start(engine, prefill, question, setting, answer, left)
        if not before_question and setting.first_token != "full":
            # No answer token may come from the full cache, so the last prompt token is read again, as the first step.
            watcher = setting.watch(answer)
            before = watcher.before_attention(prefill.prompt.logits) if watcher else None
            state = let_in(engine, state.without_last(), question[-1:], setting, answer, before)
        states.append(state)
    return let_in_all(engine, states, questions, setting, answers) if before_question else states


def start(
    engine: LocalEngine, prefill: Prefill, question: Sequence[int], setting: Setting, answer: Answer,
    left: Compressed | None = None,
) -> CacheState:  # fmt: skip
    """Compress to the budget and return the compressed state. left: that state, if it was computed before."""
    before_question = setting.mode == "before_question"
    answer.prefill_s = prefill.context_s if before_question else prefill.prompt_s
    state = prefill.context if before_question else prefill.prompt
    answer.course = Course(state.length, len(question) if before_question else 0, answer.steps)
    left = left or compress(engine, state, setting, answer.seed, answer.course)
    answer.budget_entries, answer.token_bytes, answer.compress_s = left.budget_entries, left.token_bytes, left.seconds
    answer.record = dict(left.record)
    return left.state


def let_in(
    engine: LocalEngine,
    state: CacheState,
    tokens: Sequence[int],
    setting: Setting,
    answer: Answer,
    before_attention: BeforeAttention | None = None,
) -> CacheState:
    """Return the state after the last tokens of the prompt are read on top of the compressed cache."""
    room = setting.room(answer.max_new_tokens)
    answer.unrepeated = tokens if len(tokens) == 1 else ()  # see `LocalEngine.extend`
    started = engine.clock()
    state = engine.extend(state, tokens, setting.while_decoding, room, before_attention=before_attention)
    state = setting.hold(state, answer.budget_entries)
    answer.first_token_s = engine.clock() - started
    return state


def let_in_all(
    engine: LocalEngine,
    states: list[CacheState],
    questions: Sequence[Sequence[int]],
    setting: Setting,
    answers: Sequence[Answer],
) -> list[CacheState]:
    """Return the states after each question is read on top of its compressed cache; the list ``states`` is emptied.

    Questions of one length on caches of one size are read in one pass, whose seconds count for each of their answers.
    """
    sizes = {(len(q), *(layer.n for layer in state.layers)) for q, state in zip(questions, states, strict=True)}
    alone = setting.while_decoding & (MOMENTS | {"reconstruction"})  # statistics of single sequences
    if len(states) == 1 or len(sizes) > 1 or alone:
        return [let_in(engine, states.pop(0), q, setting, a) for q, a in zip(questions, answers, strict=True)]
    started = engine.clock()
    room = setting.room(max(answer.max_new_tokens for answer in answers))
    batch = gather(states, setting.while_decoding, len(questions[0]) + room)
    batch = setting.hold(engine.extend(batch, questions, setting.while_decoding, room), answers[0].budget_entries)
    for answer in answers:
        answer.first_token_s = engine.clock() - started
    return [row(batch, number) for number in range(len(answers))]


class Stacked:
    """Sequences that the engine decodes as one batch; `CompiledDecoder` has the same interface."""

    def __init__(
        self,
        engine: LocalEngine,
        states: list[CacheState],
        setting: Setting,
        k: int,
        room: int,
        watcher: Watcher | None = None,
        unrepeated: Sequence[int] = (),
    ):
        self._engine, self._setting, self._k, self._room = engine, setting, k, room
        self._watcher = watcher
        self.live = list(range(len(states)))
        entries = [own.entries for own in states]
        self._batch = gather(states, setting.while_decoding, room)
        self._padding = [self._batch.entries - own for own in entries]
        self._unrepeated = list(unrepeated)

    @property
    def logits(self) -> Tensor:
        return self._batch.logits

    def entries(self, number: int) -> float:
        return self._batch.entries - self._padding[number]

    def state(self, number: int) -> CacheState:
        return row(self._batch, self.live.index(number))

    def read(self, said: Mapping[int, int]) -> None:
        if len(said) < len(self.live):
            self._batch = take(self._batch, [self.live.index(number) for number in said], self._room)
            self.live = list(said)
        before = self._watcher.before_attention(self._batch.logits) if self._watcher else None
        tokens = [[token] for token in said.values()]
        statistics = self._setting.while_decoding
        grown = self._engine.extend(self._batch, tokens, statistics, self._room, before_attention=before)
        if "reconstruction" in statistics and len(self.live) == 1:  # a batch is not repeated
            grown = self._repeated(grown, *tokens)
        self._batch = self._setting.hold(grown, self._k, given_up=True)

    def _repeated(self, grown: CacheState, tokens: list[int]) -> CacheState:
        """Return the batch of one sequence, in which the model has repeated all that it read since the last
        compression, if it is about to be compressed again.
        """
        self._unrepeated += tokens
        if not self._setting.policy.due(grown, self._k):
            return grown
        said, self._unrepeated = self._unrepeated, []
        return stack([self._engine.repeated(row(grown, 0), said)], self._setting.while_decoding)


def decode(
    engine: LocalEngine, states: list[CacheState], setting: Setting, answers: Sequence[Answer]
) -> Iterator[tuple[int, CacheState]]:
    """Decode each sequence until the model stops or ``max_new_tokens`` is reached; yield the number and the final cache
    of each as it ends.

    All sequences are decoded as one batch. Under a policy that acts at each step all must hold the same number of
    entries. The list ``states`` is emptied, because the batch replaces them; a final cache is a view of the batch, and
    whoever keeps it keeps the memory of the whole batch. Raises ValueError for a batch under a policy that cannot be
    batched.
    """
    if setting.evicts and setting.policy.one_at_a_time and len(answers) > 1:
        raise ValueError(f"{type(setting.policy).__name__} decodes one answer at a time")
    generators = [torch.Generator().manual_seed(answer.seed) for answer in answers]
    watcher = setting.watch(answers[0])
    batch = _loaded(engine, states, setting, answers, watcher)
    started = engine.clock()
    while True:
        chosen = engine.next_tokens(batch.logits, setting.temperature, [generators[i] for i in batch.live])
        said = {}
        for i, token in zip(batch.live, chosen, strict=True):
            if answers[i].takes(token, batch.entries(i), engine.eos):
                said[i] = token
            else:
                answers[i].decode_s = engine.clock() - started
                final = batch.state(i)
                if watcher and i == 0:
                    answers[0].record |= watcher.record(final)
                yield i, final
                del final
        if not said:
            break
        batch.read(said)


def _loaded(
    engine: LocalEngine,
    states: list[CacheState],
    setting: Setting,
    answers: Sequence[Answer],
    watcher: Watcher | None,
) -> Stacked | CompiledDecoder:
    room = max(answer.max_new_tokens for answer in answers)
    if setting.compile:
        decoder = decoder_of(engine)
        held = setting.evicts and setting.policy.acts_each_step
        reason = "the policy acts each step" if held else decoder.refusal(states)
        if reason is None:
            decoder.load(states, room)
            states.clear()
            return decoder
        # Python's filter shows the warning only once
        warnings.warn(f"decoding.compile: {reason}, so answers are decoded without a compiled graph", stacklevel=2)
    return Stacked(
        engine, states, setting, answers[0].budget_entries, setting.room(room), watcher, answers[0].unrepeated
    )


def finish(
    engine: LocalEngine, states: list[CacheState], setting: Setting, answers: Sequence[Answer]
) -> Sequence[Answer]:
    """Decode the answers that `begin` started (several as a batch) and record the sizes of their caches; the list
    ``states`` is emptied.
    """
    for number, state in decode(engine, states, setting, answers):
        answers[number].batch_size = len(answers)
        answers[number].ends(state)
        del state  # a view would keep the whole batch
    return answers


def answer_all(
    engine: LocalEngine,
    prefills: Sequence[Prefill],
    questions: Sequence[Sequence[int]],
    setting: Setting,
    answers: Sequence[Answer],
) -> Sequence[Answer]:
    """Compute ``answers``, one for each prompt, and return them."""
    states = begin_all(engine, ((prefill, None) for prefill in prefills), questions, setting, answers)
    return finish(engine, states, setting, answers)


def answer(
    engine: LocalEngine,
    prefill: Prefill,
    question_ids: Sequence[int],
    setting: Setting,
    max_new_tokens: int,
    seed: int,
) -> Answer:
    """Return the answer to one prompt."""
    return answer_all(engine, [prefill], [question_ids], setting, [Answer(seed, max_new_tokens)])[0]
