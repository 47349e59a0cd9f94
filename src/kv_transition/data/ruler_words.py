"""What ruler documents are made of: invented words, numbers, identifiers."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator

# Invented words have three of these syllables. No word of the filler or of the sentences is of that form.
_SYLLABLES = [consonant + vowel for consonant in "bdklmnprstvz" for vowel in "aeiou"]


def invented(rng: random.Random, others: set[str] = frozenset()) -> Iterator[str]:
    """Different invented words, none of ``others``. All are of one length, so none is part of another."""
    seen = set(others)
    while True:
        word = "".join(rng.choices(_SYLLABLES, k=3))
        if word not in seen:
            seen.add(word)
            yield word


def numbers(rng: random.Random, n: int, digits: int) -> list[str]:
    """Different numbers of so many digits, as text."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), n)]


def identifier(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def cut(depth: float) -> float:
    """Four digits, and below 1 whatever it was."""
    return math.floor(depth * 10_000) / 10_000
