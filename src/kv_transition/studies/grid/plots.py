"""Figures of the grid: scores, failures and times against document length."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from kv_transition import labels
from kv_transition.eval.failures import LABELS
from kv_transition.plotting import marks, panels, save, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.stats import intervals
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid import entries, tradeoff
from kv_transition.studies.grid.results import Results, read_results

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 330, 190, 3
COLLAPSE = {"text": "×", "fontSize": 26, "fontWeight": "bold", "dy": 1, "stroke": theme.INK, "strokeWidth": 0.9}

FIGURES = {
    "acc_vs_len": ("score_mean", "Score", "Mean score against document length"),
    "std_vs_len": (
        "score_std",
        "Standard deviation",
        "Standard deviation of the score between examples against document length",
    ),
    "failrate_vs_len": ("failure_rate", "Failure rate", "Share of failed answers against document length"),
    "unknown_vs_len": ("abstention_rate", "Share of “unknown”", "Share of answers “unknown” against document length"),
    "broken_vs_len": ("broken_rate", "Share broken", "Share of broken answers against document length"),
    "latency_vs_len": ("latency_p50", "Seconds, median", "Time to answer against document length"),
}


def _head(results: Results, task: str, mode: str) -> str:
    return f"{task}, {labels.mode(mode)}" if results.several_tasks else labels.mode(mode).capitalize()


def _rows(results: Results, statistic: str, panel: tuple[str, str, str], scale: float = 1.0) -> list[dict[str, Any]]:
    """Return the points of one panel; the points of different policies are shifted slightly so that they do not
    overlap.
    """
    task, mode, budget = panel
    curve = results.curve(statistic, task, mode)
    present = [p for p in results.policies if curve.filter(policy=p, budget=budget).height]
    step = min(0.085, 0.5 / max(len(present), 1))
    rows = []
    for row in curve.sort("policy", "bin").iter_rows(named=True):
        is_full = row["policy"] == FULL["policy"]
        if not is_full and row["budget"] != budget:
            continue
        estimate, low, high = (None if row[k] is None else row[k] * scale for k in ("estimate", "ci_low", "ci_high"))
        dodge = 0.0 if is_full else (present.index(row["policy"]) - (len(present) - 1) / 2) * step
        rows.append(
            {
                "policy": row["policy"],
                "bin": row["bin"],
                "x": row["bin"] + dodge,
                "tokens": labels.token_range(row["token_min"], row["token_max"]),
                "estimate": estimate,
                "low": low,
                "high": high,
                "n": row["n"],
                "interval": labels.interval(estimate, low, high, 3),
                "method": row["method"],
            }
        )
    return rows


def _marked(results: Results, panel: tuple[str, str, str], rows: list[dict[str, Any]]) -> tuple[list, list]:
    """Return the points inside a transition zone and the points of collapse."""
    task, mode, budget = panel
    found = results.transition.filter(detector="definition", task=task, mode=mode, budget=budget)
    zone, collapse = [], []
    for verdict in found.iter_rows(named=True):
        own = [r for r in rows if r["policy"] == verdict["policy"]]
        first, last = verdict["onset_bin"], verdict["collapse_bin"]
        if first is not None:
            end = last if last is not None else max((r["bin"] for r in own), default=first)
            zone += [r for r in own if first <= r["bin"] <= end]
        if last is not None:
            collapse += [r for r in own if r["bin"] == last]
    return zone, collapse


def _panel(
    results: Results, data: Datasets, statistic: str, title_y: str, panel: tuple[str, str, str], top: float
) -> Spec:
    task, mode, budget = panel
    rows = _rows(results, statistic, panel)
    bins = dict(
        results.stats.filter(task=task)
        .sort("bin")
        .unique("bin", keep="first", maintain_order=True)
        .select("bin", pl.struct("token_min", "token_max"))
        .iter_rows()
    )
    names = [labels.token_range(r["token_min"], r["token_max"]) for r in bins.values()]
    numbers = list(bins)
    expression = "{" + ",".join(f"{b}: '{name}'" for b, name in zip(numbers, names, strict=True)) + "}[datum.value]"
    x = alt.X(
        "x:Q",
        scale=marks.index_scale(numbers, 0.45),
        axis=alt.Axis(
            values=numbers, labelExpr=expression, grid=False, title="tokens in the document", labelOverlap=False
        ),
    )
    y = alt.Y("estimate:Q", scale=marks.unit_scale(top), axis=alt.Axis(title=title_y, tickCount=5))
    scales = theme.policy_scales(results.policies)
    full = [r for r in rows if r["policy"] == FULL["policy"]]
    own = [r for r in rows if r["policy"] != FULL["policy"]]
    zone, collapse = _marked(results, panel, own) if statistic != "latency_p50" else ([], [])
    tip = panels.tooltip({"policy": "policy", "tokens": "tokens", "interval": "interval", "n": "n"})
    at: dict[str, Any] = {"x": x, "y": y, "color": scales[0]}
    layers = [
        *marks.reference(data, full, x, y, scales[0]),
        data.chart(zone).mark_line(strokeWidth=13, opacity=0.22, strokeCap="round", strokeJoin="round")
        .encode(**at, detail=alt.Detail("policy:N")),
        *marks.curves(data, own, x, y, scales, tip=tip),
        data.chart(collapse).mark_text(**COLLAPSE).encode(**at),
    ]  # fmt: skip
    shown = f"{labels.budget(budget)} kept" if budget.startswith("t") else f"{labels.budget(budget)} of the cache kept"
    if budget == FULL["budget"]:
        shown = "full cache"
    return panels.panel(layers, PANEL_WIDTH, PANEL_HEIGHT, panels.title(_head(results, task, mode), shown))


def along_length(results: Results, figure: str) -> Spec:
    """Return the figure of one statistic against the length bins: one panel per task, mode and budget."""
    statistic, title_y, title = FIGURES[figure]
    shown = results.stats.filter(statistic=statistic).drop_nulls("estimate")
    share = panels.share(results.confidence)
    if not shown.height:
        reasons = results.stats.filter(statistic=statistic)["method"].unique().sort().to_list()
        text = f"There is nothing to draw: {'; '.join(reasons) or 'not measured'}."
        return panels.note(text, title, share)
    top = 1.03
    if statistic == "score_std":
        top = 0.55
    if statistic == "latency_p50":
        top = 1.05 * max(v for name in ("estimate", "ci_high") for v in shown[name].drop_nulls())
    subtitle = [f"{share}; n = {panels.span(list(shown['n']))} examples a point; grey: the full cache"]
    zones = results.transition.filter(detector="definition").drop_nulls("onset_bin").height
    collapses = results.transition.filter(detector="definition").drop_nulls("collapse_bin").height
    key = ["wide band: transition zone, from the onset of instability"] * bool(zones) + ["×: collapse"] * bool(
        collapses
    )
    if key and statistic != "latency_p50":
        subtitle.append("; ".join(key))
    data, rows = Datasets(), []
    for task, mode in dict.fromkeys(panel[:2] for panel in results.panels):
        own = [_panel(results, data, statistic, title_y, p, top) for p in results.panels if p[:2] == (task, mode)]
        rows += panels.rows_of(own, COLUMNS)
    return panels.compose({"vconcat": rows, "spacing": 26}, data, title, *subtitle)


# One colour for each failure label: failures of the engine, unusable answers, refusals.
FAILURE_COLORS = dict(
    zip(
        LABELS,
        ("#000000", "#773311", "#331199", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73"),
        strict=True,
    )
)
# Numbers on these colours are white, on the others black.
_DARK = ("#000000", "#773311", "#331199", "#0072B2")

_STACK_PX, _NUMBER_PX = 300, 8


def number_color(color: str) -> str:
    """Return the colour of a number on a bar of ``color``."""
    return "#FFFFFF" if color in _DARK else "#000000"


def failure_rows(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the share of each failure by task, mode, budget and policy, and the overall failure rates with intervals.

    A row of the rates also contains the rates of its two kinds: answers “unknown”, and broken answers.
    """
    frame = results.scores.filter(~pl.col("alias"))
    group = ["task", "mode", "policy", "budget"]
    parts, totals = [], []
    for key, cell in frame.sort(group).group_by(group, maintain_order=True):
        named = dict(zip(group, key, strict=True))
        failed, honest = pl.col("failure").is_not_null(), pl.col("failure").is_in(labels.HONEST).fill_null(False)
        kinds = {"rate": failed, "unknown": honest, "broken": failed & ~honest}
        cluster = pl.coalesce("cluster", "example_id").first().alias("cluster")
        per_example = cell.group_by("bin", "example_id").agg(cluster, **{name: of.mean() for name, of in kinds.items()})
        values = per_example.select(*kinds).to_numpy().T
        codes = np.broadcast_to(per_example["cluster"].rank("dense").to_numpy() - 1, values.shape)
        rates = intervals.bounded_mean(values, results.confidence, clusters=codes)
        whole = rates.row(0)
        counted = labels.count(whole["n"], whole["clusters"])
        text = f"{labels.interval(whole['estimate'], whole['ci_low'], whole['ci_high'])}, {counted}"
        totals.append({**named, **whole, "text": text, "unknown": rates.row(1), "broken": rates.row(2)})
        counts = dict(cell["failure"].drop_nulls().value_counts().iter_rows())
        for label in LABELS:
            if label in counts:
                share = counts[label] / cell.height
                parts.append({**named, "failure": labels.failure(label), "share": share, "order": LABELS.index(label)})
    return parts, totals


def _numbers(parts: list[dict[str, Any]], whole: list[dict[str, Any]], shown: list[str], least: float) -> list[Row]:
    """Return the number of each kind of failure in its part of a bar, in front of the interval of the whole rate.

    shown: the kinds in the order of the legend. least: the share that is wide enough for a number; parts with less
    than that in front of the interval get none.
    """
    rows = []
    for total in whole:
        left = 0.0
        for part in sorted((p for p in parts if p["name"] == total["name"]), key=lambda p: p["order"]):
            free = min(left + part["share"], total["ci_low"] or 1.0)
            if free - left >= least:
                kind = LABELS[part["order"]]
                at = min(left + part["share"] / 2, free - least / 2)
                ink = number_color(FAILURE_COLORS[kind])
                rows.append({"name": total["name"], "at": at, "number": shown.index(kind) + 1, "ink": ink})
            left += part["share"]
    return rows


def failure_stack(results: Results) -> Spec:
    """Return stacked shares of failures per policy and budget, with the overall rate and its interval.

    Parts of a bar have the number of their kind, so that the figure can be read without colours.
    """
    parts, totals = failure_rows(results)
    title = "Failures by kind"
    share = f"share of all answers over all lengths; whole rate with {100 * results.confidence:g} % interval and n"
    if not parts:
        n = sum(row["n"] for row in totals)
        return panels.note(f"No answer failed (n = {n}).", title, share)
    for row in (*parts, *totals):
        cache = "" if row["policy"] == FULL["policy"] else f", {labels.budget(row['budget'])}"
        row["name"] = row["policy"] + cache
    order = [FULL["policy"], *results.policies]
    ranked = sorted(totals, key=lambda r: (labels.budget_order(r["budget"]), order.index(r["policy"])))
    names = list(dict.fromkeys(row["name"] for row in ranked))
    shown = [label for label in LABELS if any(row["order"] == LABELS.index(label) for row in parts)]
    kinds = {labels.failure(kind): f"{i} {labels.failure(kind)}" for i, kind in enumerate(shown, 1)}
    for row in parts:
        row["failure"] = kinds[row["failure"]]
    scale = alt.Scale(domain=list(kinds.values()), range=[FAILURE_COLORS[f] for f in shown])
    legend = theme.legend()
    legend["symbolType"] = "square"
    top = max(row["ci_high"] or row["estimate"] for row in totals)
    # for the numbers behind the longest bar
    room = min(6 + 5.5 * max(len(row["text"]) for row in totals), 0.7 * _STACK_PX)
    data, drawn = Datasets(), []
    for task, mode in dict.fromkeys(panel[:2] for panel in results.panels):
        own, whole = ([r for r in rows if (r["task"], r["mode"]) == (task, mode)] for rows in (parts, totals))
        y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, domain=False, ticks=False))
        end = top * _STACK_PX / (_STACK_PX - room)
        x_scale = alt.Scale(domain=[0, end])
        axis = alt.Axis(title="share of answers", values=[i / 10 for i in range(11)], format=".1f", grid=False)
        bars = (
            data.chart(own)
            .mark_bar(height=11, stroke="#FFFFFF", strokeWidth=0.7)
            .encode(
                y=y,
                x=alt.X("share:Q", stack="zero", scale=x_scale, axis=axis),
                color=alt.Color("failure:N", scale=scale, legend=legend),
                order=alt.Order("order:Q"),
            )
        )
        base = data.chart([{k: v for k, v in row.items() if not isinstance(v, dict)} for row in whole])
        rules = base.mark_rule(color=theme.INK, strokeWidth=1).encode(y=y, x=alt.X("ci_low:Q"), x2=alt.X2("ci_high:Q"))
        text = base.mark_text(align="left", dx=6, fontSize=10, color=theme.INK)
        numbers = data.chart(_numbers(own, whole, shown, end * _NUMBER_PX / _STACK_PX)).mark_text(fontSize=9, dy=0.5)
        ink = alt.Color("ink:N", scale=None)
        layers = (bars, rules, text.encode(y=y, x=alt.X("ci_high:Q"), text=alt.Text("text:N")),
                  numbers.encode(y=y, x=alt.X("at:Q"), text=alt.Text("number:N"), color=ink))  # fmt: skip
        drawn.append(panels.panel(layers, _STACK_PX, {"step": 19}, panels.title(_head(results, task, mode))))
    return panels.figure(drawn, 2, data, title, share)


# Measures of the interactive figure: label, and the statistic of the table with its scale.
MEASURES = {
    "Score": ("score_mean", 1.0),
    "Failure rate": ("failure_rate", 1.0),
    "Answered “unknown”": ("abstention_rate", 1.0),
    "Broken answers": ("broken_rate", 1.0),
    "Seconds to the answer, median": ("latency_p50", 1.0),
    "Seconds to the first token, median": ("ttft_p50", 1.0),
    "Tokens per second, median": ("tokens_per_s", 1.0),
    "Cache, MiB": ("cache_bytes", 1 / 2**20),
    "Cache, share of the full one": ("footprint", 1.0),
    "Peak memory, MB": ("peak_mem_mb", 1.0),
    "Standard deviation of the score": ("score_std", 1.0),
}
_ZONED = ("Score", "Failure rate", "Answered “unknown”", "Broken answers")


def _explored(results: Results) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the rows of every measure, of the transition zones and of the collapses, with the choice columns."""
    rows, zones, collapses = [], [], []
    for measure, (statistic, scale) in MEASURES.items():
        for panel in results.panels:
            task, mode, budget = panel
            chosen_by = {"measure": measure, "task": task, "mode": labels.mode(mode), "budget": labels.budget(budget)}
            own = [row | chosen_by for row in _rows(results, statistic, panel, scale)]
            rows += own
            if measure in _ZONED:
                zone, collapse = _marked(results, panel, [r for r in own if r["policy"] != FULL["policy"]])
                zones += zone
                collapses += collapse
    return rows, zones, collapses


def interactive(results: Results) -> Spec:
    """Return a chart with lists for measure, mode, budget and policy."""
    rows, zones, collapses = _explored(results)
    if not rows:
        return panels.note(
            "There is nothing to draw, because no statistic has an estimate.", "Answers against document length"
        )
    controls = {"budget": "Cache kept", "mode": "Compressed", "task": "Task", "measure": "Measure"}
    by = panels.choices(rows, controls)
    names = [FULL["policy"], *results.policies]
    control = alt.binding_select(options=[None, *names], labels=["all", *names], name="Highlight ")
    lit = alt.selection_point(fields=["policy"], bind=control, name="highlight")
    faint = alt.condition(lit, alt.value(1), alt.value(0.1))
    numbers = sorted({row["bin"] for row in rows})
    tokens = {row["bin"]: row["tokens"] for row in rows}
    one_task = len({row["task"] for row in rows}) == 1
    expression = "{" + ",".join(f"{b}: '{tokens[b]}'" for b in numbers) + "}[datum.value]"
    x = alt.X(
        "x:Q",
        scale=marks.index_scale(numbers, 0.45),
        axis=alt.Axis(values=numbers, grid=False, title="tokens in the document" if one_task else "length bin",
                      **({"labelExpr": expression} if one_task else {"format": "d"})),
    )  # fmt: skip
    color, shape = theme.policy_scales(results.policies)
    tip = panels.tooltip({
        "policy": "policy", "budget": "cache kept", "mode": "compressed", "tokens": "tokens",
        "interval": "estimate [interval]", "n": "n", "method": "method",
    })  # fmt: skip
    data = Datasets(by)

    def of(values: list[Row], opacity: Any = faint) -> alt.Chart:
        return data.chart(values).encode(x=x, color=color, opacity=opacity)

    base = of(rows)
    full = of([row for row in rows if row["policy"] == FULL["policy"]])
    y = alt.Y("estimate:Q", axis=alt.Axis(title=None))
    band = alt.condition(lit, alt.value(0.22), alt.value(0.03))
    layers = [
        of(zones, band).mark_line(strokeWidth=14, strokeCap="round").encode(y=y),
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q")),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=90).encode(y=y, shape=shape, tooltip=tip),
        full.mark_point(filled=True, size=40, shape="circle").encode(y=y, tooltip=tip),
        of(collapses).mark_text(**COLLAPSE).encode(y=y),
    ]
    key = ("; wide band: transition zone" if zones else "") + ("; ×: collapse" if collapses else "")
    said = f"{panels.share(results.confidence)}; grey: the full cache{key}"
    return panels.explorer(layers, 260, data, "Answers against document length", said, parameters=(lit,))


FIGURE_NAMES = (*FIGURES, "failures", "front", "differences")


def write_plots(scores: str, bin_stats: str, comparisons: str, transition: str, outputs: Mapping[str, str]) -> None:
    """Write the figures of the `plots` rule. ``outputs``: path by ``{figure}_{svg|png}`` and ``interactive``.

    Raises UserError for an output with another name.
    """
    results = read_results(scores, bin_stats, comparisons, transition)
    drawers = (*(partial(along_length, figure=name) for name in FIGURES), failure_stack, tradeoff.front_figure,
               tradeoff.difference_figure)  # fmt: skip
    figures = {name: partial(draw, results) for name, draw in zip(FIGURE_NAMES, drawers, strict=True)}
    figures[entries.NAME] = partial(entries.entries_figure, results)
    save.save_figures(figures, outputs, {"interactive": partial(interactive, results)})
