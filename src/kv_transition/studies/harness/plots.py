"""The figure of lm-evaluation-harness's tasks: score against what is kept, a panel per task, metric and mode."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import polars as pl
from scipy import stats

from kv_transition import labels
from kv_transition.plotting import marks, panels, save, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table

FIGURE = "harness_scores"
METRIC = ("task", "metric", "filter")
WIDTH, HEIGHT, COLUMNS = 300, 200, 3
_TITLE = "Scores of lm-evaluation-harness"


def points(table: pl.DataFrame, confidence: float) -> list[Row]:
    """Return each score as drawn, with the normal interval of the harness's standard error where it has one."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    found = []
    for row in table.iter_rows(named=True):
        away = None if row["stderr"] is None else z * row["stderr"]
        low, high = (None, None) if away is None else (row["score"] - away, row["score"] + away)
        found.append({
            **{name: row[name] for name in (*METRIC, "mode", "policy", "budget", "n")},
            "kept": labels.kept(row["policy"], row["budget"]), "estimate": row["score"], "low": low, "high": high,
            "interval": labels.interval(row["score"], low, high, 3),
        })  # fmt: skip
    return found


def scores_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Return the score of each policy against the budget; the full cache is grey, dashed, with its own interval."""
    found = points(table, confidence)
    names = sorted({row["policy"] for row in found} - {FULL["policy"]})
    budgets = sorted({row["budget"] for row in found if row["policy"] in names}, key=labels.budget_order)
    how = f"{panels.share(confidence)} from the standard errors of lm-evaluation-harness"
    if not names:
        return panels.note("No policy was run beside the full cache.", _TITLE, how)
    data, drawn = Datasets(), []
    modes = sorted({row["mode"] for row in found} - {None})
    for key in dict.fromkeys(tuple(row[name] for name in METRIC) for row in found):
        for mode in modes:
            own = [row for row in found if tuple(row[name] for name in METRIC) == key and row["mode"] in (mode, None)]
            counts = [row["n"] for row in own if row["n"] is not None]
            about = labels.mode(mode) + (f", n = {panels.span(counts)}" if counts else "")
            layers = _layers(own, names, budgets, data)
            drawn.append(panels.panel(layers, WIDTH, HEIGHT, panels.title(named(*key), about)))
    columns = len(modes) if len(modes) > 1 else COLUMNS  # both modes of a task beside each other
    return panels.figure(drawn, columns, data, _TITLE, f"{how}; n: documents; grey, dashed: the full cache")


def named(task: str, metric: str, chosen: str) -> str:
    """Return the name of a task's metric, with the filter if there is one."""
    return f"{task}: {metric}" + ("" if chosen == "none" else f" ({chosen})")


def _layers(rows: list[Row], names: list[str], budgets: list[str], data: Datasets) -> list[alt.Chart]:
    kept = [labels.budget(budget) for budget in budgets]
    x = alt.X("kept:N", sort=kept, scale=alt.Scale(domain=kept), axis=alt.Axis(title="kept", labelAngle=0, grid=False))
    y = alt.Y("estimate:Q", scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(title="score", tickCount=5))
    apart = alt.XOffset("policy:N", scale=alt.Scale(domain=names))
    full = [row for row in rows if row["policy"] == FULL["policy"]]
    own = [row for row in rows if row["policy"] != FULL["policy"]]
    tip = panels.tooltip({"policy": "policy", "kept": "kept", "interval": "score [interval]", "n": "documents"})
    ends = data.chart(marks.bounded(full)).mark_rect(color=theme.NEUTRAL, opacity=marks.BAND)
    return [
        ends.encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q")),
        marks.level(data, full, y),
        *(layer.encode(xOffset=apart) for layer in marks.points(data, own, x, y, theme.policy_scales(names), tip)),
    ]


def write_harness_plots(table: str, confidence: float, outputs: Mapping[str, str]) -> None:
    """Write the figure; ``outputs``: path by ``harness_scores_{svg|png}``. Raises UserError for another name."""
    save.save_figures({FIGURE: lambda: scores_figure(read_table(table), confidence)}, outputs)
