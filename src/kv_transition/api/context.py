"""A context that was read once, its compressed caches, and questions about either."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kv_transition.api.chosen import BudgetLike, PolicyLike, name_of, setting_of
from kv_transition.api.reply import Entropies, Reply, Scored, reply_of
from kv_transition.cache.state import CacheState
from kv_transition.cache.store import Prefill
from kv_transition.errors import UserError
from kv_transition.run.decode import Answer, Setting, begin, finish, let_in

if TYPE_CHECKING:
    import polars as pl

    from kv_transition.api.model import Model, Text


@dataclass(frozen=True)
class Context:
    """A context that was read with the full cache. Questions do not change it."""

    model: Model
    tokens: list[int] = field(repr=False)
    text: str | None = field(repr=False)
    state: CacheState = field(repr=False)
    statistics: frozenset[str] = field(repr=False)
    """statistics that were computed while it was read"""
    seconds: float
    """seconds of reading it"""

    def __len__(self) -> int:
        return len(self.tokens)

    def compress(self, policy: PolicyLike, budget: BudgetLike | None = None, *, seed: int = 0) -> Compressed:
        """Return the context's cache after a policy compressed it, before any question is known.

        policy: a name, {"kind": name, hyper-parameters}, a `Policy` or its class. budget: a fraction of the entries, or
        {"tokens": n}. seed: for policies that draw random numbers. Raises UserError if the policy lacks its budget, or
        reads a statistic that the context does not have.
        """
        setting = setting_of(policy, budget, "before_question")
        k = setting.entries(self.state.length)
        started = self.model.engine.clock()
        state = setting.compress(self.state, k, seed)
        seconds = self.model.engine.clock() - started
        record = setting.policy.record(self.state, k) if setting.evicts else {}
        return Compressed(self, setting, state, k, seed, seconds, record)

    def ask(
        self,
        question: Text,
        policy: PolicyLike = "full",
        budget: BudgetLike | None = None,
        *,
        mode: str = "before_question",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Reply:
        """Return the answer to a question under a policy; by default with the full cache.

        mode: ``before_question`` compresses the context and then reads the question; ``after_prompt`` reads both with
        the full cache, compresses, and reads the last token again. Raises UserError as `compress` does.
        """
        if mode == "before_question":
            compressed = self.compress(policy, budget, seed=seed)
            return compressed.ask(question, max_new_tokens=max_new_tokens, temperature=temperature)
        setting = setting_of(policy, budget, mode, temperature)
        engine, ids = self.model.engine, self.model.question_ids(self.text, question)
        started = engine.clock()
        prompt = engine.extend(self.state, ids, self.statistics)
        prefill = Prefill(self.state, prompt, self.seconds, engine.clock() - started)
        answer, entropies = _new_answer(setting, max_new_tokens, seed)
        return _finished(self.model, begin(engine, prefill, ids, setting, answer), setting, answer, entropies)


@dataclass(frozen=True)
class Compressed:
    """The cache of a context after compression. Each question uses a copy of it."""

    context: Context = field(repr=False)
    setting: Setting
    state: CacheState = field(repr=False)
    budget_entries: int
    """entries per KV head that the budget allows"""
    seed: int
    seconds: float
    """seconds of the compression"""
    record: dict[str, Any] = field(repr=False)
    """facts that the policy records about its compression"""

    @property
    def policy(self) -> str:
        return name_of(self.setting.policy)

    @property
    def entries(self) -> float:
        """Return the number of entries per KV head, mean over the evictable layers."""
        return self.state.entries

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values in the evictable layers."""
        return self.state.nbytes

    def ask(self, question: Text, *, max_new_tokens: int = 64, temperature: float = 0.0) -> Reply:
        """Return the answer to a question, read on top of the compressed cache."""
        model, context = self.context.model, self.context
        setting = Setting(self.setting.policy, self.setting.budget, "before_question", temperature=temperature)
        answer, entropies = _new_answer(setting, max_new_tokens, self.seed)
        answer.budget_entries = self.budget_entries
        answer.token_bytes = context.state.nbytes / context.state.length
        answer.prefill_s, answer.compress_s = context.seconds, self.seconds
        answer.record = dict(self.record)
        ids = model.question_ids(context.text, question)
        return _finished(model, let_in(model.engine, self.state, ids, setting, answer), setting, answer, entropies)

    def score(self, text: Text) -> Scored:
        """Return the negative log-likelihood of each token of a text that continues the context.

        A policy that acts while decoding acts after each token. Raises UserError for fewer than two tokens.
        """
        engine, setting, state = self.context.model.engine, self.setting, self.state
        tokens = self.context.model.text_ids(text)
        if len(tokens) < 2:
            raise UserError(f"a text of {len(tokens)} tokens cannot be scored; give two or more")
        if not (setting.evicts and setting.policy.acts_each_step):
            _, nats = engine.score(state, tokens[:-1], tokens[1:], frozenset())
            return Scored(tuple(tokens), tuple(nats.tolist()))
        watcher, found = setting.policy.watch(self.seed), []
        for token, target in pairwise(tokens):
            before = watcher.before_attention(state.logits[None]) if watcher else None
            grown, nats = engine.score(state, [token], [target], setting.while_decoding, before_attention=before)
            state = setting.hold(grown, self.budget_entries, given_up=True)
            found.append(nats)
        return Scored(tuple(tokens), tuple(torch.cat(found).tolist()))

    def kept(self) -> pl.DataFrame:
        """Return a table with one row for each entry of the cache: its layer, KV head and position."""
        from kv_transition.api.kept import kept_frame

        return kept_frame(self.state)


def _new_answer(setting: Setting, max_new_tokens: int, seed: int) -> tuple[Answer, Entropies]:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no answer; give 1 or more")
    entropies = Entropies(setting, seed)
    return Answer(seed, max_new_tokens, watcher=entropies), entropies


def _finished(model: Model, state: CacheState, setting: Setting, answer: Answer, entropies: Entropies) -> Reply:
    finish(model.engine, [state], setting, [answer])
    return reply_of(answer, model.text_of(answer.tokens), entropies.seen)
