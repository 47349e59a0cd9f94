"""Figures of cost and benefit: paired differences from the full cache, and score against bytes."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.plotting import marks, panels, theme
from kv_transition.plotting.panels import Datasets, Spec
from kv_transition.stats import intervals
from kv_transition.stats.examples import FULL, by_cell, held_share, padded
from kv_transition.studies.grid.results import BYTES_IN_ALL, Results, Row

ALL_LENGTHS = "all lengths"
DIFFERENCES = {"score": "Score", "failure_rate": "Failure rate"}


def footprints(results: Results) -> dict[tuple[str, str, str, str], Row]:
    """Return the bytes kept (in any memory) divided by the bytes of the full cache, by (task, mode, policy, budget).

    The value is the mean over an answer if it is known, else the value at its end, and the mean over all lengths with
    the context as the cluster. Rows have estimate, ci_low, ci_high, n, method.
    """
    key = ["task", "mode", "policy", "budget"]
    share = held_share(results.scores, pl.coalesce(BYTES_IN_ALL, "cache_bytes"))
    cluster = pl.coalesce("cluster", "example_id").first().alias("cluster")
    examples = (
        results.scores.group_by(*key, "bin", "example_id")
        .agg(cluster, share=share.mean())
        .sort(*key, "bin", "example_id")
    )
    lists = by_cell(examples.select(*key, "cluster", "share"), key)
    if not lists.height:
        return {}
    found = intervals.mean(padded(lists["share"]), results.confidence, padded(lists["cluster"]))
    return {tuple(row): found.row(i) for i, row in enumerate(lists.select(key).iter_rows())}


def front(results: Results) -> list[Row]:
    """Return every policy and budget as a point: share of the bytes kept, and share of the full cache's score kept.

    ``best`` marks the Pareto front of its task and mode: no other point has at most the bytes and at least the score,
    with one of the two better. Points without measured bytes are omitted.
    """
    bytes_kept, points = footprints(results), []
    for task, mode in results.groups:
        own = []
        for policy, budget in results.pairs:
            kept = bytes_kept.get((task, mode, policy, budget))
            if policy == FULL["policy"]:
                score = {"estimate": 1.0, "ci_low": 1.0, "ci_high": 1.0, "n": kept["n"] if kept else 0, "method": "1"}
            else:
                score = results.compared(task, mode, policy, budget, None, "score_ratio")
            if not kept or not score or kept["estimate"] is None or score["estimate"] is None:
                continue
            own.append({
                "task": task, "mode": mode, "policy": policy, "budget": budget, "bytes": kept["estimate"],
                "bytes_low": kept["ci_low"], "bytes_high": kept["ci_high"], "estimate": score["estimate"],
                "low": score["ci_low"], "high": score["ci_high"], "n": score["n"],
            })  # fmt: skip
        for point in own:
            point["best"] = not any(_beats(other, point) for other in own)
        points += own
    return points


def _beats(a: Row, b: Row) -> bool:
    better = (a["bytes"] < b["bytes"], a["estimate"] > b["estimate"])
    return a["bytes"] <= b["bytes"] and a["estimate"] >= b["estimate"] and any(better)


def _percent(low: float | None, estimate: float, high: float | None, digits: int = 0) -> str:
    scaled = (None if v is None else 100 * v for v in (estimate, low, high))
    return labels.interval(*scaled, digits) + " %"


def _front_rows(results: Results) -> list[Row]:
    rows = []
    for point in front(results):
        is_full = point["policy"] == FULL["policy"]
        rows.append(point | {
            "mode": labels.mode(point["mode"]), "mode_key": point["mode"],
            "budget": "all" if is_full else labels.budget(point["budget"]),
            "score": "100 % (reference)" if is_full else _percent(point["low"], point["estimate"], point["high"]),
            "size": _percent(point["bytes_low"], point["bytes"], point["bytes_high"], 1),
            "front": "on the front" if point["best"] else "behind the front",
        })  # fmt: skip
    return rows


def _front_layers(rows: list[Row], policies: Sequence[str], data: Datasets) -> list[alt.Chart]:
    top = max([1.0, *(r["high"] for r in rows if r["high"] is not None)])
    widest = max([1.0, *(r["bytes"] for r in rows)])
    x = alt.X("bytes:Q", scale=marks.unit_scale(widest * 1.04, clamp=False), axis=alt.Axis(format=".0%",
              title="bytes kept, of the full cache's", grid=False, tickCount=5))  # fmt: skip
    y = alt.Y("estimate:Q", scale=marks.unit_scale(top * 1.03, clamp=False),
              axis=alt.Axis(format=".0%", title="score kept, of the full cache's", tickCount=5))  # fmt: skip
    tip = panels.tooltip({
        "policy": "policy", "budget": "budget", "mode": "compressed", "score": "score kept", "size": "bytes kept",
        "n": "n", "front": "Pareto",
    })  # fmt: skip
    color, shape = theme.policy_scales(policies)
    full = [r for r in rows if r["policy"] == FULL["policy"]]
    best = sorted((r for r in rows if r["best"]), key=lambda r: r["bytes"])
    return [
        data.chart(best).mark_line(interpolate="step-after", color=theme.NEUTRAL, strokeWidth=1.4, strokeDash=[2, 3])
        .encode(x=x, y=y),
        *marks.points(data, rows, x, y, (color, shape), tip),
        data.chart(full).mark_point(filled=True, size=80, opacity=1, color=theme.NEUTRAL, shape="circle")
        .encode(x=x, y=y, tooltip=tip),
        data.chart(best).mark_point(filled=False, size=230, color=theme.INK, strokeWidth=1.2, shape="circle")
        .encode(x=x, y=y),
    ]  # fmt: skip


_FRONT_TITLE = "Score kept against bytes kept"


def _front_note(results: Results) -> str:
    return f"over all lengths; {panels.share(results.confidence)} of the score kept; ringed: on the Pareto front"


def _nothing_measured(title: str, results: Results) -> Spec:
    why = "There is nothing to draw, because bytes of the cache were not measured or nothing was compared."
    return panels.note(why, title, panels.share(results.confidence))


def front_figure(results: Results) -> Spec:
    """Return the figure of score kept against bytes kept: a panel per task and mode, with the Pareto front ringed."""
    rows = _front_rows(results)
    if not rows:
        return _nothing_measured(_FRONT_TITLE, results)
    data, drawn = Datasets(), []
    for task, mode in results.groups:
        own = [r for r in rows if (r["task"], r["mode_key"]) == (task, mode)]
        if own:
            title = panels.title(results.heading(task, mode))
            drawn.append(panels.panel(_front_layers(own, results.policies, data), 380, 250, title))
    return panels.figure(drawn, 2, data, _FRONT_TITLE, _front_note(results))


def front_explorer(results: Results) -> Spec | None:
    """Return that figure as an interactive chart, one mode at a time; None if no bytes were measured."""
    rows = _front_rows(results)
    if not rows:
        return None
    data = Datasets(panels.choices(rows, {"mode": "Compressed", "task": "Task"}))
    return panels.explorer(_front_layers(rows, results.policies, data), 210, data, _FRONT_TITLE, _front_note(results))


def difference_rows(results: Results) -> list[Row]:
    """Return the paired differences from the full cache, per bin and over all bins."""
    tokens = {(task, b["bin"]): labels.token_range(b["token_min"], b["token_max"])
              for task, _ in results.groups for b in results.bins(task)}  # fmt: skip
    rows = []
    for task, mode in results.groups:
        for policy, budget in results.pairs[1:]:
            for statistic, title in DIFFERENCES.items():
                for bin in (None, *(b["bin"] for b in results.bins(task))):
                    row = results.compared(task, mode, policy, budget, bin, statistic)
                    if row is None:
                        continue
                    rows.append({
                        "task": task, "mode": labels.mode(mode), "mode_key": mode, "policy": policy,
                        "budget": labels.budget(budget), "budget_key": budget, "bin": bin,
                        "name": f"{policy}, {labels.budget(budget)}", "statistic": statistic, "measure": title,
                        "lengths": ALL_LENGTHS if bin is None else f"{tokens[task, bin]} tokens",
                        "estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"], "n": row["n"],
                        "interval": labels.signed(row), "p": labels.p_value(row["p_holm"]), "p_holm": row["p_holm"],
                        "method": row["method"],
                    })  # fmt: skip
    return rows


def forest(
    rows: Sequence[Row],
    policies: Sequence[str],
    data: Datasets,
    what: str = "policy minus full cache",
) -> list[alt.Chart]:
    """Return the layers of a forest plot of differences: rows as of `difference_rows`, one line per ``name``."""
    ends = [r[k] for r in rows for k in ("estimate", "low", "high") if r[k] is not None]
    domain = [max(-1.0, 1.05 * min([-0.1, *ends])), min(1.0, 1.05 * max([0.1, *ends]))]
    signs = "datum.value == 0 ? '0' : format(datum.value, '+.2~f')"
    axis = alt.Axis(title=what, labelExpr=signs, tickCount=6)
    names = list(dict.fromkeys(r["name"] for r in rows))
    y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, domain=False, ticks=False, grid=True))
    tip = panels.tooltip({
        "name": "policy, cache kept", "lengths": "lengths", "interval": "difference [interval]", "p": "p after Holm",
        "n": "n", "method": "method",
    })  # fmt: skip
    drawn = [r for r in rows if r["estimate"] is not None]
    full = [r for r in drawn if r["policy"] == FULL["policy"]]
    x = alt.X("estimate:Q", scale=alt.Scale(domain=domain, nice=False, clamp=True), axis=axis)
    return [
        *marks.forest(data, drawn, x, y, theme.policy_scales(policies), tip),
        data.chart(full).mark_point(filled=True, size=70, opacity=1, color=theme.NEUTRAL, shape="circle")
        .encode(y=y, x=x, tooltip=tip),
    ]  # fmt: skip


_DIFFERENCE_TITLE = "Paired differences from the full cache"


def difference_figure(results: Results) -> Spec:
    """Return the differences in score over all lengths with their intervals: a panel per task and mode."""
    share = f"score, over all lengths; {panels.share(results.confidence)}; left of the line: worse than full"
    pooled = [r for r in difference_rows(results) if r["bin"] is None and r["statistic"] == "score"]
    if not pooled:
        return panels.note("Nothing was compared with the full cache.", _DIFFERENCE_TITLE, share)
    data, drawn = Datasets(), []
    for task, mode in results.groups:
        own = [r for r in pooled if (r["task"], r["mode_key"]) == (task, mode)]
        if own:
            title = panels.title(results.heading(task, mode))
            drawn.append(panels.panel(forest(own, results.policies, data), 300, {"step": 21}, title))
    return panels.figure(drawn, 2, data, _DIFFERENCE_TITLE, share)


def difference_explorer(results: Results) -> Spec | None:
    """Return the differences as an interactive chart: score or failures, one bin or all, one mode at a time."""
    rows = difference_rows(results)
    if not rows:
        return None
    controls = {"lengths": "Lengths", "mode": "Compressed", "task": "Task", "measure": "Measure"}
    data = Datasets(panels.choices(rows, controls))
    share = f"{panels.share(results.confidence)}; for the score, left of the line is worse than the full cache"
    height = 24 * len({row["name"] for row in rows})
    return panels.explorer(forest(rows, results.policies, data), height, data, _DIFFERENCE_TITLE, share)
