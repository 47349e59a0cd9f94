"""The control `text_drop`: delete old text and read the rest again, instead of compressing a cache.

After each answer the text of the conversation is cut to the budget, word by word: first the words of the middle turns,
oldest first, then those of the first turn from its end (the system message last), then those of the latest turn from
its start. A turn without words is removed with its template. The rest is read from position 0. This model never reads
the deleted text again, while a model with a compressed cache has read all of it once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kv_transition.budget import Budget
from kv_transition.cache.state import CacheState
from kv_transition.engines.local import LocalEngine
from kv_transition.run.decode import Answer, Setting
from kv_transition.studies.chat.turns import Turn, render

_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Exchange:
    """The remaining part of a turn: the words of the user and of the answer, each with the white space before it."""

    user: tuple[str, ...]
    said: tuple[str, ...]
    ids: tuple[int, ...] | None
    """the answer's own tokens, while no word of it is deleted"""

    @property
    def empty(self) -> bool:
        return not self.user and not self.said


Words = tuple[tuple[str, ...], tuple[Exchange, ...]]
"""words of the system message, and of each turn"""


@dataclass
class TextMemory:
    """The text of a conversation, cut to a budget of tokens after each turn."""

    engine: LocalEngine
    tokenizer: Any
    system: str | None
    users: Sequence[str]
    turns: Sequence[Turn]
    budget: Budget
    chat: bool
    own: Setting
    left: Words = field(init=False)

    def __post_init__(self) -> None:
        self.left = _words(self.system or ""), ()

    def setting(self, number: int) -> Setting:
        return self.own

    def opening(self, number: int) -> list[int]:
        """Return the tokens that the new turn adds to the remaining text."""
        system, exchanges = self.left
        texts = [*("".join(exchange.user) for exchange in exchanges), self.users[number - 1]]
        return self._rendered(system, texts)[-1].opening

    def forget(self, state: CacheState, number: int, answer: Answer, seen: int) -> CacheState | None:
        said = _words(self.engine.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        system, exchanges = self.left
        whole = system, (*exchanges, Exchange(_words(self.users[number - 1]), said, tuple(answer.tokens)))
        answer.budget_entries = k = self.budget.kept(seen)
        self.left = cut(whole, lambda words: len(self._ids(words)) <= k)
        ids = self._ids(self.left)
        answer.record |= {"dropped_words": _count(whole) - _count(self.left), "read_again": 0}
        if self.left == whole:
            return state
        answer.record["read_again"] = len(ids)
        return self.engine.extend(None, ids, frozenset()) if ids else None

    def _rendered(self, system: tuple[str, ...], users: Sequence[str]) -> list[Turn]:
        return render(self.tokenizer, "".join(system) or None, users, chat=self.chat)

    def _ids(self, words: Words) -> list[int]:
        system, exchanges = words
        ids: list[int] = []
        turns = self._rendered(system, ["".join(exchange.user) for exchange in exchanges]) if exchanges else []
        for turn, exchange in zip(turns, exchanges, strict=True):
            said = exchange.ids
            if said is None:
                said = self.tokenizer("".join(exchange.said), add_special_tokens=False, verbose=False).input_ids
            ids += [*turn.opening, *said, *turn.closing]
        return ids


def cut(words: Words, fits: Any) -> Words:
    """Return the words without as few as possible, in the order given above, such that ``fits`` is true."""
    versions = list(_shorter(words))
    low, high = 0, len(versions) - 1
    # deleting a word may add a token at the cut, so the result is checked again
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(versions[middle]) else (middle + 1, high)
    while low < len(versions) - 1 and not fits(versions[low]):
        low += 1
    return versions[low]


def _shorter(words: Words) -> Iterator[Words]:
    """Yield the words, then with one word less each time, until none is left."""
    system, exchanges = words
    now = list(exchanges)

    def version() -> Words:
        kept = tuple(exchange for exchange in now if not exchange.empty)
        return (system if kept else ()), kept

    yield version()
    for i in range(1, len(now) - 1):
        while not now[i].empty:
            now[i] = _from_the_start(now[i])
            yield version()
    while now and not now[0].empty:
        now[0] = _from_the_end(now[0])
        yield version()
    while system and any(not exchange.empty for exchange in now):
        system = system[:-1]
        yield version()
    while now and not now[-1].empty:
        now[-1] = _from_the_start(now[-1])
        yield version()


def _from_the_start(exchange: Exchange) -> Exchange:
    if exchange.user:
        return replace(exchange, user=exchange.user[1:])
    return replace(exchange, said=exchange.said[1:], ids=None)


def _from_the_end(exchange: Exchange) -> Exchange:
    if exchange.said:
        return replace(exchange, said=exchange.said[:-1], ids=None)
    return replace(exchange, user=exchange.user[:-1])


def _count(words: Words) -> int:
    system, exchanges = words
    return len(system) + sum(len(exchange.user) + len(exchange.said) for exchange in exchanges)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text))
