"""Coverage of the intervals of perplexity and of its ratio to the full cache.

    python benchmarks/perplexity_coverage.py [--simulations 1000] [--write docs/perplexity.md]

Books differ (normally, or skewed as a gamma distribution), windows of a book differ less, and a policy has a known cost
that also differs between books and windows. Uneven: the first book has ten times as many windows as each of the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from document import put, table
from scipy.stats import binomtest

from kv_transition.stats.quotients import quotient

LEVEL, COST = 3.0, 0.05  # nats a token: the full cache's, and what the policy adds
TOKENS, CONFIDENCE, LUCK = 64, 0.95, 0.001
SIZES = ((5, 4), (10, 5), (20, 5), (40, 2))

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return draws with mean 0, variance 1 and skewness 2."""
    return rng.exponential(size=shape) - 1


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Mean 0 and variance 1, skewness 6.2."""
    return (rng.lognormal(size=shape) - np.exp(0.5)) / np.sqrt(np.e * (np.e - 1))


@dataclass(frozen=True)
class Truth:
    """How books and windows are drawn; ``uneven`` in size; ``windows``: whether these differ within a book."""

    draw: Draw
    uneven: bool = False
    windows: bool = True


TRUTHS = {
    "normal": Truth(normal),
    "skewed": Truth(skewed),
    "skewed, alone": Truth(skewed, windows=False),
    "heavy-tailed": Truth(heavy),
    "normal, uneven": Truth(normal, uneven=True),
    "skewed, uneven": Truth(skewed, uneven=True),
}
JUDGED = ("normal", "skewed", "normal, uneven", "skewed, uneven")


@dataclass(frozen=True)
class Found:
    """Shares over the simulations: intervals that cover, of perplexity and of the ratio, and false alarms; width."""

    perplexity: float
    ratio: float
    size: float
    width: float


def measured(name: str, books: int, windows: int, simulations: int) -> Found:
    truth = TRUTHS[name]
    rng = np.random.default_rng([books, windows, *name.encode()])
    sizes = [10 * windows if truth.uneven and not book else windows for book in range(books)]
    book = np.repeat(np.arange(books), sizes)
    tokens, rows = np.full(len(book), float(TOKENS)), []
    for _ in range(simulations):
        full, more = (
            between * truth.draw(rng, (books,))[book] + within * truth.windows * truth.draw(rng, book.shape)
            for between, within in ((0.4, 0.15), (0.03, 0.05))
        )
        found, ratio, null = (
            quotient(nats * TOKENS, tokens, book, CONFIDENCE) for nats in (LEVEL + full, COST + more, more)
        )
        covers = [s.low <= value <= s.high for s, value in ((found, LEVEL), (ratio, COST))]
        rows.append((*covers, null.p < 1 - CONFIDENCE, ratio.high - ratio.low))
    *shares, _ = np.mean(rows, axis=0)
    return Found(*shares, width=float(np.median([row[-1] for row in rows])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    lines, covered, ok = [], [], True
    for name in TRUTHS:
        for books, windows in SIZES:
            found = measured(name, books, windows, arguments.simulations)
            covered += [found.perplexity, found.ratio]
            if name in JUDGED:
                alarms = round(found.size * arguments.simulations)
                ok &= binomtest(alarms, arguments.simulations, 1 - CONFIDENCE, "greater").pvalue >= LUCK
                ok &= books < 20 or min(found.perplexity, found.ratio) >= 0.9
            cells = (found.perplexity, found.ratio, found.size, found.width)
            lines.append([name, f"{books} × {windows}", *(f"{value:.3f}" for value in cells)])
            print(*lines[-1], sep="  ", flush=True)
    head = ["books and windows", "books × windows", "perplexity", "ratio to full", "size", "width, log of the ratio"]
    text = f"{table(head, lines)}\n\n{arguments.simulations:,} simulations of each."
    if arguments.write:
        put(arguments.write, "coverage", text)
    return int(not (ok and np.mean(covered) >= 0.94))


if __name__ == "__main__":
    sys.exit(main())
