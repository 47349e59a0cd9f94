"""The transition detector on simulated curves: false alarms, power, error of the onset bin, looks at growing data.

    python benchmarks/transition_power.py [--experiments 400] [--only alarms|power|looks] [--write docs/statistics.md]

Exit status 1 if false alarms exceed 5 % by more than chance (a binomial test at 1 %).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from document import put, table
from scipy.stats import binomtest

from kv_transition.stats import intervals
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import adaptive
from kv_transition.studies.grid.analysis.instability import Point
from kv_transition.studies.grid.analysis.outcomes import BUDGET, LENGTH, Axis
from kv_transition.studies.grid.analysis.transition import Verdict, detect

RESAMPLES = 300
SIZES = (10, 20, 40, 100)
ONSET, COLLAPSE = 2, 4  # of five points
EXCESS = (0.1, 0.2, 0.3, 0.4)
KINDS = {"Bernoulli": None, "beta, precision 1": 1.0, "beta, precision 4": 4.0}
DECLINES = {"level": (1.0,) * 5, "slow": (1.0, 0.98, 0.95, 0.9, 0.85), "steep": (1.0, 0.95, 0.85, 0.7, 0.55)}


def scores(rng: np.random.Generator, precision: float | None, mean: float, n: int) -> np.ndarray:
    """Return scores with this mean: 0 or 1, or from a beta distribution with this precision."""
    if precision is None:
        return (rng.random(n) < mean).astype(float)
    return rng.beta(mean * precision, (1 - mean) * precision, n)


def point(at: int, policy: tuple[np.ndarray, np.ndarray], full: tuple[np.ndarray, np.ndarray], axis: Axis) -> Point:
    """Return a point from the scores and failures of policy and full cache."""
    none = np.full(len(policy[0]), np.nan)
    bin, budget = (at, "r1") if axis is LENGTH else (0, f"r{0.9 - 0.15 * at:.2f}")
    return Point(
        bin, (at, at + 1), policy[0], policy[1].astype(float), full[0], full[1].astype(float), none, none, budget
    )


def run(make: Callable[[np.random.Generator], list[Point]], experiments: int, seed: int, axis: Axis) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    settings = Statistics(resamples=RESAMPLES)
    return [detect(make(rng), "", settings, axis) for _ in range(experiments)]


def null(
    n: int, precision: float | None, top: float, decline: Sequence[float], failures: float, axis: Axis
) -> Callable[[np.random.Generator], list[Point]]:
    """Nothing unstable: the mean declines, as the full cache's does; failures are as common with both."""

    def make(rng: np.random.Generator) -> list[Point]:
        points, shared = [], None
        for at, share in enumerate(decline):
            mean = top * (1 - 0.03 * at) if axis is LENGTH else top
            if shared is None or axis is LENGTH:  # within a bin all budgets meet the same answers of the full cache
                shared = scores(rng, precision, mean, n), rng.random(n) < failures
            points.append(point(at, (scores(rng, precision, mean * share, n), rng.random(n) < failures), shared, axis))
        return points

    return make


def zone(n: int, excess: float, dispersion: bool) -> Callable[[np.random.Generator], list[Point]]:
    """Unstable from `ONSET` on, collapsed at `COLLAPSE`.

    The instability is more failures (0.02 and ``excess`` of the answers fail, and score 0), or dispersion: graded
    scores of precision 8, of which the share ``excess`` becomes 0 or 1 at the same mean.
    """

    def make(rng: np.random.Generator) -> list[Point]:
        points = []
        for at in range(5):
            rate = 0.02 + (excess if at >= ONSET and not dispersion else 0)
            mean = 0.1 if at == COLLAPSE else 0.6 if dispersion else 0.92
            precision = 8.0 if dispersion else None
            full, own = scores(rng, precision, 0.6 if dispersion else 0.92, n), scores(rng, precision, mean, n)
            failed, full_failed = rng.random(n) < rate, rng.random(n) < 0.02
            if dispersion:
                if at >= ONSET and at != COLLAPSE:
                    own = np.where(rng.random(n) < excess, (rng.random(n) < mean).astype(float), own)
            else:
                own, full = np.where(failed, 0, own), np.where(full_failed, 0, full)
            points.append(point(at, (own, failed), (full, full_failed), LENGTH))
        return points

    return make


def false_alarms(experiments: int) -> tuple[list[list[str]], int, int]:
    """Return onsets and collapses where there are none: the maximum number of onsets of one null, and the total of
    nulls.
    """
    lines, worst, nulls = [], 0, 0
    for axis in (LENGTH, BUDGET):
        for kind, precision in KINDS.items():
            for n in (20, 100):
                onsets, collapses, tried = [], [], 0
                for top in (0.95, 0.7):
                    for decline in DECLINES.values():
                        for failures in (0.02, 0.15):
                            make = null(n, precision, top, decline, failures, axis)
                            found = run(make, experiments, 1000 + nulls, axis)
                            onsets.append(sum(v.onset is not None for v in found))
                            collapses.append(sum(v.collapse is not None for v in found))
                            nulls, tried = nulls + 1, tried + experiments
                worst = max(worst, *onsets, *collapses)
                lines.append([
                    f"along the {axis.plural}, {kind}", str(n),
                    f"{sum(onsets) / tried:.3f} ({max(onsets) / experiments:.3f})",
                    f"{sum(collapses) / tried:.3f} ({max(collapses) / experiments:.3f})",
                ])  # fmt: skip
                print(*lines[-1], sep="  ", flush=True)
    return lines, worst, nulls


def power(experiments: int) -> list[list[str]]:
    lines = []
    for name, dispersion in (("failures", False), ("dispersion", True)):
        for excess in EXCESS if not dispersion else (0.3, 0.6, 1.0):
            cells = []
            for n in SIZES:
                found = run(zone(n, excess, dispersion), experiments, 5, LENGTH)
                onsets = np.array([v.onset for v in found if v.onset is not None])
                early = np.mean([v.onset is not None and v.onset < ONSET for v in found])
                error = f"{np.abs(onsets - ONSET).mean():.2f}" if len(onsets) else "–"
                collapse = np.mean([v.collapse == COLLAPSE for v in found])
                cells.append(f"{len(onsets) / experiments:.2f}, {error}, {early:.3f}, {collapse:.2f}")
            lines.append([f"{name} + {excess:g}", *cells])
            print(*lines[-1], sep="  |  ", flush=True)
    return lines


def looks(experiments: int, samples: int) -> tuple[list[list[str]], int]:
    """Alpha spending at work: intervals that hold at all looks together, and alarms of the adaptive rule."""
    plan, rng = adaptive.Adaptive(enabled=True), np.random.default_rng(3)
    confidences = [adaptive.confidence(plan, look) for look in range(len(plan.sizes))]
    lines = []
    for name, spending in (("95 % at every look", False), ("alpha spending", True)):
        held = []
        for p in (0.05, 0.2, 0.5, 0.8, 0.95):
            data = (rng.random((samples, plan.cap)) < p).astype(float)
            inside = np.ones(samples, bool)
            for n, confidence in zip(plan.sizes, confidences, strict=True):
                found = intervals.bounded_mean(data[:, :n], confidence if spending else 0.95)
                inside &= (found.low <= p) & (p <= found.high)
            held.append(float(inside.mean()))
        lines.append([f"intervals of a rate hold at all looks: {name}", f"{np.mean(held):.3f} ({min(held):.3f})"])
        print(*lines[-1], sep="  ", flush=True)
    alarms = 0
    for spending in (False, True):
        count, used = 0, []
        for i in range(experiments):
            verdict, examples = _grow(null(plan.cap, 1.0, 0.7, DECLINES["steep"], 0.15, LENGTH), i, plan, spending)
            count += verdict.onset is not None
            used.append(examples)
        name = "alpha spending" if spending else "95 % at every look"
        lines.append([f"onset claimed where there is none: {name}", f"{count / experiments:.3f}"])
        print(*lines[-1], f"examples used {np.mean(used):.0f}", sep="  ", flush=True)
        alarms = count if spending else alarms
    for excess in (0.3, 0.5):
        found, used = [], []
        for i in range(experiments):
            verdict, examples = _grow(zone(plan.cap, excess, False), i, plan, True)
            found.append(verdict.onset)
            used.append(examples)
        fixed = run(zone(plan.cap, excess, False), experiments, 77, LENGTH)
        share = np.mean([f is not None for f in found])
        lines.append([
            f"failures + {excess:g}: onset found adaptively (with all {5 * plan.cap} examples); examples used",
            f"{share:.2f} ({np.mean([v.onset is not None for v in fixed]):.2f}); {np.mean(used):.0f}",
        ])  # fmt: skip
        print(*lines[-1], sep="  ", flush=True)
    return lines, alarms


def _grow(
    make: Callable[[np.random.Generator], list[Point]], seed: int, plan: adaptive.Adaptive, spending: bool
) -> tuple[Verdict, int]:
    """One adaptive experiment: bins grow where `adaptive.open_bins` says so, to the cap at most."""
    whole = make(np.random.default_rng([9, seed]))
    have = [plan.start] * len(whole)
    for look in range(len(plan.sizes)):
        points = [_part(p, n) for p, n in zip(whole, have, strict=True)]
        open_at: set[int] = set()
        for confidence in (
            0.95,
            adaptive.confidence(plan, look) if spending else 0.95,
        ):  # the second is what is claimed
            verdict = detect(points, "", Statistics(confidence=confidence, resamples=RESAMPLES))
            row = {"onset_bin": verdict.onset, "collapse_bin": verdict.collapse}
            open_at |= set(adaptive.open_bins(row | {"details": json.dumps(verdict.details)}, 0.95))
        wanting = [b for b in open_at if have[b] < plan.cap]
        if not wanting or look + 1 == len(plan.sizes):
            break
        for b in wanting:
            have[b] = min(have[b] + plan.step, plan.cap)
    return verdict, sum(have)


def _part(p: Point, n: int) -> Point:
    arrays = (p.score, p.failed, p.full_score, p.full_failed, p.score_var, p.full_score_var)
    return Point(p.bin, p.tokens, *(a[:n] for a in arrays), budget=p.budget)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=400)
    parser.add_argument("--only", choices=("alarms", "power", "looks"))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    experiments = arguments.experiments
    wanted = (arguments.only,) if arguments.only else ("alarms", "power", "looks")
    tables, too_many = {}, False
    if "alarms" in wanted:
        lines, worst, tested = false_alarms(experiments)
        tables["false alarms"] = table(
            ["null", "n", "onset: mean over 12 nulls (worst)", "collapse: mean (worst)"], lines
        )
        too_many = binomtest(worst, experiments, 0.05, "greater").pvalue < 0.01 / tested
    if "power" in wanted:
        head = ["onset in bin 2, collapse in bin 4", *(f"n = {n}" for n in SIZES)]
        tables["power"] = table(head, power(experiments))
    if "looks" in wanted:
        lines, alarms = looks(experiments, 10 * experiments)
        tables["looks"] = table(["eight looks, 5 to 40 examples a bin", "share"], lines)
        too_many |= binomtest(alarms, experiments, 0.05, "greater").pvalue < 0.01
    if arguments.write:
        for name, text in tables.items():
            put(arguments.write, name, text)
    return int(too_many)


if __name__ == "__main__":
    sys.exit(main())
