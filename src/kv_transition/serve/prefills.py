"""Prefills that are held in memory while there is space, so that each prompt is read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transition.cache.state import CacheState, tensors_of
from kv_transition.cache.store import Prefill
from kv_transition.engines.local import LocalEngine

Key = tuple[tuple[int, ...], ...]
"""token ids of the segments that were read"""


@dataclass(frozen=True)
class Held:
    """A prefill in memory, with the statistics that it has."""

    prefill: Prefill
    """its two states are the same: the state after the last segment"""
    statistics: frozenset[str]
    storages: dict[int, int]
    """bytes by address; states of the same document share storages"""


class Prefills:
    """States after a context and after a whole prompt; the least recently used ones are dropped first.

    Two prompts with the same context share its prefill. The segments are read one after the other, exactly as in
    `LocalEngine.prefill`. Not thread-safe.
    """

    def __init__(self, engine: LocalEngine, max_bytes: int, statistics: frozenset[str] = frozenset()):
        """max_bytes: maximum bytes of all stored prefills; a single prompt that is larger is read again each time.
        statistics: those that every prefill computes, in addition to those its request needs.
        """
        self._engine, self._max_bytes, self._statistics = engine, max_bytes, statistics
        self._held: OrderedDict[Key, Held] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def after_context(self, context: Sequence[int], statistics: frozenset[str], room: int = 0) -> tuple[Prefill, int]:
        """Return the state after the context, and how many of its tokens had been read before. room: entries to reserve
        for the question.
        """
        key = (tuple(context),)
        there = len(context) if self._has(key, statistics) else 0
        return self._get(key, None, statistics, room).prefill, there

    def after_prompt(
        self, context: Sequence[int], question: Sequence[int], statistics: frozenset[str]
    ) -> tuple[Prefill, int]:
        """Return the state after the prompt, and how many of its tokens had been read before.

        The context may be empty.
        """
        key = (tuple(context), tuple(question))
        if self._has(key, statistics):
            return self._get(key, None, statistics).prefill, len(context) + len(question)
        if not context:
            return self._get(key, None, statistics).prefill, 0
        there = len(context) if self._has(key[:1], statistics) else 0
        before = self._get(key[:1], None, statistics, len(question))
        return self._get(key, before, statistics).prefill, there

    def clear(self) -> bool:
        """Drop all prefills; return whether there were any."""
        had = bool(self._held)
        self._held.clear()
        self.nbytes = 0
        return had

    def _has(self, key: Key, statistics: frozenset[str]) -> bool:
        return key in self._held and statistics <= self._held[key].statistics

    def _get(self, key: Key, before: Held | None, statistics: frozenset[str], room: int = 0) -> Held:
        if self._has(key, statistics):
            self._held.move_to_end(key)
            return self._held[key]
        old = self._held.pop(key, None)
        wanted = self._statistics | statistics | (old.statistics if old else frozenset())
        if before:
            wanted = before.statistics
        started = self._engine.clock()
        state = self._engine.extend(before.prefill.prompt if before else None, key[-1], wanted, room)
        seconds = self._engine.clock() - started
        prefill = (
            Prefill(state, state, before.prefill.prompt_s, seconds) if before else Prefill(state, state, seconds, 0)
        )
        held = Held(prefill, wanted, _storages(state))
        self._held[key] = held
        self._make_room()
        return held

    def _make_room(self) -> None:
        while (used := self._used()) > self._max_bytes:
            self._held.popitem(last=False)
        self.nbytes = used

    def _used(self) -> int:
        storages: dict[int, int] = {}
        for held in self._held.values():
            storages |= held.storages
        return sum(storages.values())


def _storages(state: CacheState) -> dict[int, int]:
    tensors = [tensor for layer in state.layers for tensor in tensors_of(layer).values()]
    if state.logits is not None:
        tensors.append(state.logits)
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
