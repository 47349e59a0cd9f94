"""Answering from a compressed cache: forget down to the budget, let the question in, decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kv_transition.budget import Budget
from kv_transition.cache.batch import row, stack, take
from kv_transition.cache.state import CacheState
from kv_transition.cache.store import Prefill
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class Setting:
    """What is done to the cache and how the answer is decoded."""

    policy: Policy
    budget: Budget
    mode: str
    first_token: str = "compressed"
    temperature: float = 0.0

    @property
    def evicts(self) -> bool:
        return bool(self.policy.ignores_budget) or not self.budget.is_full

    def entries(self, n: int) -> int:
        """How many of ``n`` entries the budget leaves."""
        return n if self.budget.is_full else self.budget.kept(n)

    @property
    def while_decoding(self) -> frozenset[str]:
        """Statistics that are read after the question."""
        return self.policy.statistics if self.evicts and self.policy.acts_each_step else frozenset()

    def compress(self, state: CacheState, k: int, seed: int = 0, *, keep_last: bool = False) -> CacheState:
        return self.policy.compress(state, k, seed=seed, keep_last=keep_last) if self.evicts else state

    def hold(self, state: CacheState, k: int) -> CacheState:
        """The state held at K, if the policy acts while decoding."""
        return self.compress(state, k) if self.policy.acts_each_step else state


@dataclass
class Answer:
    """Generated tokens with the anatomy of the cache and the seconds of each step."""

    seed: int
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    budget_entries: int = 0
    kept: list[float] = field(default_factory=list)
    """entries per KV head before each token"""
    record: dict[str, float | None] = field(default_factory=dict)
    """what the policy says of its compression"""
    token_bytes: float = 0.0
    """of a full cache"""
    cache_bytes: int = 0
    total_bytes: int = 0
    full_bytes: int = 0
    prefill_s: float = 0.0
    compress_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    batch_size: int = 1


def begin(
    engine: LocalEngine, prefill: Prefill, question_ids: Sequence[int], setting: Setting, answer: Answer
) -> CacheState:
    """Forget down to the budget and let the question in; the state from which the first token is drawn."""
    before_question = setting.mode == "before_question"
    state = prefill.context if before_question else prefill.prompt
    answer.prefill_s = prefill.context_s if before_question else prefill.prompt_s
    answer.budget_entries = k = setting.entries(state.length)
    # measured before anything is evicted, merged or quantized
    answer.token_bytes = state.nbytes / state.length

    started = engine.clock()
    compressed = setting.compress(state, k, answer.seed, keep_last=not before_question)
    answer.compress_s = engine.clock() - started
    if setting.evicts:
        answer.record = setting.policy.record(state, k, keep_last=not before_question)
    if before_question:
        return let_in(engine, compressed, question_ids, setting, answer)
    if setting.first_token == "full":
        return compressed
    # No answer token may come from the full cache, so the last prompt token is read again.
    return let_in(engine, compressed.without_last(), question_ids[-1:], setting, answer)


def let_in(
    engine: LocalEngine, state: CacheState, tokens: Sequence[int], setting: Setting, answer: Answer
) -> CacheState:
    """The last tokens of the prompt, read against the compressed cache."""
    # Room for the answer is of use only to a cache that grows.
    room = 0 if setting.while_decoding else answer.max_new_tokens
    started = engine.clock()
    state = setting.hold(engine.extend(state, tokens, setting.while_decoding, room), answer.budget_entries)
    answer.first_token_s = engine.clock() - started
    return state


def decode(
    engine: LocalEngine, states: Sequence[CacheState], setting: Setting, answers: Sequence[Answer]
) -> list[CacheState]:
    """Continue each sequence until the model stops or has said its ``max_new_tokens``; their caches as they are then.

    All are decoded as one batch. Those of a policy that acts each step hold equally many entries.
    """
    k = answers[0].budget_entries
    statistics = setting.while_decoding
    entries = [state.entries for state in states]
    batch = stack(states, statistics)
    padding = [batch.entries - own for own in entries]
    generators = [torch.Generator().manual_seed(answer.seed) for answer in answers]
    started = engine.clock()
    room = 0 if statistics else max(answer.max_new_tokens for answer in answers)
    finished: dict[int, CacheState] = {}
    live = list(range(len(answers)))
    while True:
        chosen = engine.next_tokens(batch, setting.temperature, [generators[i] for i in live])
        said = {}
        for place, (i, token) in enumerate(zip(live, chosen, strict=True)):
            answer = answers[i]
            answer.kept.append(batch.entries - padding[i])
            if token in engine.eos:
                answer.finish_reason = "stop"
            else:
                answer.tokens.append(token)
            if answer.finish_reason == "stop" or len(answer.tokens) == answer.max_new_tokens:
                finished[i] = row(batch, place)
                answer.decode_s = engine.clock() - started
            else:
                said[place] = token
        if not said:
            break
        if len(said) < len(live):
            live = [live[place] for place in said]
            batch = take(batch, list(said))
        batch = setting.hold(engine.extend(batch, [[token] for token in said.values()], statistics, room), k)
    return [finished[i] for i in range(len(answers))]


def finish(
    engine: LocalEngine, states: Sequence[CacheState], setting: Setting, answers: Sequence[Answer]
) -> Sequence[Answer]:
    """Decode the answers that `begin` began, more than one as a batch, and measure what is left of their caches."""
    for answer, state in zip(answers, decode(engine, states, setting, answers), strict=True):
        answer.decode_s += answer.first_token_s
        answer.batch_size = len(answers)
        answer.cache_bytes = state.nbytes
        answer.total_bytes = state.total_nbytes
        answer.full_bytes = round(state.length * answer.token_bytes)
    return answers


def answer_all(
    engine: LocalEngine,
    prefills: Sequence[Prefill],
    questions: Sequence[Sequence[int]],
    setting: Setting,
    answers: Sequence[Answer],
) -> Sequence[Answer]:
    """Fill in ``answers``, one for each prompt."""
    triples = zip(prefills, questions, answers, strict=True)
    states = [begin(engine, prefill, question, setting, answer) for prefill, question, answer in triples]
    return finish(engine, states, setting, answers)


def answer(
    engine: LocalEngine,
    prefill: Prefill,
    question_ids: Sequence[int],
    setting: Setting,
    max_new_tokens: int,
    seed: int,
) -> Answer:
    """The answer to one prompt."""
    return answer_all(engine, [prefill], [question_ids], setting, [Answer(seed, max_new_tokens)])[0]
