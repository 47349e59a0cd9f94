"""The parts of ruler documents: invented words, numbers, identifiers."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator

# Invented words have three of these syllables. No word of the filler or of the sentences is of that form.
_SYLLABLES = [consonant + vowel for consonant in "bdklmnprstvz" for vowel in "aeiou"]


def invented(rng: random.Random, others: set[str] = frozenset()) -> Iterator[str]:
    """Yield different invented words, none of ``others``. All have the same length, so none is a part of another."""
    seen = set(others)
    while True:
        word = "".join(rng.choices(_SYLLABLES, k=3))
        if word not in seen:
            seen.add(word)
            yield word


def numbers(rng: random.Random, n: int, digits: int) -> list[str]:
    """Return ``n`` different numbers with the given number of digits, as text."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), n)]


def identifier(rng: random.Random) -> str:
    """Return a random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def cut(depth: float) -> float:
    """Return the depth rounded down to four digits, so that it stays below 1."""
    return math.floor(depth * 10_000) / 10_000
