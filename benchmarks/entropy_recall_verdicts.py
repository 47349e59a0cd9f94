"""Verdicts on steps with a known association of entropy and recall, and coverage of the intervals.

    python benchmarks/entropy_recall_verdicts.py [--simulations 500] [--sizes 10 20 40] [--only driven by_length ...]
        [--processes 1] [--write docs/entropy_recall.md]

A verdict is wrong if it confirms a false hypothesis, or does not confirm a true one. Undecided is never wrong, but the
share of the expected verdicts is also listed. Exit status 1 if more than 5 % of the verdicts on any truth are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import simulated_steps as simulated
from document import put, table

from kv_transition.stats.examples import Statistics
from kv_transition.studies.recall.analysis import analyse
from kv_transition.studies.recall.verdict import AFTER_CONTROLLING, CONFIRMED, NOT_CONFIRMED, OUTCOMES, UNDECIDED

STEPS = 24
SIZES = (10, 20, 40)
RESAMPLES = 400
LARGE = 2000  # examples of the sample that stands for the truth
ALLOWED = 0.05

# What each truth is called, and the verdicts that are right (undecided is never wrong).
CONTROLLED = (NOT_CONFIRMED, AFTER_CONTROLLING)
TRUTHS = {
    "driven": ("entropy drives recall", (CONFIRMED,)),
    "unrelated": ("no relation", CONTROLLED),
    "by_length": ("both follow the length", CONTROLLED),
    "by_kind": ("both follow the kind of prompt", CONTROLLED),
    "by_step": ("both follow the step", CONTROLLED),
    "weak": ("a weak trend, criteria missed", CONTROLLED),
    "borderline": ("exactly at the criteria", (UNDECIDED, *CONTROLLED)),
}
COVERED = ("pearson", "spearman", "pearson_within", "spearman_within", "partial", "trend", "slope", "auroc")
COVERED_ON = ("driven", "unrelated", "weak", "by_length")


def wrong(found: str, right: tuple[str, ...]) -> bool:
    return found != UNDECIDED and found not in right


def truth(name: str) -> dict[str, float]:
    """Return the statistics of a very large sample."""
    cell = analyse(getattr(simulated, name)(np.random.default_rng(99), LARGE, STEPS), Statistics(resamples=2))
    return {statistic: cell.estimates[statistic].value for statistic in COVERED}


def run(name: str, n: int, simulations: int) -> tuple[str, int, Counter, Counter, dict[str, list[bool | None]]]:
    rng, statistics = np.random.default_rng([n, *name.encode()]), Statistics(resamples=RESAMPLES)
    raw, after, covered = Counter(), Counter(), defaultdict(list)
    known = truth(name) if name in COVERED_ON else {}
    for _ in range(simulations):
        cell = analyse(getattr(simulated, name)(rng, n, STEPS), statistics)
        raw[cell.verdict.outcome] += 1
        after[cell.controlled.outcome] += 1
        for statistic, value in known.items():
            found = cell.estimates[statistic]
            covered[statistic].append(found.low <= value <= found.high if found.bounded else None)
    return name, n, raw, after, dict(covered)


def share(count: int, simulations: int) -> str:
    return f"{count / simulations:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of examples")
    parser.add_argument("--only", nargs="+", choices=TRUTHS, default=list(TRUTHS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    simulations, worst, verdicts = arguments.simulations, 0.0, []
    coverage: dict[tuple[str, str], dict[int, list]] = defaultdict(dict)
    jobs = [(name, n, simulations) for name in arguments.only for n in arguments.sizes]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name, n, raw, after, covered in pool.map(run, *zip(*jobs, strict=True)):
            title, right = TRUTHS[name]
            mistakes = sum(count for outcome, count in after.items() if wrong(outcome, right))
            worst = max(worst, mistakes / simulations)
            shares = [share(after[outcome], simulations) for outcome in OUTCOMES]
            verdicts.append([title, str(n), share(raw[CONFIRMED], simulations), *shares, share(mistakes, simulations)])
            print(*verdicts[-1], sep="  ", flush=True)
            for statistic, hits in covered.items():
                coverage[title, statistic][n] = hits
    head = ["truth", "n", "confirmed before controlling", *OUTCOMES, "wrong"]
    lines = []
    for (title, statistic), by_n in coverage.items():
        cells = []
        for n in arguments.sizes:
            hits = [hit for hit in by_n[n] if hit is not None]
            cells.append(f"{np.mean(hits):.3f}" if len(hits) > simulations / 2 else "–")
        lines.append([title, statistic, *cells])
    covered_head = ["truth", "statistic", *(f"coverage, n = {n}" for n in arguments.sizes)]
    text = f"{table(head, verdicts)}\n\n{table(covered_head, lines)}"
    print(text)
    if arguments.write:
        put(arguments.write, "verdicts", text)
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
