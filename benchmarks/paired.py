"""Paired differences, ratios and claims: coverage, width, false alarms and power of their common inference.

    python benchmarks/paired.py [--samples 4000] [--write docs/statistics.md]

The grid of true distributions is defined here. ``--write`` writes the tables into docs/statistics.md. Exit status 1 if
an interval fails the criterion (mean coverage of at least 94 % at every n, minimum coverage of at least 90 % from n =
20), or if false alarms exceed 5 % by more than chance (a binomial test at 0.1 %, so that one of fifty truths rarely
fails by chance).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from coverage import CONFIDENCE, F1_LIKE, SIZES, Draw, Row, covers, mixture, of_sizes, row
from document import put, table
from scipy.stats import binomtest

from kv_transition.stats import multiplicity, paired
from kv_transition.studies.grid.analysis.noninferiority import KEPT, margin

ALPHA = 1 - CONFIDENCE
LUCK = 0.001
# probability that the policy alone is right, that the full cache alone is
PAIRED = ((0, 0.02), (0, 0.1), (0, 0.3), (0.05, 0.05), (0.02, 0.2), (0, 0.5), (0, 0.7), (0, 0.95), (0.1, 0.4))
# F1-like score of the full cache, of an answer that the policy changes, and how often it does
GRADED_PAIRS = tuple((F1_LIKE[i], F1_LIKE[j], c) for i, j in ((0, 4), (1, 2), (2, 4), (3, 3)) for c in (0.05, 0.2, 0.6))
# true success rate of the full cache, how often the policy keeps a right answer, how often it rights a wrong one
RATIOS = tuple(
    (right, keep, gain)
    for right in (0.95, 0.6, 0.3)
    for keep, gain in ((1.0, 0.0), (0.98, 0.0), (0.9, 0.1), (0.7, 0.0), (0.5, 0.1), (0.1, 0.05))
)
# share of the pairs that differ, half of them either way; 1: all do
COINS = (0.02, 0.06, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0)
# probability of a large loss, its size, probability of a gain that makes up for it on average
SKEWED = ((0.05, 0.9, 0.95), (0.1, 0.5, 0.9), (0.02, 0.9, 0.98), (0.03, 1.0, 0.3), (0.1, 1.0, 0.5), (0.05, 0.4, 0.2))
POWER = ((0.0, 0.1), (0.02, 0.2), (0.05, 0.3), (0.0, 0.5))
# policies whose difference is 0, and the losses of the others, in one family
FAMILIES = ((10, ()), (8, (0.3, 0.3)), (5, (0.1, 0.2, 0.3, 0.4, 0.5)), (2, (0.3,) * 8))


def discordant(more: float, less: float) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        u = rng.random((rows, n))
        return np.where(u < more, 1.0, np.where(u < more + less, -1.0, 0.0))

    return draw, more - less


def graded(full: tuple, changed: tuple, share: float) -> tuple[Draw, float]:
    draw_full, mean_full, _ = mixture(*full)
    draw_changed, mean_changed, _ = mixture(*changed)

    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        before = draw_full(rng, rows, n)
        return np.where(rng.random((rows, n)) < share, draw_changed(rng, rows, n) - before, 0.0)

    return draw, share * (mean_changed - mean_full)


def right_or_wrong(rng: np.random.Generator, rows: int, n: int, right: float, keep: float, gain: float) -> tuple:
    full = (rng.random((rows, n)) < right).astype(float)
    return (rng.random((rows, n)) < np.where(full > 0, keep, gain)).astype(float), full


def lopsided(loss: float, size: float, gain: float) -> Draw:
    """Return differences with mean 0: rare losses, and gains that are small enough to balance them."""

    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        u = rng.random((rows, n))
        return np.where(u < loss, -size, np.where(u < loss + gain, size * loss / gain, 0.0))

    return draw


def intervals(samples: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    pairs = {"0/1": [discordant(*t) for t in PAIRED], "F1-like": [graded(*t) for t in GRADED_PAIRS]}
    for n in SIZES:
        for kind, truths in pairs.items():
            found = [
                covers(paired.difference(draw(rng, samples, n)).interval(CONFIDENCE), truth) for draw, truth in truths
            ]
            yield row(f"paired difference, {kind}", n, found)
        found = []
        for right, keep, gain in RATIOS:
            policy, full = right_or_wrong(rng, samples, n, right, keep, gain)
            found.append(covers(paired.ratio(policy, full, CONFIDENCE), keep + gain * (1 - right) / right))
        yield row("ratio of paired means", n, found)


def nulls() -> dict[str, list[Draw]]:
    """Return the true distributions without a difference."""
    same = [(F1_LIKE[i], F1_LIKE[i], c) for i in (0, 3, 8) for c in (0.05, 0.2, 0.6, 1.0)]
    return {
        "0/1": [discordant(c / 2, c / 2)[0] for c in COINS],
        "F1-like": [graded(*t)[0] for t in same],
        "rare losses against small gains": [lopsided(*t) for t in SKEWED],
    }


def alarms(samples: int) -> Iterator[tuple[str, int, list[float]]]:
    """Return the shares of p < 5 % if there is no difference."""
    rng = np.random.default_rng(1)
    for n in SIZES:
        for name, draws in nulls().items():
            yield name, n, [float(np.mean(paired.difference(draw(rng, samples, n)).p < ALPHA)) for draw in draws]


def power(samples: int) -> Iterator[list[str]]:
    rng = np.random.default_rng(3)
    for gain, loss in POWER:
        shares = []
        for n in SIZES:
            tested = paired.difference(discordant(gain, loss)[0](rng, samples, n))
            shares.append(f"{np.mean((tested.p < ALPHA) & (tested.estimate < 0)):.2f}")
        yield [f"{100 * loss:.0f} % of the pairs lost, {100 * gain:.0f} % gained", *shares]


def families(samples: int) -> Iterator[list[str]]:
    """Ten policies in a family: any false loss or gain; any interval, at the level shown, that misses its truth."""
    rng = np.random.default_rng(4)
    for same, losses in FAMILIES:
        truths, shares = [0.0] * same + [-loss for loss in losses], []
        for n in (20, 40, 100):
            wrong, missed, runs = 0, 0, samples // 4
            for _ in range(runs):
                draws = [discordant(0.1, 0.1 - truth)[0](rng, 1, n)[0] for truth in truths]
                tested = paired.difference(np.array(draws))
                levels = multiplicity.levels(tested.p, ALPHA)
                at = tested.interval(1 - levels)
                apart = (at.low > 0) | (at.high < 0)
                wrong += bool((apart & (np.sign(tested.estimate) != np.sign(truths))).any())
                missed += bool(((at.low > np.array(truths) + 1e-9) | (at.high < np.array(truths) - 1e-9)).any())
            shares.append(f"{wrong / runs:.3f}, {missed / runs:.3f}")
        yield [f"{same} of 10 differ by 0, the others lose {', '.join(f'{v:g}' for v in losses) or '–'}", *shares]


def noninferiority(samples: int) -> Iterator[tuple[str, list[str]]]:
    """How often a policy is called non-inferior: at exactly 95 % of the full score, and where nothing is lost."""
    rng, sizes = np.random.default_rng(2), (20, 40, 100, 200, 400)
    kept, level = KEPT, (1 - CONFIDENCE) / 2

    def claims(n: int, right: float, keep: float, gain: float) -> float:
        policy, full = right_or_wrong(rng, samples, n, right, keep, gain)
        return float(np.mean(margin(policy - kept * full, kept).p_above < level))

    yield "n", [str(n) for n in sizes]
    at_margin = [
        (right, kept - gain * (1 - right) / right, gain) for right in (0.95, 0.8, 0.6, 0.3) for gain in (0, 0.1)
    ]
    worst = [max(claims(n, *truth) for truth in at_margin) for n in sizes]
    yield "kept exactly 95 % (wrong claims; worst of 8 truths)", [f"{share:.3f}" for share in worst]
    for keep, gain in ((1.0, 0.0), (0.99, 0.01), (0.97, 0.03)):
        shares = [claims(n, 0.9, keep, gain) for n in sizes]
        lost = f"{100 * (1 - keep):.0f} % of right answers lost, {100 * gain:.0f} % of wrong ones gained"
        yield f"power, full cache right in 90 %, {lost}", [f"{share:.2f}" for share in shares]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    np.seterr(all="ignore")
    found: dict[str, dict[int, Row]] = {}
    for r in intervals(arguments.samples):
        found.setdefault(r.name, {})[r.n] = r
    text = of_sizes(found, SIZES, lambda r: f"{np.mean(r.covered):.3f} ({min(r.covered):.2f})", "mean coverage (worst)")
    widths = of_sizes(found, SIZES, lambda r: f"{np.mean(r.width):.3f}", "width").replace("inf", "open")
    false: dict[str, dict[int, list[float]]] = {}
    for name, n, shares in alarms(arguments.samples):
        false.setdefault(name, {})[n] = shares
    lines = [[name, *(f"{np.mean(of[n]):.3f} ({max(of[n]):.3f})" for n in SIZES)] for name, of in false.items()]
    size = table(["p < 0.05 where nothing differs: mean (worst)", *(f"n = {n}" for n in SIZES)], lines)
    strong = table(["loss found at p < 0.05", *(f"n = {n}" for n in SIZES)], list(power(arguments.samples)))
    head = "a family of ten: any wrong loss or gain, any interval that misses"
    family = table([head, *(f"n = {n}" for n in (20, 40, 100))], list(families(arguments.samples)))
    first, *rest = [[name, *shares] for name, shares in noninferiority(arguments.samples)]
    claims = table(["share of claims", *(f"n = {n}" for n in first[1:])], rest)
    pages = {"paired": f"{text}\n\n{widths}", "false differences": f"{size}\n\n{strong}\n\n{family}",
             "noninferiority": claims}  # fmt: skip
    for name, page in pages.items():
        print(page, end="\n\n")
        if arguments.write:
            put(arguments.write, name, page)
    worst = max(share for of in false.values() for shares in of.values() for share in shares)
    samples = arguments.samples
    lucky = binomtest(round(worst * samples), samples, ALPHA, alternative="greater").pvalue >= LUCK
    return int(not (lucky and all(r.passes for of in found.values() for r in of.values())))


if __name__ == "__main__":
    sys.exit(main())
