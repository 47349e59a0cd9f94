"""Budgets at equal bytes: choose K such that the entries held over an answer are the budget's share of a full cache.

A policy that acts each step holds K while it decodes; a policy that compresses once lets the cache grow by the question
and by every token of the answer. At the same K the latter holds more entries, and the gap grows with the answer.
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
    """The growth of a cache after compression: ``n`` entries are compressed, ``follow`` come before the first token.

    ``steps``: number of tokens; the entries are counted before each of them, and each adds one entry.
    """

    n: int
    follow: int
    steps: int

    def grown(self, match: Match) -> float:
        """Return the number of entries added since the compression without eviction, as the mean over the steps or at
        the end.
        """
        later = self.steps - 1 if match == "final" else (self.steps - 1) / 2
        return self.follow + max(later, 0.0)

    def full(self, match: Match) -> float:
        """Return the number of entries of a full cache, as the mean over the steps or at the end."""
        return self.n + self.grown(match)


def target(budget: Budget, course: Course, match: Match) -> float:
    """Return the budget's share of the entries of a full cache over the whole answer."""
    full = course.full(match)
    return full if budget.is_full else min(budget.tokens, full) if budget.tokens else float(budget.fraction) * full


def entries(budget: Budget, course: Course, match: Match, *, acts_each_step: bool) -> int:
    """Return K, at least 1 and at most the number of entries. A policy that acts each step holds K from then on."""
    wanted = target(budget, course, match)
    k = round(wanted if acts_each_step else wanted - course.grown(match))
    return min(max(k, 1), round(course.full(match)) if acts_each_step else course.n)


def settled(answer: Callable[[int], T], steps_of: Callable[[T], int], k_of: Callable[[int], int], first: int) -> T:
    """Return the answer whose K matches its own length, which is not known in advance.

    Args:
        answer: computes the answer with the K of a given number of steps.
        steps_of: returns the number of steps of an answer.
        k_of: returns K for an answer of a given number of steps.
        first: number of steps to begin with.

    The answer is repeated with the K of its length until that K is the one that it was computed with. If this does not
    converge, the last of `TRIES` answers is used; its row states the entries that it held.
    """
    steps = first
    for _ in range(TRIES):
        k = k_of(steps)
        found = answer(steps)
        steps = steps_of(found)
        if k_of(steps) == k:
            break
    return found
