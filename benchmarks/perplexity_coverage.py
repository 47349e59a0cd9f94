"""How often the intervals of perplexity and of its ratio to the full cache cover the truth.

    python benchmarks/perplexity_coverage.py [--simulations 1000] [--write docs/perplexity.md]

Books differ (normal, or skewed as a gamma), windows of a book differ less, a policy costs a known amount that differs
between books and windows too. Uneven: the first book has ten times as many windows as each of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from document import put, table

from kv_transition.stats.examples import Statistics
from kv_transition.studies.perplexity.analysis import share

LEVEL, COST = 3.0, 0.05  # nats a token: the full cache's, and what the policy adds
TOKENS, RESAMPLES = 64, 1000
SIZES = ((5, 4), (10, 5), (20, 5), (40, 2))


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Mean 0 and variance 1, skewness 2."""
    return rng.exponential(size=shape) - 1


TRUTHS = {"normal": (normal, False), "skewed": (skewed, False), "normal, uneven": (normal, True)}


def covered(name: str, books: int, windows: int, simulations: int) -> tuple[float, float]:
    draw, uneven = TRUTHS[name]
    rng, statistics = np.random.default_rng([books, windows, *name.encode()]), Statistics(resamples=RESAMPLES)
    sizes = [10 * windows if uneven and not book else windows for book in range(books)]
    book = np.repeat(np.arange(books), sizes)
    tokens, hits = np.full(len(book), float(TOKENS)), np.zeros(2)
    for _ in range(simulations):
        full = LEVEL + 0.4 * draw(rng, (books,))[book] + 0.15 * draw(rng, book.shape)
        more = COST + 0.03 * draw(rng, (books,))[book] + 0.05 * draw(rng, book.shape)
        found = share(full * TOKENS, tokens, book, statistics), share(more * TOKENS, tokens, book, statistics)
        hits += [s.low <= truth <= s.high for s, truth in zip(found, (LEVEL, COST), strict=True)]
    return tuple(hits / simulations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    lines = []
    for name in TRUTHS:
        for books, windows in SIZES:
            found = covered(name, books, windows, arguments.simulations)
            lines.append([name, f"{books} × {windows}", *(f"{value:.3f}" for value in found)])
    text = table(["books and windows", "books × windows", "perplexity", "ratio to full"], lines)
    print(text)
    if arguments.write:
        put(arguments.write, "coverage", f"{text}\n\n{arguments.simulations} simulations of each.")


if __name__ == "__main__":
    main()
