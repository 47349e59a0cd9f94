"""Non-inferiority: whether a policy keeps 95 % of the full cache's score, and the smallest budget that does.

Not finding a loss proves nothing; non-inferiority is a test of its own. H0: mean score <= 0.95 times the full cache's,
on the same examples, that is, mean(d) <= 0 for d = score - 0.95 score_full.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from kv_transition import labels
from kv_transition.provenance import rows_to_table
from kv_transition.stats import paired
from kv_transition.stats.examples import CELL, Statistics, by_cell, example_values, is_full, on_both, padded
from kv_transition.stats.intervals import finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.grid.tables import NONINFERIORITY, SMALLEST_BUDGET

KEPT = 0.95
SEQUENCE = f"ratio: {paired.FIELLER}; budget: fixed sequence of tests of non-inferiority"


def noninferiority(scores: pa.Table, statistics: Statistics, kept: float = KEPT) -> pa.Table:
    """Return the test for every policy and budget, per bin and over all bins (``bin`` null): tables.NONINFERIORITY.

    ``estimate``: the mean of d with its interval. ``ratio``: the share of the full cache's score that was kept.
    One-sided p-values are Holm-adjusted over the policies and bins of one task, mode and budget. A policy is
    non-inferior if p_holm < (1 - confidence) / 2, which for a single test means that the interval lies above 0.
    """
    frame = example_values(scores).filter(~pl.col("alias"))
    both = on_both(frame.filter(~is_full()), frame.filter(is_full()), ["task", "mode"], "_full")
    rows: list[dict[str, Any]] = []
    levels = [both, both.with_columns(bin=pl.lit(None, dtype=both.schema["bin"]))] if both.height else []
    for level in levels:
        lists = by_cell(level, CELL)
        keys = lists.select(CELL).to_dicts()
        clusters = padded(lists["cluster"])
        score, full = padded(lists["score"]), padded(lists["score_full"])
        tested = margin(score - kept * full, kept, clusters)
        found, p = tested.interval(statistics.confidence), tested.p_above
        ratio = paired.ratio(score, full, statistics.confidence, clusters)
        for i, key in enumerate(keys):
            row = {**key, "kept": kept, **found.row(i), "method": f"paired, {found.method[i]}"}
            if found.n[i]:
                scope = "all bins" if key["bin"] is None else "by bin"
                row |= {
                    "ratio": finite(ratio.estimate[i]),
                    "ratio_low": finite(ratio.low[i]),
                    "ratio_high": finite(ratio.high[i]),
                    "p_value": float(p[i]),
                    "family": "/".join((key["task"], key["mode"], key["budget"], "noninferiority", scope)),
                    "tested": tested.one(i),
                    "at": partial(paired.ratio, score[i : i + 1], full[i : i + 1], clusters=clusters[i : i + 1]),
                }
            rows.append(row)
    adjust(rows, statistics.alpha / 2)
    for row in rows:
        row["non_inferior"] = row["p_holm"] < statistics.alpha / 2 if "p_holm" in row else None
        if "p_holm" in row:
            level, tested = statistics.alpha / 2 / row.pop("tests"), row.pop("tested")
            # one-sided, so that the bound is above `kept` exactly if non-inferiority is shown
            row["ratio_holm_low"] = finite(row.pop("at")(confidence=1 - 2 * row.pop("level")).low[0])
            row["n_needed"] = examples_needed(level, kept)
            row["n_decides"] = tested.decides(level) if row["estimate"] > 0 else None
    return rows_to_table(rows, NONINFERIORITY)


def margin(difference: np.ndarray, kept: float, clusters: np.ndarray | None = None) -> paired.Paired:
    """Return the mean of d = score - kept * full score ``[cells, n]`` with its test; a lost pair has d = -kept.

    ``p_above`` < (1 - confidence) / 2 exactly if the lower bound is above 0, and exactly if the lower bound of the
    ratio is above ``kept``.
    """
    return paired.difference(difference, clusters, (-kept, 1.0))


@lru_cache(maxsize=256)
def examples_needed(level: float, kept: float = KEPT) -> int | None:
    """Return the number of examples, all right with both caches, that would show non-inferiority at a one-sided
    ``level``.

    It is the smallest number with which the test can succeed. None if it exceeds 100,000.
    """
    for n in np.unique(np.geomspace(2, 100_000, 800).astype(int)).tolist():
        if margin(np.full((1, n), 1 - kept), kept).p_above[0] < level:
            return n
    return None


def smallest_budgets(tested: pa.Table, statistics: Statistics) -> pa.Table:
    """Return, per policy, bin and over all bins, the smallest budget down to which the policy is non-inferior.

    The tests form a fixed sequence (Maurer et al. 1995): budgets are tested from the largest to the smallest, and the
    first that fails ends the sequence, so that the budgets of one policy need no further adjustment. Shares and numbers
    of tokens are separate sequences. ``budget`` uses the Holm-adjusted p-values; ``budget_unadjusted`` uses those for a
    question about this policy and bin only. Both are null if the largest budget already fails.
    """
    frame = pl.from_arrow(tested).with_columns(kind=pl.col("budget").str.slice(0, 1))
    rows = []
    key = ["task", "mode", "policy", "bin", "kind"]
    for (task, mode, policy, bin, _), part in frame.sort(key, nulls_last=True).group_by(key, maintain_order=True):
        steps = sorted(part.to_dicts(), key=lambda row: labels.budget_order(row["budget"]))
        passed = _passed(steps, "p_holm", statistics.alpha / 2)
        alone = _passed(steps, "p_value", statistics.alpha / 2)
        last = passed[-1] if passed else None
        shown = last or steps[0]
        rows.append(
            {
                "task": task,
                "mode": mode,
                "policy": policy,
                "bin": bin,
                "kept": shown["kept"],
                "budget": last["budget"] if last else None,
                "budget_unadjusted": alone[-1]["budget"] if alone else None,
                "tested": [row["budget"] for row in steps],
                **{name: shown[name] for name in ("ratio", "ratio_low", "ratio_high", "n", "clusters")},
                "method": SEQUENCE,
                "reason": _reason(policy, mode, passed, steps),
            }
        )
    return rows_to_table(rows, SMALLEST_BUDGET)


def _passed(steps: list[dict[str, Any]], p: str, level: float) -> list[dict[str, Any]]:
    stop = next((i for i, row in enumerate(steps) if row[p] is None or row[p] >= level), len(steps))
    return steps[:stop]


def _reason(policy: str, mode: str, passed: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    share = f"{100 * steps[0]['kept']:g} %"

    def at(row: dict[str, Any]) -> str:
        ratio = labels.interval(row["ratio"], row["ratio_low"], row["ratio_high"])
        return f"{labels.budget(row['budget'])} (ratio {ratio}, {labels.count(row['n'], row['clusters'])})"

    name = f"{policy}, {labels.mode(mode)}"
    if len(passed) == len(steps):
        return f"{name}: keeps {share} of the full cache's score down to {at(passed[-1])}, the smallest budget tested."
    failed = steps[len(passed)]
    if not failed["n"] or failed["p_value"] is None:
        why = f"no answers to compare at {labels.budget(failed['budget'])}"
    else:
        why = f"not shown at {at(failed)}"
        if failed["n_needed"] is None or failed["clusters"] < failed["n_needed"]:
            needed = "more than 100,000" if failed["n_needed"] is None else f"at least {failed['n_needed']}"
            why += f"; even without any loss the test would need {needed} examples"
    if passed:
        return f"{name}: keeps {share} of the full cache's score down to {at(passed[-1])}; {why}."
    return f"{name}: not shown to keep {share} of the full cache's score at any budget; {why}."
