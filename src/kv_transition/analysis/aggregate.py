"""From scored answers to statistics of every cell, and to paired differences from the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from statsmodels.stats.multitest import multipletests

from kv_transition.analysis import intervals
from kv_transition.analysis.intervals import Interval
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata, rows_to_table, write_table
from kv_transition.tables import BIN_STATS, COMPARISONS

CELL = ["task", "mode", "policy", "budget", "bin"]
FULL = {"policy": "full", "budget": "r1"}

# Columns of the scores whose mean over the examples lies in [0, 1].
BOUNDED = {
    "score_mean": "score",
    "em_mean": "em",
    "f1_mean": "f1",
    "contains_mean": "contains",
    "failure_rate": "failed",
}
# Properties of the cache: the same however busy the machine is.
MEANS = {"kept_mean": "kept_mean", "cache_bytes": "cache_bytes", "footprint": "footprint"}
# Measurements that only mean something where the answer had the machine to itself: column, quantile.
TIMED = {
    "latency_p50": ("latency_s", 0.5),
    "latency_p95": ("latency_s", 0.95),
    "ttft_p50": ("ttft_s", 0.5),
    "tokens_per_s": ("tokens_per_s", 0.5),
}
COMPARED = {"score": "score", "failure_rate": "failed"}


@dataclass(frozen=True)
class Statistics:
    """The configuration's ``statistics`` section."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0


def example_values(scores: pa.Table) -> pl.DataFrame:
    """One row per cell and example: columns of the scores as means over the repeats.

    Beside them ``failed`` (share of the repeats that failed), ``footprint`` (bytes of the cache over those of the full
    one), ``alone`` (timings mean something), ``score_var`` and ``repeats`` (variance of the score over repeats).

    Raises UserError if there is no row, or a cell has one example twice in the same repeat.
    """
    if scores.num_rows == 0:
        raise UserError("scores: the table is empty; run at least one cell before the analysis")
    frame = pl.from_arrow(scores.drop_columns([c for c in ("answers", "raw", "text") if c in scores.column_names]))
    key = [*CELL, "example_id"]
    double = frame.group_by([*key, "repeat"]).len().filter(pl.col("len") > 1)
    if double.height:
        first = double.sort([*key, "repeat"]).row(0, named=True)
        where = "/".join(str(first[name]) for name in CELL)
        raise UserError(f"scores: example {first['example_id']} stands more than once in cell {where}; score again")
    alone = (pl.col("batch_size") == 1) & ~pl.col("co_running")
    frame = frame.with_columns(
        failed=pl.col("failure").is_not_null().cast(pl.Float64),
        footprint=pl.when(pl.col("full_bytes") > 0).then(pl.col("cache_bytes") / pl.col("full_bytes")),
        tokens_per_s=pl.when(pl.col("decode_s") > 0).then(pl.col("completion_tokens") / pl.col("decode_s")),
    ).with_columns(pl.when(alone).then(pl.col(name)) for name in ("latency_s", "ttft_s", "tokens_per_s", "peak_mem_mb"))
    columns = [
        *("score", "em", "f1", "contains", "failed", "kept_mean", "cache_bytes", "footprint", "token_len"),
        *("latency_s", "ttft_s", "tokens_per_s", "peak_mem_mb"),
    ]
    return (
        frame.group_by(key)
        .agg(
            *(pl.col(name).mean() for name in columns),
            alias=pl.col("alias").any(),
            alone=alone.any(),
            repeats=pl.len(),
            score_var=pl.col("score").var(),
        )
        .sort(key)
    )


def padded(lists: pl.Series) -> np.ndarray:
    """A column of lists as ``[rows, longest]`` with NaN for nulls and behind the end of shorter lists."""
    values = [np.array([np.nan if v is None else v for v in row], dtype=float) for row in lists.to_list()]
    out = np.full((len(values), max((len(v) for v in values), default=0)), np.nan)
    for i, row in enumerate(values):
        out[i, : len(row)] = row
    return out


def bin_stats(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Every statistic of every cell with interval, n and method (tables.BIN_STATS); the example is the unit."""
    frame = example_values(scores)
    cells = frame.group_by(CELL, maintain_order=True).agg(pl.all().exclude(CELL))
    ranges = frame.group_by("task", "bin").agg(
        token_min=pl.col("token_len").min().cast(pl.Int64),
        token_max=pl.col("token_len").max().cast(pl.Int64),
        token_mean=pl.col("token_len").mean(),
    )
    keys = cells.select(CELL).join(ranges, on=["task", "bin"], how="left", maintain_order="left").to_dicts()
    rows = []
    for name, interval in _cell_intervals(cells, statistics.confidence):
        rows += [{**key, "statistic": name, **interval.row(i)} for i, key in enumerate(keys)]
    return rows_to_table(rows, BIN_STATS)


def _cell_intervals(cells: pl.DataFrame, confidence: float) -> Iterator[tuple[str, Interval]]:
    for name, column in BOUNDED.items():
        yield name, intervals.bounded_mean(padded(cells[column]), confidence)
    yield "score_std", intervals.bounded_std(padded(cells["score"]), confidence)
    for name, column in MEANS.items():
        yield name, intervals.mean(padded(cells[column]), confidence)
    alone = np.array([any(row) for row in cells["alone"].to_list()])
    for name, (column, q) in TIMED.items():
        yield name, _why_missing(intervals.percentile(padded(cells[column]), q, confidence), alone)
    yield "peak_mem_mb", _why_missing(intervals.mean(padded(cells["peak_mem_mb"]), confidence), alone)


def _why_missing(interval: Interval, alone: np.ndarray) -> Interval:
    reason = np.where(alone, "not measured on this machine", "no answer ran alone at batch size 1")
    method = np.where(interval.n > 0, interval.method.astype(object), reason)
    return Interval(interval.estimate, interval.low, interval.high, interval.n, method)


def comparisons(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Paired differences of every policy and budget from the full cache on the same examples (tables.COMPARISONS).

    ``score`` and ``failure_rate`` per bin, and over all bins together (``bin`` null), where two ratios stand beside
    them: ``score_ratio`` (mean score over the full cache's) and ``speedup`` (how many times faster an answer is,
    geometric mean). p-values are of the paired permutation test, Holm-adjusted within a family: one task, mode, budget
    and statistic, over all its policies and bins. Alias rows are left out.
    """
    frame = example_values(scores).filter(~pl.col("alias"))
    full = pl.col("policy").eq(FULL["policy"]) & pl.col("budget").eq(FULL["budget"])
    pairs = frame.filter(~full).join(
        frame.filter(full), on=["task", "mode", "bin", "example_id"], how="inner", suffix="_full", maintain_order="left"
    )
    pooled = pairs.with_columns(bin=pl.lit(None, dtype=pairs.schema["bin"]))
    rows: list[dict[str, Any]] = []
    for level in (pairs, pooled):
        if not level.height:
            continue
        lists = level.group_by(CELL, maintain_order=True).agg(pl.all().exclude(CELL))
        keys = lists.select(CELL).to_dicts()
        for name, column in COMPARED.items():
            difference = padded(lists[column]) - padded(lists[f"{column}_full"])
            interval = intervals.bounded_mean(difference, statistics.confidence, bounds=(-1, 1))
            p = intervals.sign_flip_p(difference, statistics.resamples, statistics.seed)
            scope = "all bins" if level is pooled else "by bin"
            for i, key in enumerate(keys):
                family = "/".join((key["task"], key["mode"], key["budget"], name, scope))
                tested = {"p_value": float(p[i]), "family": family} if interval.n[i] else {}
                rows.append(_against_full(key, name, interval.row(i), tested))
        if level is pooled:
            interval = intervals.ratio(padded(lists["score"]), padded(lists["score_full"]), statistics.confidence)
            rows += [_against_full(key, "score_ratio", interval.row(i), {}) for i, key in enumerate(keys)]
            with np.errstate(divide="ignore", invalid="ignore"):
                faster = np.log(padded(lists["latency_s_full"]) / padded(lists["latency_s"]))
            faster[~np.isfinite(faster)] = np.nan
            alone = np.array([any(row) for row in lists["alone"].to_list()])
            interval = _why_missing(intervals.geometric_mean(faster, statistics.confidence), alone)
            rows += [_against_full(key, "speedup", interval.row(i), {}) for i, key in enumerate(keys)]
    _adjust(rows, 1 - statistics.confidence)
    return rows_to_table(rows, COMPARISONS)


def _against_full(key: Mapping, name: str, estimate: Mapping, tested: Mapping) -> dict[str, Any]:
    reference = {f"reference_{k}": v for k, v in FULL.items()}
    method = f"paired, {estimate['method']}"
    return {**key, "statistic": name, **reference, **estimate, "method": method, **tested}


def _adjust(rows: list[dict[str, Any]], alpha: float) -> None:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "family" in row:
            families.setdefault(row["family"], []).append(row)
    for family in families.values():
        adjusted = multipletests([row["p_value"] for row in family], alpha=alpha, method="holm")[1]
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"] = float(p)


def inherited(path: str) -> dict[str, str]:
    """The metadata of an input file that its results carry on: all but what is written anew."""
    anew = {"git_commit", "package_versions", "timestamp"}
    return {k: v for k, v in read_metadata(path).items() if k not in anew}


def write_aggregates(scores_path: str, stats_path: str, comparisons_path: str, statistics: Mapping[str, Any]) -> None:
    """The `aggregate` rule: scores.parquet to bin_stats.parquet and comparisons.parquet."""
    import pyarrow.parquet as pq

    scores, settings = pq.read_table(scores_path), Statistics(**statistics)
    fields = inherited(scores_path) | {"statistics": dict(statistics)}
    write_table(stats_path, bin_stats(scores, settings), fields)
    write_table(comparisons_path, comparisons(scores, settings), fields)
