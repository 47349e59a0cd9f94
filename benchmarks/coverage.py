"""How often the intervals cover the truth, and how often the transition detector raises a false alarm.

    python benchmarks/coverage.py [--samples 4000]

The grid of truths is fixed here; docs/statistics.md holds the numbers of one run.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np

from kv_transition.analysis import intervals
from kv_transition.analysis.aggregate import Statistics
from kv_transition.analysis.transition import Bin, detect

SIZES = (5, 10, 20, 40, 100)
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# probability of 0, of 1, and the Beta(a, b) of the rest
F1_LIKE = (
    (0.02, 0.9, 2, 2), (0.05, 0.8, 2, 2), (0.1, 0.6, 2, 2), (0.3, 0.3, 2, 2), (0.6, 0.1, 2, 2), (0.8, 0.05, 2, 2),
    (0.9, 0.02, 2, 2), (0.0, 0.0, 5, 1), (0.05, 0.0, 8, 2), (0.02, 0.0, 8, 2), (0.0, 0.0, 2, 5),
)  # fmt: skip
# probability that the policy alone is right, that the full cache alone is
PAIRED = ((0, 0.02), (0, 0.1), (0, 0.3), (0.05, 0.05), (0.02, 0.2), (0, 0.5), (0, 0.7), (0, 0.95), (0.1, 0.4))

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def coin(p: float) -> tuple[Draw, float, float]:
    return lambda rng, rows, n: (rng.random((rows, n)) < p).astype(float), p, (p * (1 - p)) ** 0.5


def mixture(zero: float, one: float, a: float, b: float) -> tuple[Draw, float, float]:
    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        u = rng.random((rows, n))
        return np.where(u < zero, 0.0, np.where(u < zero + one, 1.0, rng.beta(a, b, (rows, n))))

    rest = 1 - zero - one
    mean = one + rest * a / (a + b)
    square = one + rest * a * (a + 1) / ((a + b) * (a + b + 1))
    return draw, mean, (square - mean**2) ** 0.5


def discordant(more: float, less: float) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        u = rng.random((rows, n))
        return np.where(u < more, 1.0, np.where(u < more + less, -1.0, 0.0))

    return draw, more - less


def report(name: str, n: int, covered: list[float], width: list[float]) -> None:
    print(f"{name:28} n={n:4d}  mean {np.mean(covered):.3f}  worst {min(covered):.3f}  width {np.mean(width):.3f}")


def coverage(samples: int) -> None:
    rng = np.random.default_rng(0)
    grids = {"0/1": [coin(p) for p in RATES], "F1-like": [mixture(*t) for t in F1_LIKE]}
    for n in SIZES:
        for kind, truths in grids.items():
            for what in ("mean", "std"):
                covered, width = [], []
                for draw, mean, std in truths:
                    function = intervals.bounded_mean if what == "mean" else intervals.bounded_std
                    found, truth = function(draw(rng, samples, n), 0.95), mean if what == "mean" else std
                    covered.append(np.mean((found.low <= truth + 1e-9) & (truth - 1e-9 <= found.high)))
                    width.append(np.mean(found.high - found.low))
                report(f"{what}, {kind}", n, covered, width)
        covered, width = [], []
        for draw, truth in (discordant(*t) for t in PAIRED):
            found = intervals.bounded_mean(draw(rng, samples, n), 0.95, bounds=(-1, 1))
            covered.append(np.mean((found.low <= truth + 1e-9) & (truth - 1e-9 <= found.high)))
            width.append(np.mean(found.high - found.low))
        report("paired difference", n, covered, width)
        covered, width = [], []
        for right in (0.95, 0.6, 0.3):
            for keep, gain in ((1.0, 0.0), (0.98, 0.0), (0.9, 0.1), (0.7, 0.0), (0.5, 0.1), (0.1, 0.05)):
                full = (rng.random((samples, n)) < right).astype(float)
                policy = (rng.random((samples, n)) < np.where(full > 0, keep, gain)).astype(float)
                truth = keep + gain * (1 - right) / right
                found = intervals.ratio(policy, full, 0.95)
                known = np.isfinite(found.estimate)
                high = np.where(np.isnan(found.high), np.inf, found.high)
                covered.append(np.mean(((found.low <= truth) & (truth <= high))[known]))
                width.append(float(np.median(np.where(np.isfinite(high), high - found.low, 9)[known])))
        report("ratio (width: median)", n, covered, width)


def false_alarms(samples: int) -> None:
    """Onsets where nothing is unstable: the mean declines, the failures are the full cache's, phi is constant."""
    rng = np.random.default_rng(1)
    settings = Statistics(resamples=400)
    for name, precision in (("Bernoulli", None), ("beta, precision 1", 1.0), ("beta, precision 4", 4.0)):
        for top in (0.95, 0.7):
            alarms = 0
            for _ in range(samples):
                bins = []
                for b, share in enumerate((1.0, 0.95, 0.85, 0.7, 0.55)):
                    full, policy = (_scores(rng, precision, top * (1 - 0.03 * b) * s, 20) for s in (1.0, share))
                    failed, full_failed = rng.random((2, 20)) < 0.1
                    none = np.full(20, np.nan)
                    bins.append(Bin(b, (b, b + 1), policy, failed * 1.0, full, full_failed * 1.0, none, none))
                alarms += detect(bins, "", settings).onset is not None
            print(f"false onsets, {name}, full cache from {top}: {alarms / samples:.3f} of {samples}")


def _scores(rng: np.random.Generator, precision: float | None, mean: float, n: int) -> np.ndarray:
    if precision is None:
        return (rng.random(n) < mean).astype(float)
    return rng.beta(mean * precision, (1 - mean) * precision, n)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--experiments", type=int, default=400)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    coverage(arguments.samples)
    false_alarms(arguments.experiments)
