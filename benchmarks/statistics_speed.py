"""The time that the statistics take: 10,000 resamples of 100,000 rows.

    OMP_NUM_THREADS=1 python benchmarks/statistics_speed.py [--resamples 10000] [--write docs/statistics.md]

Both wall-clock seconds and CPU seconds are measured. On a busy machine only the CPU seconds are meaningful; on one
thread they bound the wall-clock time of an idle machine. Exit status 1 if the bootstrap of the transition zone, or that
of 100,000 rows in a single cell, takes more than 10 CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from document import put, table

from kv_transition.stats.clusters import resample_sums
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import transition
from kv_transition.studies.grid.analysis.aggregate import bin_stats
from kv_transition.studies.grid.analysis.comparisons import comparisons, pairs
from kv_transition.studies.grid.analysis.noninferiority import noninferiority
from kv_transition.studies.grid.tables import SCORES

ROWS, LIMIT = 100_000, 10.0


def scores(modes: int, policies: int, budgets: int, bins: int) -> pa.Table:
    """Return `ROWS` scored answers of this shape, two examples per document."""
    names = [("full", "r1"), *((f"p{p}", f"r0.{b + 1}") for p in range(policies) for b in range(budgets))]
    examples = ROWS // (modes * len(names) * bins)
    cells = pl.DataFrame({"policy": [n[0] for n in names], "budget": [n[1] for n in names]})
    frame = (
        pl.DataFrame({"mode": ["before_question", "after_prompt"][:modes]})
        .join(cells, how="cross")
        .join(pl.DataFrame({"bin": range(bins)}), how="cross")
        .join(pl.DataFrame({"i": range(examples)}), how="cross")
    )
    rng = np.random.default_rng(0)
    u, graded = rng.random(frame.height), rng.random(frame.height)
    frame = frame.with_columns(
        task=pl.lit("qa"),
        example_id=pl.format("qa-{}-{}", "bin", "i"),
        cluster=pl.format("doc-{}-{}", "bin", pl.col("i") // 2),
        repeat=pl.lit(0),
        score=pl.Series(np.where(u < 0.6, 1.0, np.where(u < 0.7, graded, 0.0))),
        failure=pl.when(pl.Series(u) > 0.95).then(pl.lit("EMPTY_OUTPUT")),
        latency_s=pl.Series(0.1 + graded),
        batch_size=pl.lit(1),
        co_running=pl.lit(False),
        cache_bytes=pl.lit(1000),
        full_bytes=pl.lit(2000),
        token_len=pl.col("bin") * 1000 + 500,
        alias=pl.lit(False),
    )
    missing = [pl.lit(None).alias(name) for name in SCORES.names if name not in frame.columns]
    return frame.with_columns(missing).select(SCORES.names).to_arrow().cast(SCORES)


def timed(what: Callable[[], Any]) -> tuple[float, float]:
    """Return the CPU seconds and the wall-clock seconds."""
    own, wall = time.process_time(), time.perf_counter()
    what()
    return time.process_time() - own, time.perf_counter() - wall


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    settings = Statistics(resamples=arguments.resamples)
    lines = []

    def measure(name: str, what: Callable[[], Any]) -> float:
        own, wall = timed(what)
        lines.append([name, f"{own:.1f}", f"{wall:.1f}"])
        print(f"{name:90} {own:6.1f} s, wall {wall:6.1f} s", flush=True)
        return own

    shape = {"modes": 2, "policies": 3, "budgets": 3, "bins": 5}
    whole = scores(**shape)
    print(f"{whole.num_rows} rows, {settings.resamples} resamples, {os.cpu_count()} cores")
    slow = [
        measure(
            "transition along lengths and budgets: 100 cells of 1,000",
            lambda: transition.tables_of(whole, settings),
        ),
        measure(
            "one cell: means of 100,000 examples, resampled",
            lambda: resample_sums(np.random.default_rng(0).random((ROWS, 2)), settings.resamples, 0),
        ),
    ]
    small = scores(modes=1, policies=10, budgets=10, bins=5)
    cells = 101 * 5
    name = f"transition along lengths and budgets: {cells:,} cells of {small.num_rows // cells}"
    slow.append(measure(name, lambda: transition.tables_of(small, settings)))
    measure("statistics of 100 cells", lambda: bin_stats(whole, settings))
    measure("comparisons with the full cache", lambda: comparisons(whole, settings))
    measure("comparisons of the policies with each other", lambda: pairs(whole, settings))
    measure("non-inferiority", lambda: noninferiority(whole, settings))
    if arguments.write:
        put(arguments.write, "speed", table(["100,000 rows, 10,000 resamples", "own seconds", "wall"], lines))
    return int(max(slow[:2]) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
