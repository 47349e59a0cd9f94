"""The transition zone along the length bins, or along the budgets of a bin.

*Onset* is the first significantly unstable point (Holm over points and criteria; instability.py) before the *collapse*,
which is the first point whose mean, upper bound included, is below half of the full cache's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from kv_transition import labels, parsing
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats.examples import Statistics, example_values, inherited, is_full
from kv_transition.stats.intervals import finite
from kv_transition.studies.grid.analysis import instability, scale, zscore
from kv_transition.studies.grid.analysis import outcomes as verdict
from kv_transition.studies.grid.analysis.comparisons import comparisons
from kv_transition.studies.grid.analysis.instability import CRITERIA, Evidence, Point, Resampled
from kv_transition.studies.grid.analysis.noninferiority import noninferiority
from kv_transition.studies.grid.analysis.outcomes import BUDGET, LENGTH, OPEN, Axis, Finding, Verdict
from kv_transition.studies.grid.tables import BUDGET_TRANSITION, TRANSITION

__all__ = [
    "Point",
    "Verdict",
    "budget_transitions",
    "detect",
    "tables_of",
    "transitions",
    "write_transition",
]

METHOD = (
    "onset: exact sign tests of failures and of variance over repeats against the full cache, and a bootstrap z test "
    "of dispersion, Holm over {points} and criteria; collapse: upper bound of the mean below half of the full cache's"
)
_VALUES = ("score", "failed", "score_full", "failed_full", "score_var", "score_var_full")
NOTHING = "open, because no example has a score both with this policy and with the full cache"


def detect(
    points: Sequence[Point],
    name: str,
    statistics: Statistics,
    axis: Axis = LENGTH,
    resampled: Sequence[Resampled] | None = None,
    note: str = "",
) -> Verdict:
    """Return the transition along the points in order; ``name`` begins the sentences, ``note`` ends them.

    ``resampled``: result of `instability.resampled`, if the caller has it already.
    """
    if not points:
        return Verdict(OPEN, f"{name}: {NOTHING}{note}.", f"{name}: {NOTHING}{note}.")
    if resampled is None:
        resampled = _resampled(points, statistics)
    seen, again = instability.evidence(resampled, one_full=axis is BUDGET)
    unstable, p_holm = (found[0] for found in instability.unstable(seen.p[None], statistics.confidence))
    onset, collapse = (int(found[0]) for found in first(unstable[None], seen.collapsed[None]))
    onsets, collapses = first(instability.unstable(again.p, statistics.confidence)[0], again.collapsed)
    at_onset = [float((onsets == i).mean()) for i in range(len(points))]
    at_collapse = [float((collapses == i).mean()) for i in range(len(points))]

    finding = Finding(points, seen, p_holm, onset, collapse, axis, statistics.alpha)
    pattern, why = verdict.outcome(finding)
    found = Verdict(pattern, f"{name}: {why}{note}.", f"{name}: {verdict.sentence(finding, pattern, why)}{note}.")
    open_at = verdict.undecided(finding) if pattern == OPEN else None
    found.details = {
        axis.plural: [
            _details(point, axis, seen, p_holm, i)
            | {
                "unstable": bool(unstable[i]),
                "collapsed": bool(seen.collapsed[i]),
                "blind": i in finding.blind,
                "open": open_at is not None and i in open_at[0],
                "probability_onset": at_onset[i],
                "probability_collapse": at_collapse[i],
            }
            for i, point in enumerate(points)
        ],
        "probability_no_onset": float((onsets < 0).mean()),
        "probability_no_collapse": float((collapses < 0).mean()),
        "bootstrap_samples": len(onsets),
    }
    if onset >= 0:
        found.onset, found.onset_probability = onset, at_onset[onset]
    if collapse >= 0:
        found.collapse, found.collapse_probability = collapse, at_collapse[collapse]
    return found


def _resampled(points: Sequence[Point], statistics: Statistics) -> list[Resampled]:
    return instability.resampled(points, max(statistics.resamples, 1), statistics.seed, statistics.confidence)


def first(unstable: np.ndarray, collapsed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of onset and collapse per sample [samples, points], -1 for none; an onset is before the
    collapse.
    """
    count = unstable.shape[1]
    collapse = np.where(collapsed.any(axis=1), collapsed.argmax(axis=1), count)
    early = unstable & (np.arange(count) < collapse[:, None])
    onset = np.where(early.any(axis=1), early.argmax(axis=1), -1)
    return onset, np.where(collapse == count, -1, collapse)


def _details(point: Point, axis: Axis, seen: Evidence, p_holm: np.ndarray, i: int) -> dict[str, Any]:
    return {
        **verdict.key(point, axis),
        "tokens": list(point.tokens),
        "n": point.n,
        "clusters": point.count,
        "mean": float(point.score.mean()),
        "mean_low": float(seen.low[i]),
        "mean_high": float(seen.high[i]),
        "full_mean": float(seen.full_mean[i]),
        "failure_rate": float(point.failed.mean()),
        "full_failure_rate": float(point.full_failed.mean()),
        **{f"p_{name}": finite(seen.p[i, j]) for j, name in enumerate(CRITERIA)},
        "p_holm": finite(np.nanmin(p_holm[i])),
    }


def transitions(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Return the transitions along the length bins, by both detectors (tables.TRANSITION)."""
    return tables_of(scores, statistics)[0]


def budget_transitions(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Return the transitions along the budgets of each kind in every bin, by both detectors."""
    return tables_of(scores, statistics)[1]


def tables_of(
    scores: pa.Table, statistics: Statistics, compared: pa.Table | None = None, kept: pa.Table | None = None
) -> tuple[pa.Table, pa.Table]:
    """Return `transitions` and `budget_transitions`, from the same bootstrap samples.

    compared, kept: tables.COMPARISONS and tables.NONINFERIORITY of these scores, if the caller has them already.
    """
    joined, ranges = _joined(scores)
    compared = comparisons(scores, statistics) if compared is None else compared
    kept = noninferiority(scores, statistics) if kept is None else kept
    evidence = scale.shown(compared.to_pylist(), kept.to_pylist(), statistics.alpha)
    along_length, along_budget = [], []
    for (task, mode), part in joined.group_by("task", "mode", maintain_order=True):
        keyed = _points(part, {b: tokens for (t, b), tokens in ranges.items() if t == task})
        resampled = dict(zip(keyed, _resampled(list(keyed.values()), statistics), strict=True))
        combinations = part.select("policy", "budget", "bin").unique(maintain_order=True).rows()
        bins = sorted(b for t, b in ranges if t == task)
        for policy, budget in dict.fromkeys(c[:2] for c in combinations):
            keys = [(policy, budget, b) for b in bins]
            name = f"{policy} at {labels.budget(budget)}, {labels.mode(mode)}"
            base = {"task": task, "mode": mode, "policy": policy, "budget": budget}
            along_length += _rows(keys, keyed, resampled, name, LENGTH, statistics, base, ranges, evidence)
        for policy, b in dict.fromkeys((c[0], c[2]) for c in combinations):
            budgets = sorted({c[1] for c in combinations if c[0] == policy}, key=labels.budget_order)
            for kind in sorted({name[0] for name in budgets}):
                keys = [(policy, budget, b) for budget in budgets if budget[0] == kind]
                tokens = f"{labels.token_range(*ranges[task, b])} tokens"
                name = f"{policy} at {tokens}, {labels.mode(mode)}"
                base = {"task": task, "mode": mode, "policy": policy, "bin": b, "kind": kind}
                along_budget += _rows(keys, keyed, resampled, name, BUDGET, statistics, base, ranges, evidence)
    return rows_to_table(along_length, TRANSITION), rows_to_table(along_budget, BUDGET_TRANSITION)


def _joined(scores: pa.Table) -> tuple[pl.DataFrame, dict[tuple[str, int], tuple[int, int]]]:
    """Return the examples of policies joined with the full cache's, and the range of tokens of each (task, bin)."""
    frame = example_values(scores).filter(~pl.col("alias"))
    ends = frame.group_by("task", "bin").agg(pl.col("token_len").min(), pl.col("token_len").max().alias("last"))
    ranges = {(task, b): (int(low), int(high)) for task, b, low, high in ends.iter_rows()}
    # An answer that failed in the engine has no score; here it counts as 0, because a user gets no answer.
    lost = pl.col("score").is_null() & (pl.col("failed") > 0)
    frame = frame.with_columns(score=pl.when(lost).then(0.0).otherwise(pl.col("score")))
    joined = frame.filter(~is_full()).join(
        frame.filter(is_full()), on=["task", "mode", "bin", "example_id"], how="left", suffix="_full"
    )
    return joined.sort("task", "mode", "policy", "budget", "bin", "example_id"), ranges


def _points(part: pl.DataFrame, ranges: Mapping[int, tuple[int, int]]) -> dict[tuple[str, str, int], Point]:
    """Return the points of one task and mode, by policy, budget and bin."""
    both = part.filter(pl.col("score").is_not_null() & pl.col("score_full").is_not_null())
    both = both.with_columns(pl.col(_VALUES).cast(pl.Float64).fill_null(np.nan))
    return {
        (policy, budget, b): _point(b, ranges[b], budget, cell)
        for (policy, budget, b), cell in both.group_by("policy", "budget", "bin", maintain_order=True)
    }


def _point(number: int, tokens: tuple[int, int], budget: str, cell: pl.DataFrame) -> Point:
    clusters = cell["cluster"].rank("dense").to_numpy()
    return Point(int(number), tokens, *(cell[name].to_numpy() for name in _VALUES), budget=budget, clusters=clusters)


def _rows(
    keys: Sequence[tuple[str, str, int]],
    keyed: Mapping[tuple[str, str, int], Point],
    resampled: Mapping[tuple[str, str, int], Resampled],
    name: str,
    axis: Axis,
    statistics: Statistics,
    base: Mapping[str, Any],
    ranges: Mapping[tuple[str, int], tuple[int, int]],
    evidence: Mapping[scale.Key, scale.Shown],
) -> Iterable[dict[str, Any]]:
    """Yield the rows of both detectors over the keys that have points; only the definition's row has an outcome.

    Keys without points are named in the sentences.
    """
    there = [key for key in keys if key in keyed]
    points = [keyed[key] for key in there]
    note = _missing([key for key in keys if key not in keyed], base["task"], axis, ranges) if points else ""
    detectors: dict[str, tuple[Callable[[], Verdict], str]] = {
        "definition": (
            lambda: detect(points, name, statistics, axis, [resampled[key] for key in there], note),
            METHOD,
        ),
        "zscore": (lambda: zscore.detect(points, name, axis), zscore.METHOD),
    }
    for detector, (found_by, method) in detectors.items():
        found = found_by()
        row = {
            **base,
            "detector": detector,
            f"onset_{axis.singular}": None if found.onset is None else axis.of(points[found.onset]),
            f"collapse_{axis.singular}": None if found.collapse is None else axis.of(points[found.collapse]),
            "onset_probability": found.onset_probability,
            "collapse_probability": found.collapse_probability,
            "n": sum(point.n for point in points),
            "method": method.format(points=axis.plural),
            "reason": found.reason,
            "sentence": found.sentence,
            "details": json.dumps(found.details | {"pattern": found.pattern}, sort_keys=True),
        }
        if detector == "definition":
            at = [evidence.get((base["task"], base["mode"], *key), scale.Shown()) for key in there]
            whole = (base["task"], base["mode"], *keys[0][:2], None) if axis is LENGTH else None
            row = scale.along(row, at, whole and evidence.get(whole, scale.Shown()), axis.singular)
        yield row


def _missing(
    keys: Sequence[tuple[str, str, int]], task: str, axis: Axis, ranges: Mapping[tuple[str, int], tuple[int, int]]
) -> str:
    if not keys:
        return ""
    if axis.along_length:
        names = [f"{labels.token_range(*ranges[task, b])} tokens" for _, _, b in keys]
    else:
        names = [labels.budget(budget) for _, budget, _ in keys]
    return f"; no answers to compare at {', '.join(names)}"


def write_transition(
    scores_path: str,
    transition_path: str,
    statistics: Mapping[str, Any],
    budget_transition_path: str | None = None,
    comparisons_path: str | None = None,
    noninferiority_path: str | None = None,
) -> None:
    """Write transition.parquet and, if a path is given, budget_transition.parquet (the `transition` rule).

    The tables of `write_aggregates` are read where their paths are given, and otherwise computed.
    """
    given = (path and parsing.read_parquet(path) for path in (comparisons_path, noninferiority_path))
    along_length, along_budget = tables_of(parsing.read_parquet(scores_path), Statistics(**statistics), *given)
    fields = inherited(scores_path) | {"statistics": dict(statistics)}
    write_table(transition_path, along_length, fields)
    if budget_transition_path:
        write_table(budget_transition_path, along_budget, fields)
