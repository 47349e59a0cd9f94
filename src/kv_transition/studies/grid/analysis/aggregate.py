"""Statistics of every cell from scored answers; the `aggregate` rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from kv_transition import parsing
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import intervals
from kv_transition.stats.examples import CELL, FULL, Statistics, by_cell, example_values, inherited, padded
from kv_transition.stats.intervals import Interval
from kv_transition.studies.grid.analysis.comparisons import comparisons, pairs, why_missing
from kv_transition.studies.grid.analysis.noninferiority import noninferiority, smallest_budgets
from kv_transition.studies.grid.tables import BIN_STATS

__all__ = ["FULL", "Statistics", "bin_stats", "comparisons", "example_values", "inherited", "padded"]

# Columns of the scores whose mean over the examples lies in [0, 1].
BOUNDED = {
    "score_mean": "score",
    "em_mean": "em",
    "f1_mean": "f1",
    "contains_mean": "contains",
    "failure_rate": "failed",
    "abstention_rate": "abstained",
    "broken_rate": "broken",
}
# Properties of the cache, which do not depend on the load of the machine.
MEANS = {"kept_mean": "kept_mean", "cache_bytes": "cache_bytes", "footprint": "footprint"}
# Measurements that are meaningful only if no other job used the machine: column, quantile.
TIMED = {
    "latency_p50": ("latency_s", 0.5),
    "latency_p95": ("latency_s", 0.95),
    "ttft_p50": ("ttft_s", 0.5),
    "tokens_per_s": ("tokens_per_s", 0.5),
}


def bin_stats(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Return every statistic of every cell with interval, n and method (tables.BIN_STATS); the example is the unit."""
    frame = example_values(scores)
    cells = by_cell(frame, CELL)
    ranges = frame.group_by("task", "bin").agg(
        token_min=pl.col("token_len").min().cast(pl.Int64),
        token_max=pl.col("token_len").max().cast(pl.Int64),
        token_mean=pl.col("token_len").mean(),
    )
    keys = cells.select(CELL).join(ranges, on=["task", "bin"], how="left", maintain_order="left").to_dicts()
    rows = []
    for name, interval in _cell_intervals(cells, statistics):
        rows += [{**key, "statistic": name, **interval.row(i)} for i, key in enumerate(keys)]
    return rows_to_table(rows, BIN_STATS)


def _cell_intervals(cells: pl.DataFrame, statistics: Statistics) -> Iterator[tuple[str, Interval]]:
    confidence, clusters = statistics.confidence, padded(cells["cluster"])
    for name, column in BOUNDED.items():
        yield name, intervals.bounded_mean(padded(cells[column]), confidence, clusters=clusters)
    yield "score_std", intervals.bounded_std(padded(cells["score"]), confidence, clusters, seed=statistics.seed)
    for name, column in MEANS.items():
        yield name, intervals.mean(padded(cells[column]), confidence, clusters)
    alone = np.array([any(row) for row in cells["alone"].to_list()])
    for name, (column, q) in TIMED.items():
        yield name, why_missing(intervals.percentile(padded(cells[column]), q, confidence, clusters), alone)
    yield "peak_mem_mb", why_missing(intervals.mean(padded(cells["peak_mem_mb"]), confidence, clusters), alone)


def write_aggregates(
    scores_path: str,
    bin_stats_path: str,
    comparisons_path: str,
    statistics: Mapping[str, Any],
    *,
    pairs_path: str | None = None,
    noninferiority_path: str | None = None,
    smallest_budgets_path: str | None = None,
) -> None:
    """Write bin_stats.parquet, comparisons.parquet and each further table that has a path (the `aggregate` rule)."""

    scores, settings = parsing.read_parquet(scores_path), Statistics(**statistics)
    fields = inherited(scores_path) | {"statistics": dict(statistics)}
    write_table(bin_stats_path, bin_stats(scores, settings), fields)
    write_table(comparisons_path, comparisons(scores, settings), fields)
    if pairs_path:
        write_table(pairs_path, pairs(scores, settings), fields)
    if noninferiority_path or smallest_budgets_path:
        tested = noninferiority(scores, settings)
        if noninferiority_path:
            write_table(noninferiority_path, tested, fields)
        if smallest_budgets_path:
            write_table(smallest_budgets_path, smallest_budgets(tested, settings), fields)
