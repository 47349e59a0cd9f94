"""Paired differences on the same examples: of policies from the full cache, and between policies."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from statsmodels.stats.power import TTestPower

from kv_transition.provenance import rows_to_table
from kv_transition.stats import intervals, paired
from kv_transition.stats.examples import CELL, FULL, Statistics, by_cell, example_values, is_full, on_both, padded
from kv_transition.stats.intervals import Interval, finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.grid.tables import COMPARISONS

COMPARED = {"score": "score", "failure_rate": "failed"}
POWER = 0.8  # power at which the minimum detectable difference is stated


def comparisons(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Return every policy and budget minus the full cache on the same examples (tables.COMPARISONS).

    ``score`` and ``failure_rate`` are compared per bin and over all bins (``bin`` null). Over all bins there are also
    two ratios: ``score_ratio`` (mean score divided by the full cache's) and ``speedup`` (how many times faster an
    answer is, geometric mean). Interval and p-value come from one inference (`stats.paired`). p-values are
    Holm-adjusted within a family: one task, mode, budget and statistic, over all its policies and bins. Alias rows are
    omitted.
    """
    frame = example_values(scores).filter(~pl.col("alias"))
    both = on_both(frame.filter(~is_full()), frame.filter(is_full()), ["task", "mode"], "_full")
    both = both.with_columns(reference_policy=pl.lit(FULL["policy"]), reference_budget=pl.lit(FULL["budget"]))
    rows: list[dict[str, Any]] = []
    for level in _by_bin_and_over_all(both):
        lists = by_cell(level, [*CELL, "reference_policy", "reference_budget"])
        rows += _differences(lists, "_full", statistics)
        if lists["bin"].null_count():
            rows += _ratios(lists, statistics.confidence)
    return rows_to_table(_in_families(rows, statistics.alpha), COMPARISONS)


def pairs(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Return every policy minus every other at the same budget, per bin and over all bins (tables.COMPARISONS).

    Each pair occurs once, in the order of the names. Families for Holm: one task, mode, budget and statistic, over all
    its pairs and bins. Alias rows and the full cache are omitted.
    """
    frame = example_values(scores).filter(~pl.col("alias") & ~is_full())
    both = on_both(frame, frame, ["task", "mode", "budget"], "_reference")
    both = both.filter(pl.col("policy") < pl.col("policy_reference")).rename({"policy_reference": "reference_policy"})
    both = both.with_columns(reference_budget="budget")
    rows: list[dict[str, Any]] = []
    for level in _by_bin_and_over_all(both):
        rows += _differences(by_cell(level, [*CELL, "reference_policy", "reference_budget"]), "_reference", statistics)
    return rows_to_table(_in_families(rows, statistics.alpha), COMPARISONS)


def _by_bin_and_over_all(both: pl.DataFrame) -> list[pl.DataFrame]:
    if not both.height:
        return []
    return [both, both.with_columns(bin=pl.lit(None, dtype=both.schema["bin"]))]


def _differences(lists: pl.DataFrame, suffix: str, statistics: Statistics) -> list[dict[str, Any]]:
    keys = lists.select(*CELL, "reference_policy", "reference_budget").to_dicts()
    clusters, rows = padded(lists["cluster"]), []
    for name, column in COMPARED.items():
        difference = padded(lists[column]) - padded(lists[f"{column}{suffix}"])
        tested, signs = paired.difference(difference, clusters), paired.difference(np.sign(difference), clusters)
        found, effect = (of.interval(statistics.confidence) for of in (tested, signs))
        p, effect_p = tested.p, signs.p
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
                    "effect_p": float(effect_p[i]),
                    "tested": partial(_at_level, tested.one(i)),
                }
            rows.append(row)
    return rows


def _ratios(lists: pl.DataFrame, confidence: float) -> list[dict[str, Any]]:
    keys = lists.select(*CELL, "reference_policy", "reference_budget").to_dicts()
    clusters = padded(lists["cluster"])
    kept = paired.ratio(padded(lists["score"]), padded(lists["score_full"]), confidence, clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        faster = np.log(padded(lists["latency_s_full"]) / padded(lists["latency_s"]))
    faster[~np.isfinite(faster)] = np.nan
    alone = np.array([any(row) for row in lists["alone"].to_list()])
    speed = why_missing(intervals.geometric_mean(faster, confidence, clusters), alone)
    score, full = padded(lists["score"]), padded(lists["score_full"])
    rows = []
    for i, key in enumerate(keys):
        for name, found in (("score_ratio", kept), ("speedup", speed)):
            rows.append({**key, "statistic": name, **found.row(i), "method": f"paired, {found.method[i]}"})
        one = slice(i, i + 1)
        rows[-2]["ratio"] = partial(paired.ratio, score[one], full[one], clusters=clusters[one])
    return rows


def why_missing(interval: Interval, alone: np.ndarray) -> Interval:
    """Return the interval of a time; if there is none, ``method`` contains the reason."""
    reason = np.where(alone, "not measured on this machine", "no answer ran alone at batch size 1")
    method = np.where(interval.n > 0, interval.method.astype(object), reason)
    return Interval(interval.estimate, interval.low, interval.high, interval.n, method, interval.clusters)


def _at_level(tested: paired.Paired, alpha: float, tests: int, level: float) -> dict[str, float | None]:
    """Return the columns that depend on the family: the interval that agrees with Holm's decision, and ``mdd``.

    ``mdd`` is computed at the level of Holm's strictest step; null if it exceeds 1.
    """
    at = tested.interval(1 - level)
    clusters, error = int(tested.clusters[0]), float(tested.gained[1][0])
    found = detectable(clusters, alpha / tests)
    # the mean after the additional pair must have this distance from 0
    wanted = None if found is None else ((clusters + 1) ** 1.5 * found * error + 1) / clusters
    return {
        "holm_low": finite(at.low[0]),
        "holm_high": finite(at.high[0]),
        "mdd": wanted if wanted is not None and wanted <= 1 else None,
        "n_decides": tested.decides(alpha / 2 / tests),
    }


@lru_cache(maxsize=4096)
def detectable(clusters: int, alpha: float, power: float = POWER) -> float | None:
    """Return the smallest true mean, in standard deviations, that a two-sided paired test detects with this power.

    It is computed with the noncentral t distribution (statsmodels), with the additional pair among the values. None if
    no data could be significant, not even if every pair is lost.
    """
    if clusters < 2 or not paired.difference(np.full((1, clusters), -1.0)).p[0] < alpha:
        return None
    found = TTestPower().solve_power(effect_size=None, nobs=clusters + 1, alpha=alpha, power=power)
    return float(np.squeeze(found))  # one of statsmodels' solvers returns an array


def _in_families(rows: list[dict[str, Any]], alpha: float) -> list[dict[str, Any]]:
    """Return the rows with the columns that depend on the family of their test."""
    adjust(rows, alpha)
    level = {
        tuple(row[k] for k in CELL): row["level"] for row in rows if row["statistic"] == "score" and "level" in row
    }
    made = []
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("tested", "tests", "level", "ratio")}
        if "tested" in row:
            rest |= row["tested"](alpha, row["tests"], row["level"])
        own = level.get(tuple(row[k] for k in CELL))
        if (
            "ratio" in row and own is not None
        ):  # at the level of the difference in score, so that both lead to the same conclusion
            at = row["ratio"](confidence=1 - own)
            rest |= {"holm_low": finite(at.low[0]), "holm_high": finite(at.high[0])}
        made.append(rest)
    return made
