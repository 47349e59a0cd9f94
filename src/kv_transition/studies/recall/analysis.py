"""The analysis of entropy against recall: is recall low at decode steps of high entropy?

Low recall means that a policy has evicted entries that the step needs. For every task, policy, budget, granularity and
memory: means by entropy bin, correlations (raw, within examples, and after controls), the trend over the bins, AUROC of
entropy for a failed recall, and a verdict. The steps of an example are dependent, and so are examples about one
context, so intervals resample whole contexts (docs/entropy_recall.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import intervals
from kv_transition.stats.association import (
    NO_ENTROPY,
    NO_STEPS,
    Carriers,
    Estimate,
    Moments2,
    bent,
    missing,
    moments2,
    moments2_within,
    rank_statistics,
    ranks_within,
    resample_weights,
    summarised,
)
from kv_transition.stats.examples import Statistics, inherited
from kv_transition.stats.intervals import Interval, finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.recall.observations import LEVELS, Steps, cells, read_observations
from kv_transition.studies.recall.tables import ENTROPY_RECALL
from kv_transition.studies.recall.verdict import Bin, Verdict, controlled, empty_bin, judge

FAILED_BELOW = 0.5  # AUROC counts a lower recall as failed
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The estimates of one cell, as attributes and as ``rows`` of the table."""

    steps: Steps
    bins: dict[str, Bin]
    estimates: dict[str, Estimate]
    verdict: Verdict
    controlled: Verdict
    rows: list[Row]

    @property
    def slope(self) -> Estimate:
        return self.estimates["slope"]

    @property
    def size(self) -> Row:
        return {"n": len(self.steps.examples), "clusters": self.steps.clusters, "steps": len(self.steps)}


def analyse(steps: Steps, statistics: Statistics) -> Cell:
    """Return all estimates of one cell's steps."""
    return _analyse(steps, _estimates([steps], statistics)[0], statistics.confidence)


def analyse_all(cells: Sequence[Steps], statistics: Statistics) -> list[Cell]:
    """Return all estimates of each cell. Cells that differ in recall only share what depends on entropy only."""
    alike: dict[str, list[int]] = {}
    for i, steps in enumerate(cells):
        alike.setdefault(_apart_from_recall(steps), []).append(i)
    found = {
        i: estimates
        for own in alike.values()
        for i, estimates in zip(own, _estimates([cells[i] for i in own], statistics), strict=True)
    }
    return [_analyse(steps, found[i], statistics.confidence) for i, steps in enumerate(cells)]


def _apart_from_recall(steps: Steps) -> str:
    """Return a digest of everything but the recall that the estimates depend on."""
    columns = (steps.entropy, steps.step, steps.length, steps.example, steps.cluster, steps.kind)
    values = b"".join(column.tobytes() for column in columns)
    return f"{len(steps)}-{len(steps.kinds)}-{hashlib.sha256(values).hexdigest()}"


def _analyse(steps: Steps, estimates: dict[str, Estimate], confidence: float) -> Cell:
    bins, mean_rows = _means(steps, confidence)
    low, high = bins["low"], bins["high"]
    raw = judge(estimates["trend"], low, high)
    after = controlled(raw, estimates["pearson"], estimates["partial"], low, high, _varying(steps))
    cell = Cell(steps, bins, estimates, raw, after, mean_rows)
    cell.rows.extend(_row(name, found) | cell.size for name, found in estimates.items())
    left_out = f"{steps.left_out} steps without entropy or recall omitted; " if steps.left_out else ""
    for name, found in (("verdict", raw), ("verdict_controlled", after)):
        cell.rows.append({"statistic": name, "outcome": found.outcome, "reason": left_out + found.reason} | cell.size)
    return cell


def _row(name: str, found: Estimate) -> Row:
    bounds = {"estimate": found.value, "ci_low": found.low, "ci_high": found.high, "p_value": found.p}
    return {"statistic": name, "method": found.method} | {column: finite(value) for column, value in bounds.items()}


def _mean_row(name: str, found: Interval, i: int, examples: int) -> Row:
    """Return the i-th mean over the steps of so many ``examples``, with contexts as clusters."""
    row = found.row(i)
    method = row["method"] if row["n"] else "no step has such an entropy"
    return {"statistic": name} | row | {"n": examples, "steps": row["n"], "method": method}


def _examples(steps: Steps, values: np.ndarray) -> list[int]:
    """Return how many examples have a value in each row of ``values`` [rows, steps]."""
    return [len(np.unique(steps.example[~np.isnan(row)])) for row in values]


def _means(steps: Steps, confidence: float) -> tuple[dict[str, Bin], list[Row]]:
    """Return mean recall by entropy bin as values, and as rows with the overall mean and the
    share of failed recalls.
    """
    names = [*(f"recall_{level}" for level in LEVELS), "recall", "failed_recall"]
    if not len(steps):
        empty = {"n": 0, "clusters": 0, "steps": 0, "method": NO_STEPS}
        return dict.fromkeys(LEVELS, empty_bin()), [{"statistic": name} | empty for name in names]
    inside = steps.level == np.arange(len(LEVELS))[:, None]
    failed = (steps.recall < FAILED_BELOW).astype(float)
    values = np.stack([*np.where(inside, steps.recall, np.nan), steps.recall, failed])
    found = intervals.bounded_mean(values, confidence, clusters=np.broadcast_to(steps.cluster, values.shape))
    examples = _examples(steps, values)
    rows = [_mean_row(name, found, i, examples[i]) for i, name in enumerate(names)]
    bins = {
        level: Bin(found.estimate[i], found.low[i], found.high[i], *(rows[i][k] for k in ("n", "steps", "clusters")))
        for i, level in enumerate(LEVELS)
    }
    return bins, rows


def _varying(steps: Steps) -> str:
    """Return the names of the confounders that vary: ``step, length and kind of prompt``."""
    named = {"step": steps.step, "length": steps.length, "kind of prompt": steps.kind}
    names = [name for name, values in named.items() if len(values) and np.ptp(values) > 0]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _controls(steps: Steps) -> dict[str, np.ndarray]:
    """Return the regressors [steps, k] of possible confounders: piecewise linear in step and length, and kinds."""
    clusters = steps.clusters
    kinds = (steps.kind[:, None] == np.arange(1, len(steps.kinds))).astype(float)
    found = {"step": bent(steps.step, clusters), "length": bent(steps.length, clusters), "kind": kinds}
    return found | {"": np.column_stack(list(found.values()))}


def _estimates(cells: Sequence[Steps], statistics: Statistics) -> list[dict[str, Estimate]]:
    """Return the estimates of cells that differ in recall only."""
    steps, recalls, confidence = cells[0], [cell.recall for cell in cells], statistics.confidence
    if not len(steps):
        names = ("pearson", "spearman", "auroc", "partial", "trend", "slope")
        return [dict.fromkeys(names, missing(NO_STEPS))] * len(cells)
    cluster, weights = steps.cluster, resample_weights(steps.clusters, statistics.resamples, statistics.seed)
    found: dict[str, Sequence[Estimate]] = {}  # one for each cell

    def both(x: np.ndarray, ys: Sequence[np.ndarray] = recalls, controls: np.ndarray | None = None) -> list[Moments2]:
        return moments2(x, ys, cluster, weights, controls)

    def correlations(moments: Sequence[Moments2]) -> list[Estimate]:
        return [of.correlation(confidence) for of in moments]

    plain = both(steps.entropy)
    failed = [recall < FAILED_BELOW for recall in recalls]
    ranked = rank_statistics(steps.entropy, recalls, failed, cluster, weights, confidence)
    found["pearson"], found["spearman"] = correlations(plain), [spearman for spearman, _ in ranked]
    within = steps.example, cluster, weights
    found["pearson_within"] = correlations(moments2_within(steps.entropy, recalls, *within))
    of_entropy, *of_recalls = (ranks_within(values, steps.example) for values in (steps.entropy, *recalls))
    found["spearman_within"] = correlations(moments2_within(of_entropy, of_recalls, *within))
    for name, controls in _controls(steps).items():
        label = f"partial_{name}".rstrip("_")
        found[label] = correlations(both(steps.entropy, controls=controls))
    found["trend"] = [
        missing(f"all steps have {LEVELS[steps.level[0]]} entropy") if trend.method == NO_ENTROPY else trend
        for trend in (of.slope(confidence) for of in both(steps.level.astype(float)))
    ]
    found["slope"] = [of.slope(confidence) for of in plain]
    found["auroc"] = [auroc for _, auroc in ranked]
    for name, confounder in (("step", steps.step), ("length", steps.length)):
        entropy, *of_recalls = (
            missing(f"the {name} does not vary") if one.method == NO_ENTROPY else one
            for one in correlations(both(confounder, [steps.entropy, *recalls]))
        )
        found[f"entropy_on_{name}"], found[f"recall_on_{name}"] = [entropy] * len(cells), of_recalls
    return [dict(zip(found, own, strict=True)) for own in zip(*found.values(), strict=True)]


def _kinds(steps: Steps, confidence: float) -> list[Row]:
    """Return the rows of mean entropy and mean recall of each kind of prompt, if there are several."""
    if len(steps.kinds) < 2:
        return []
    inside = steps.kind == np.arange(len(steps.kinds))[:, None]
    codes = np.broadcast_to(steps.cluster, inside.shape)
    examples = _examples(steps, np.where(inside, steps.recall, np.nan))
    entropy = intervals.mean(np.where(inside, steps.entropy, np.nan), confidence, codes)
    recall = intervals.bounded_mean(np.where(inside, steps.recall, np.nan), confidence, clusters=codes)
    return [
        _mean_row(f"{name}_of_kind:{kind}", found, i, examples[i])
        for name, found in (("entropy", entropy), ("recall", recall))
        for i, kind in enumerate(steps.kinds)
    ]


def _sensitivity(found: Mapping[str, Cell], confidence: float) -> Iterator[Row]:
    """Yield how the slope of recall on entropy changes with the budget, for budgets that are fractions.

    ``sensitivity``: change of the slope per increase of the budget by 1; above 0, the slope is steeper at small
    budgets. Random sets have a recall of r, which flattens slopes at large budgets; ``sensitivity_corrected`` uses the
    slope of (recall - r) / (1 - r).
    """
    shares = {float(budget[1:]): cell for budget, cell in found.items() if budget.startswith("r") and budget != "r1"}
    size = next(iter(found.values())).size
    r = np.array(list(shares))
    why = None
    if len(shares) < 2:
        why = "needs two budgets that are fractions"
    elif any(cell.slope.draws is None for cell in shares.values()):
        why = next(cell.slope.method for cell in shares.values() if cell.slope.draws is None)
    elif len({tuple(cell.steps.examples) for cell in shares.values()}) > 1:
        why = "the budgets were observed on different examples"
    for name, scale in (("sensitivity", np.ones(len(r))), ("sensitivity_corrected", 1 / (1 - r))):
        if why:
            yield _row(name, missing(why)) | size
            continue
        slopes = np.stack([cell.slope.draws for cell in shares.values()], axis=1) * scale
        around = r - r.mean()
        draws = slopes @ around / (around @ around)
        by = Carriers(size["clusters"], min(cell.slope.by.effective for cell in shares.values()))
        yield _row(name, summarised(draws, by, confidence)) | size


def entropy_recall(observations: Sequence[str], statistics: Statistics) -> pa.Table:
    """Return a row per statistic of every cell of the observation files (tables.ENTROPY_RECALL).

    Raises UserError if there is no observed step or a row is invalid.
    """
    rows: list[Row] = []
    curves: dict[tuple[str, ...], dict[str, Cell]] = {}
    keys, observed = zip(*cells(read_observations(observations)), strict=True)
    for key, cell in zip(keys, analyse_all(observed, statistics), strict=True):
        own = [*cell.rows, *_kinds(cell.steps, statistics.confidence)]
        family = "/".join((key["task"], key["granularity"], key["memory"], "trend"))
        for row in own:
            tested = row["statistic"] == "trend" and row.get("p_value") is not None
            rows.append(key | row | ({"family": family} if tested else {}))
        curves.setdefault(tuple(v for k, v in key.items() if k != "budget"), {})[key["budget"]] = cell
    for (task, policy, granularity, memory), found in curves.items():
        key = {"task": task, "policy": policy, "granularity": granularity, "memory": memory}
        rows += [key | row for row in _sensitivity(found, statistics.confidence)]
    adjust(rows)
    return rows_to_table([{k: v for k, v in row.items() if k != "tests"} for row in rows], ENTROPY_RECALL)


def write_entropy_recall(observations: Sequence[str], output: str, statistics: Mapping[str, Any]) -> None:
    """Write tables.ENTROPY_RECALL. Raises UserError if the observations cannot be analysed."""
    table = entropy_recall(observations, Statistics(**statistics))
    write_table(output, table, inherited(observations[0]) | {"statistics": dict(statistics)})
