"""Answers with their entropies and facts about the cache, and scores of a given text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState
from kv_transition.policies.base import BeforeAttention, Watcher
from kv_transition.run.decode import Answer, Setting


@dataclass(frozen=True)
class Reply:
    """An answer with the facts about its cache."""

    text: str
    tokens: tuple[int, ...]
    entropies: tuple[float, ...]
    """entropy in nats of the distribution that each token was drawn from, at temperature 1"""
    finish_reason: str
    """``stop`` if the model's end token was drawn, else ``length``"""
    kept: tuple[float, ...]
    """entries per KV head before each token, mean over the evictable layers"""
    budget_entries: int
    """entries per KV head that the budget allowed when the cache was compressed"""
    cache_bytes: int
    """bytes of keys and values at the end, in the evictable layers"""
    full_bytes: int
    """bytes of the full cache after the same answer"""
    seconds: Mapping[str, float]
    """seconds of ``prefill``, ``compress`` and ``decode`` (which includes reading the question)"""
    record: Mapping[str, Any]
    """facts that the policy records about its compression and its steps"""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Scored:
    """The negative log-likelihood of each token of a text, except the first, which the full cache predicted."""

    tokens: tuple[int, ...]
    nats: tuple[float, ...]
    """-log p of each token except the first"""

    @property
    def perplexity(self) -> float:
        """Return exp of the mean of ``nats``."""
        return math.exp(sum(self.nats) / len(self.nats))


class Entropies:
    """Records the entropy of each distribution, in addition to the policy's own observer of the steps."""

    def __init__(self, setting: Setting, seed: int):
        self._inner: Watcher | None = setting.policy.watch(seed) if setting.evicts else None
        self.seen: list[float] = []

    def before_attention(self, logits: Tensor) -> BeforeAttention | None:
        self.seen.append(entropy(logits))
        return self._inner.before_attention(logits) if self._inner else None

    def record(self, state: CacheState) -> dict[str, Any]:
        self.seen.append(entropy(state.logits))
        return self._inner.record(state) if self._inner else {}


def entropy(logits: Tensor) -> float:
    """Return the entropy in nats of the next token's distribution at temperature 1, of logits [1, V] or [V]."""
    return max(0.0, float(torch.special.entr(logits.float().softmax(-1)).sum()))


def reply_of(answer: Answer, text: str, watched: Sequence[float]) -> Reply:
    """Return the reply for an answer.

    watched: the recorded entropies; the last one is that of the distribution after the last token or instead of it.
    """
    # One entropy for each distribution that a token was drawn from; the first recorded one may be that of the prompt's
    # last token, which is read again.
    drawn = watched[len(watched) - len(answer.kept) :]
    return Reply(
        text=text,
        tokens=tuple(answer.tokens),
        entropies=tuple(drawn[: len(answer.tokens)]),
        finish_reason=answer.finish_reason,
        kept=tuple(answer.kept),
        budget_entries=answer.budget_entries,
        cache_bytes=answer.cache_bytes,
        full_bytes=answer.full_bytes,
        seconds={"prefill": answer.prefill_s, "compress": answer.compress_s, "decode": answer.decode_s},
        record=answer.record,
    )
