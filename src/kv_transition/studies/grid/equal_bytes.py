"""Policies at equal bytes: scores are interpolated to one footprint, because footprints at one budget can differ.

The score of a policy at a footprint is interpolated linearly between the two budgets around it, example by example (the
full cache is the largest budget). Intervals and tests of interpolated scores are those of any paired comparison. The
linear course between two budgets is an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from kv_transition.stats import paired
from kv_transition.stats.examples import FULL
from kv_transition.stats.intervals import finite
from kv_transition.studies.grid.results import Results
from kv_transition.studies.grid.tradeoff import footprints

APART = 0.02
"""if the footprints of two policies differ by more than this share, the report says so beside their comparison"""
Pair = tuple[str, str]


def apart(a: float | None, b: float | None) -> bool:
    """Return whether two footprints differ by more than `APART` of the larger."""
    return a is not None and b is not None and abs(a - b) > APART * max(a, b)


@dataclass(frozen=True)
class Curve:
    """Scores and footprints of one task and mode: ``scores`` [examples] of each (policy, budget), ``share`` of the
    bytes.

    ``scores`` has NaN for missing answers. ``clusters`` [examples]: codes of shared documents.
    """

    scores: dict[Pair, np.ndarray]
    share: dict[Pair, float]
    clusters: np.ndarray

    def points(self, policy: str) -> list[tuple[float, Pair]]:
        """Return footprints and budgets of a policy, from small to large; the full cache is the last."""
        own = [pair for pair in self.share if pair[0] == policy]
        full = tuple(FULL.values())
        return sorted((self.share[pair], pair) for pair in (*own, full) if pair in self.scores)

    def at(self, policy: str, share: float) -> np.ndarray | None:
        """Return the scores [examples] of a policy at a footprint; None below its smallest footprint."""
        points = self.points(policy)
        for (low, small), (high, large) in pairwise(points):
            if low <= share * (1 + 1e-9) and share <= high:
                weight = (share - low) / (high - low) if high > low else 0.0
                weight = min(max(weight, 0.0), 1.0)
                return (
                    self.scores[small]
                    if weight == 0
                    else (1 - weight) * self.scores[small] + (weight * self.scores[large])
                )
        return None


def curve(results: Results, task: str, mode: str) -> Curve:
    """Return the scores and footprints of one task and mode."""
    own = results.scores.filter(task=task, mode=mode).with_columns(cluster=pl.coalesce("cluster", "example_id"))
    examples = own.group_by("bin", "example_id").agg(pl.col("cluster").first()).sort("bin", "example_id")
    means = own.group_by("policy", "budget", "bin", "example_id").agg(pl.col("score").mean())
    scores = {}
    for pair, part in means.group_by("policy", "budget"):
        joined = examples.join(part, on=["bin", "example_id"], how="left", maintain_order="left")
        scores[pair] = joined["score"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    share = {
        (policy, budget): row["estimate"]
        for (t, m, policy, budget), row in footprints(results).items()
        if (t, m) == (task, mode) and row["estimate"] is not None
    }
    return Curve(scores, share, examples["cluster"].rank("dense").to_numpy().astype(float) - 1)


def rankings(results: Results, task: str, mode: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each budget and policy: the score kept at the budget, and at the largest footprint of that
    budget.

    ``share``: footprint at the budget. ``at``: the largest footprint. ``kept`` and ``matched``: score kept at these
    two, with bounds. ``rank`` and ``rank_matched``: ranks from 1. ``unequal``: footprints at this budget differ by more
    than `APART`.
    """
    of = curve(results, task, mode)
    full = of.scores.get(tuple(FULL.values()))
    if full is None:
        return
    for budget in results.budgets:
        own = [p for p in results.contenders if (p, budget) in of.share and (p, budget) in of.scores]
        if not own:
            continue
        at = max(of.share[p, budget] for p in own)
        rows = []
        for policy in own:
            moved = of.at(policy, at)
            row = {"policy": policy, "budget": budget, "share": of.share[policy, budget], "at": at}
            row |= _kept("kept", of.scores[policy, budget], full, of.clusters, results.confidence)
            row |= _kept("matched", moved, full, of.clusters, results.confidence)
            rows.append(row)
        for name in ("kept", "matched"):
            order = sorted((r for r in rows if r[name] is not None), key=lambda r: -r[name])
            for rank, row in enumerate(order, 1):
                row["rank" if name == "kept" else "rank_matched"] = rank
        unequal = any(apart(at, row["share"]) for row in rows)
        yield from (row | {"unequal": unequal} for row in sorted(rows, key=lambda r: r.get("rank_matched", 99)))


def _kept(name: str, scores: np.ndarray | None, full: np.ndarray, clusters: np.ndarray, confidence: float) -> dict:
    if scores is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": 0}
    found = paired.ratio(scores[None], full[None], confidence, clusters[None])
    ends = {"": found.estimate, "_low": found.low, "_high": found.high}
    return {f"{name}{end}": finite(value[0]) for end, value in ends.items()} | {f"{name}_n": int(found.n[0])}


def difference(of: Curve, budget: str, one: str, other: str, confidence: float) -> dict[str, Any] | None:
    """Return ``one`` minus ``other`` at the larger of their footprints at a budget, as a row; None if it is unknown."""
    shares = [of.share.get((policy, budget)) for policy in (one, other)]
    if None in shares:
        return None
    scores = [of.at(policy, max(shares)) for policy in (one, other)]
    if any(part is None for part in scores):
        return None
    tested = paired.difference((scores[0] - scores[1])[None], of.clusters[None])
    return {"shares": shares, "p_value": finite(tested.p[0])} | tested.interval(confidence).row(0)
