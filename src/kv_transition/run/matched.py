"""Budgets that cost equally many bytes: K such that what is held over an answer is the budget's share of a full cache.

A policy that acts each step holds K while it decodes; one that compresses once lets the cache grow by the question and
by every token of the answer. At the same K the latter holds more, and the gap grows with the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from kv_transition.budget import Budget

Match = Literal["none", "mean", "final"]
TRIES = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Course:
    """How the cache grows after compression: ``n`` entries are compressed, ``follow`` come before the first token.

    ``steps``: tokens before which the entries are counted, one more entry at each.
    """

    n: int
    follow: int
    steps: int

    def grown(self, match: Match) -> float:
        """Return how many entries have come on top since compression, on average or at the end, were none evicted."""
        later = self.steps - 1 if match == "final" else (self.steps - 1) / 2
        return self.follow + max(later, 0.0)

    def full(self, match: Match) -> float:
        """Return the entries of a full cache, on average or at the end."""
        return self.n + self.grown(match)


def target(budget: Budget, course: Course, match: Match) -> float:
    """Return the entries that the budget leaves of a full cache over the whole course."""
    full = course.full(match)
    return full if budget.is_full else min(budget.tokens, full) if budget.tokens else float(budget.fraction) * full


def entries(budget: Budget, course: Course, match: Match, *, acts_each_step: bool) -> int:
    """Return K; at least 1, at most what there is. A policy that acts each step holds it from then on."""
    wanted = target(budget, course, match)
    k = round(wanted if acts_each_step else wanted - course.grown(match))
    return min(max(k, 1), round(course.full(match)) if acts_each_step else course.n)


def settled(answer: Callable[[int], T], steps_of: Callable[[T], int], k_of: Callable[[int], int], first: int) -> T:
    """Return the answer whose K fits its own length; how long it will be is not known before.

    Args:
        answer: with the K of an answer of so many steps.
        steps_of: how many steps an answer took.
        k_of: K for an answer of so many steps.
        first: how many steps to begin with.

    The answer is repeated with the K of the length that it had, until that K is the one it was given. Where this goes
    round in circles, the last of `TRIES` is taken; what it held is in its row.
    """
    steps = first
    for _ in range(TRIES):
        k = k_of(steps)
        found = answer(steps)
        steps = steps_of(found)
        if k_of(steps) == k:
            break
    return found
