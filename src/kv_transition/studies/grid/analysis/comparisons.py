"""Paired differences on the same examples: of every policy from the full cache, and of the policies from each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from statsmodels.stats.power import TTestPower

from kv_transition.provenance import rows_to_table
from kv_transition.stats import intervals
from kv_transition.stats.clusters import moments
from kv_transition.stats.examples import CELL, FULL, Statistics, by_cell, example_values, is_full, padded, paired
from kv_transition.stats.intervals import Interval, finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.grid.tables import COMPARISONS

COMPARED = {"score": "score", "failure_rate": "failed"}
POWER = 0.8  # of the minimum detectable difference


def comparisons(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Every policy and budget minus the full cache on the same examples (tables.COMPARISONS).

    ``score`` and ``failure_rate`` per bin, and over all bins together (``bin`` null), where two ratios stand beside
    them: ``score_ratio`` (mean score over the full cache's) and ``speedup`` (how many times faster an answer is,
    geometric mean). p-values are of the paired permutation test, Holm-adjusted within a family: one task, mode, budget
    and statistic, over all its policies and bins. Alias rows are left out.
    """
    frame = example_values(scores).filter(~pl.col("alias"))
    both = paired(frame.filter(~is_full()), frame.filter(is_full()), ["task", "mode"], "_full")
    both = both.with_columns(reference_policy=pl.lit(FULL["policy"]), reference_budget=pl.lit(FULL["budget"]))
    rows: list[dict[str, Any]] = []
    for level in _by_bin_and_over_all(both):
        lists = by_cell(level, [*CELL, "reference_policy", "reference_budget"])
        rows += _differences(lists, "_full", statistics)
        if lists["bin"].null_count():
            rows += _ratios(lists, statistics.confidence)
    adjust(rows)
    return rows_to_table([_with_detectable(row, statistics.alpha) for row in rows], COMPARISONS)


def pairs(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Every policy minus every other at the same budget, per bin and over all bins (tables.COMPARISONS).

    Each pair stands once, in the order of the names. Families for Holm: one task, mode, budget and statistic, over all
    its pairs and bins. Alias rows and the full cache are left out.
    """
    frame = example_values(scores).filter(~pl.col("alias") & ~is_full())
    both = paired(frame, frame, ["task", "mode", "budget"], "_reference")
    both = both.filter(pl.col("policy") < pl.col("policy_reference")).rename({"policy_reference": "reference_policy"})
    both = both.with_columns(reference_budget="budget")
    rows: list[dict[str, Any]] = []
    for level in _by_bin_and_over_all(both):
        rows += _differences(by_cell(level, [*CELL, "reference_policy", "reference_budget"]), "_reference", statistics)
    adjust(rows)
    return rows_to_table([_with_detectable(row, statistics.alpha) for row in rows], COMPARISONS)


def _by_bin_and_over_all(both: pl.DataFrame) -> list[pl.DataFrame]:
    if not both.height:
        return []
    return [both, both.with_columns(bin=pl.lit(None, dtype=both.schema["bin"]))]


def _differences(lists: pl.DataFrame, suffix: str, statistics: Statistics) -> list[dict[str, Any]]:
    keys = lists.select(*CELL, "reference_policy", "reference_budget").to_dicts()
    clusters, rows = padded(lists["cluster"]), []
    for name, column in COMPARED.items():
        difference = padded(lists[column]) - padded(lists[f"{column}{suffix}"])
        found = intervals.bounded_mean(difference, statistics.confidence, (-1, 1), clusters)
        effect = intervals.bounded_mean(np.sign(difference), statistics.confidence, (-1, 1), clusters)
        p = intervals.sign_flip_p(difference, statistics.resamples, statistics.seed, clusters)
        error, size = standard_error(difference, clusters)
        for i, key in enumerate(keys):
            scope = "all bins" if key["bin"] is None else "by bin"
            row = {**key, "statistic": name, **found.row(i), "method": f"paired, {found.method[i]}"}
            if found.n[i]:
                row |= {
                    "p_value": float(p[i]),
                    "family": "/".join((key["task"], key["mode"], key["budget"], name, scope)),
                    "effect": finite(effect.estimate[i]),
                    "effect_low": finite(effect.low[i]),
                    "effect_high": finite(effect.high[i]),
                    "mdd": (float(error[i]), float(size[i])),
                }
            rows.append(row)
    return rows


def _ratios(lists: pl.DataFrame, confidence: float) -> list[dict[str, Any]]:
    keys = lists.select(*CELL, "reference_policy", "reference_budget").to_dicts()
    clusters = padded(lists["cluster"])
    kept = intervals.ratio(padded(lists["score"]), padded(lists["score_full"]), confidence, clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        faster = np.log(padded(lists["latency_s_full"]) / padded(lists["latency_s"]))
    faster[~np.isfinite(faster)] = np.nan
    alone = np.array([any(row) for row in lists["alone"].to_list()])
    speed = why_missing(intervals.geometric_mean(faster, confidence, clusters), alone)
    return [
        {**key, "statistic": name, **found.row(i), "method": f"paired, {found.method[i]}"}
        for name, found in (("score_ratio", kept), ("speedup", speed))
        for i, key in enumerate(keys)
    ]


def why_missing(interval: Interval, alone: np.ndarray) -> Interval:
    """The interval of a time, whose method says why where there is none."""
    reason = np.where(alone, "not measured on this machine", "no answer ran alone at batch size 1")
    method = np.where(interval.n > 0, interval.method.astype(object), reason)
    return Interval(interval.estimate, interval.low, interval.high, interval.n, method, interval.clusters)


def standard_error(difference: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Of means of differences in [-1, 1], as `intervals.bounded_mean` has it; and how many effective clusters."""
    unit = (difference + 1) / 2
    coin = np.all(np.isin(unit, (0, 1)) | np.isnan(unit), axis=1)
    of = moments(unit, clusters)
    phi = intervals.relative_variance(of, coin)[0]
    most = np.maximum(of.mean * (1 - of.mean), 1e-12)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * np.sqrt(phi * most / of.n), of.effective


@lru_cache(maxsize=4096)
def detectable(size: float, alpha: float, power: float = POWER) -> float | None:
    """The smallest true mean, in standard deviations, that a two-sided paired test finds with this power.

    By the noncentral t distribution (statsmodels). None where no data at all could be significant: ``size``
    sign flips have the smallest p-value 2^(1 - size).
    """
    if 2.0 ** (1 - size) > alpha or size < 2:
        return None
    return float(TTestPower().solve_power(effect_size=None, nobs=size, alpha=alpha, power=power))


def _with_detectable(row: dict[str, Any], alpha: float) -> dict[str, Any]:
    """``mdd`` at the level that the strictest step of Holm leaves in the row's family; null where it exceeds 1."""
    if "mdd" not in row:
        return row
    error, size = row["mdd"]
    found = detectable(round(size, 6), alpha / row["tests"])
    wanted = None if found is None else found * error * size**0.5
    rest = {k: v for k, v in row.items() if k != "tests"}
    return rest | {"mdd": wanted if wanted is not None and wanted <= 1 else None}
