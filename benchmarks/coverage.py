"""Coverage and width of the intervals of single statistics (paired ones: paired.py).

    python benchmarks/coverage.py [--samples 4000] [--write docs/statistics.md]

The grid of true distributions is defined here. ``--write`` writes the tables into docs/statistics.md. Exit status 1 if
an interval fails the criterion: mean coverage of at least 94 % at every n, and minimum coverage of at least 90 % from n
= 20.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from document import put, table

from kv_transition.stats import intervals
from kv_transition.stats.intervals import Interval

SIZES = (5, 10, 20, 40, 100)
CONFIDENCE = 0.95
MEAN_BAR, WORST_BAR, WORST_FROM = 0.94, 0.90, 20
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# probability of 0, of 1, and the Beta(a, b) of the rest
F1_LIKE = (
    (0.02, 0.9, 2, 2), (0.05, 0.8, 2, 2), (0.1, 0.6, 2, 2), (0.3, 0.3, 2, 2), (0.6, 0.1, 2, 2), (0.8, 0.05, 2, 2),
    (0.9, 0.02, 2, 2), (0.0, 0.0, 5, 1), (0.05, 0.0, 8, 2), (0.02, 0.0, 8, 2), (0.0, 0.0, 2, 5),
)  # fmt: skip
# success rate and correlation within a document of five examples
CLUSTERED = tuple((p, rho) for p in (0.05, 0.2, 0.5, 0.9) for rho in (0.02, 0.2, 0.6))
PER_DOCUMENT = 5

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def coin(p: float) -> tuple[Draw, float, float]:
    """Return a function that draws values ``[rows, n]``, and their true mean and standard deviation."""
    return lambda rng, rows, n: (rng.random((rows, n)) < p).astype(float), p, (p * (1 - p)) ** 0.5


def mixture(zero: float, one: float, a: float, b: float) -> tuple[Draw, float, float]:
    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        u = rng.random((rows, n))
        return np.where(u < zero, 0.0, np.where(u < zero + one, 1.0, rng.beta(a, b, (rows, n))))

    rest = 1 - zero - one
    mean = one + rest * a / (a + b)
    square = one + rest * a * (a + 1) / ((a + b) * (a + b + 1))
    return draw, mean, (square - mean**2) ** 0.5


def beta_binomial(rng: np.random.Generator, rows: int, documents: int, p: float, rho: float) -> np.ndarray:
    """Return 0/1 answers ``[rows, documents x PER_DOCUMENT]`` with correlation ``rho`` within a document."""
    strength = 1 / rho - 1
    rates = rng.beta(p * strength, (1 - p) * strength, (rows, documents)).repeat(PER_DOCUMENT, axis=1)
    return (rng.random(rates.shape) < rates).astype(float)


@dataclass
class Row:
    name: str
    n: int
    covered: list[float]
    width: list[float]

    @property
    def passes(self) -> bool:
        return np.mean(self.covered) >= MEAN_BAR and (self.n < WORST_FROM or min(self.covered) >= WORST_BAR)


def covers(found: Interval, truth: float) -> tuple[float, float]:
    """Return the share of the samples whose interval covers the truth (an open end covers), and the median width."""
    known = np.isfinite(found.estimate)
    low, high = np.where(np.isnan(found.low), -np.inf, found.low), np.where(np.isnan(found.high), np.inf, found.high)
    width = np.where(np.isfinite(high - low), high - low, np.inf)[known]
    return float(np.mean(((low <= truth + 1e-9) & (truth - 1e-9 <= high))[known])), float(np.median(width))


def rows(samples: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    grids = {"0/1": [coin(p) for p in RATES], "F1-like": [mixture(*t) for t in F1_LIKE]}
    for n in SIZES:
        for kind, truths in grids.items():
            for what, function in (("mean", intervals.bounded_mean), ("standard deviation", intervals.bounded_std)):
                found = [
                    covers(function(draw(rng, samples, n), CONFIDENCE), mean if what == "mean" else std)
                    for draw, mean, std in truths
                ]
                yield row(f"{what}, {kind}", n, found)
        times = rng.lognormal(0, 0.3, (samples, n))
        yield row("median of times", n, [covers(intervals.percentile(times, 0.5, CONFIDENCE), 1.0)])
        logs = rng.normal(0.3, 0.2, (samples, n))
        yield row("speedup", n, [covers(intervals.geometric_mean(logs, CONFIDENCE), np.exp(0.3))])
    for documents in (4, 8, 20, 40):
        n = documents * PER_DOCUMENT
        codes = np.tile(np.arange(documents).repeat(PER_DOCUMENT), (samples, 1))
        for name, of in ((f"{PER_DOCUMENT} examples a document", codes), ("the same, documents ignored", None)):
            found = [
                covers(
                    intervals.bounded_mean(beta_binomial(rng, samples, documents, p, rho), CONFIDENCE, clusters=of), p
                )
                for p, rho in CLUSTERED
            ]
            yield row(name, n, found)


def row(name: str, n: int, found: list[tuple[float, float]]) -> Row:
    return Row(name, n, [f[0] for f in found], [f[1] for f in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, dict[int, Row]] = {}
    for r in rows(arguments.samples):
        print(f"{r.name:32} n={r.n:4d}  mean {np.mean(r.covered):.3f}  worst {min(r.covered):.3f}  "
              f"width {np.mean(r.width):.3f}  {'' if r.passes else 'MISSES THE BAR'}", flush=True)  # fmt: skip
        found.setdefault(r.name, {})[r.n] = r
    if arguments.write:
        text = of_sizes(
            found, SIZES, lambda r: f"{np.mean(r.covered):.3f} ({min(r.covered):.2f})", "mean coverage (worst)"
        )
        widths = of_sizes(found, SIZES, lambda r: _width(np.mean(r.width)), "width")
        documents = of_sizes(found, (20, 40, 100, 200), lambda r: f"{np.mean(r.covered):.3f} ({min(r.covered):.2f}), "
                        f"{_width(np.mean(r.width))}", "mean coverage (worst), width")  # fmt: skip
        put(arguments.write, "coverage", f"{text}\n\n{widths}\n\n{documents}")
    judged = [r for of in found.values() for r in of.values() if not r.name.endswith("ignored")]
    return int(not all(r.passes for r in judged))


def _width(width: float) -> str:
    return f"{width:.3f}" if np.isfinite(width) else "open"


def of_sizes(found: dict[str, dict[int, Row]], sizes: tuple, text: Callable[[Row], str], head: str) -> str:
    lines = [[name, *(text(of[n]) for n in sizes)] for name, of in found.items() if set(sizes) <= set(of)]
    return table([head, *(f"n = {n}" for n in sizes)], lines)


if __name__ == "__main__":
    sys.exit(main())
