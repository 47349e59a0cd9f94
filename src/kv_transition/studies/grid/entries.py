"""The figure of the entries that are held while answers are generated, with `decoding.compress_every`."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

import altair as alt

from kv_transition import labels
from kv_transition.plotting import marks, panels, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.studies.grid.results import Results

NAME, TITLE = "entries_over_steps", "Entries held over the answer"


def entry_rows(results: Results) -> list[Row]:
    """Return a point for each task, mode, policy, budget and step: entries per KV head over those of the prompt's
    budget, mean and range over answers.

    Only answers whose cells recorded them count; n is the number of answers that were still going on.
    """
    found: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    columns = ["task", "mode", "policy", "budget", "budget_entries", "raw"]
    for *key, k, raw in results.scores.select(columns).drop_nulls(["budget_entries", "raw"]).iter_rows():
        for step, entries in json.loads(raw).get("entries") or ():
            found.setdefault(tuple(key), {}).setdefault(step, []).append(entries / k)
    return [
        dict(zip(columns, key, strict=False))
        | {"step": step, "estimate": fmean(held), "low": min(held), "high": max(held), "n": len(held)}
        for key, steps in sorted(found.items())
        for step, held in sorted(steps.items())
    ]


def entries_figure(results: Results) -> Spec:
    """Return entries over the budget against the token of the answer: a panel per task, mode and budget."""
    rows = entry_rows(results)
    subtitle = "mean over answers; bands from the least to the greatest"
    if not rows:
        return panels.note("Nothing to draw: no answer was compressed while it was generated.", TITLE, subtitle)
    scale = alt.Scale(domain=[0, 1.05 * max(row["high"] for row in rows)], nice=False)
    steps = sorted({row["step"] for row in rows})
    at = alt.Axis(title="token of the answer", grid=False, format="d", tickMinStep=1)
    x = alt.X("step:Q", scale=alt.Scale(domain=[steps[0], steps[-1]], nice=False), axis=at)
    y = alt.Y("estimate:Q", scale=scale, axis=alt.Axis(title="entries over the prompt's budget", tickCount=5))
    color, _ = theme.policy_scales(results.policies)
    color["legend"]["values"] = [p for p in results.policies if p in {row["policy"] for row in rows}]
    names = {"policy": "policy", "step": "token", "estimate": "entries over budget, mean", "n": "answers"}
    data, drawn = Datasets(), []
    for task, mode, budget in results.panels:
        own = [row for row in rows if (row["task"], row["mode"], row["budget"]) == (task, mode, budget)]
        if not own:
            continue
        head = f"{task}, {labels.mode(mode)}" if results.several_tasks else labels.mode(mode).capitalize()
        chart = data.chart(own)
        between: dict[str, Any] = {"x": x, "y": alt.Y("low:Q"), "y2": "high:Q", "color": color}
        layers = [
            chart.mark_area(opacity=marks.BAND).encode(**between),
            chart.mark_line(strokeWidth=marks.LINE, interpolate="step-after").encode(
                x=x, y=y, color=color, tooltip=panels.tooltip(names)
            ),
        ]
        shown = (
            f"{labels.budget(budget)} kept" if budget.startswith("t") else f"{labels.budget(budget)} of the cache kept"
        )
        drawn.append(panels.panel(layers, 330, 190, panels.title(head, shown)))
    return panels.figure(
        drawn, 3, data, TITLE, f"{subtitle}; n = {panels.span([row['n'] for row in rows])} answers a point"
    )
