"""The figures: every point with its interval and n, the full cache as the neutral reference, drawn offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.eval.failures import LABELS
from kv_transition.plotting.drawing import (  # fmt: skip
    INK,
    NEUTRAL,
    Datasets,
    Spec,
    as_wide_as_its_place,
    choices,
    color,
    compose,
    filtered,
    inner,
    note,
    png,
    rows_of,
    save_html,
    shape,
    svg,
    view,
)
from kv_transition.provenance import atomic_path, write_text
from kv_transition.stats import intervals
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid import tradeoff
from kv_transition.studies.grid.results import Results, read_results

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 330, 190, 3

FIGURES = {
    "acc_vs_len": ("score_mean", "Score", "Mean score against document length"),
    "std_vs_len": ("score_std", "Standard deviation", "Spread of the score between examples against document length"),
    "failrate_vs_len": ("failure_rate", "Failure rate", "Share of failed answers against document length"),
    "latency_vs_len": ("latency_p50", "Seconds, median", "Time to answer against document length"),
}


def _say_n(counts: Iterable[int]) -> str:
    counts = set(counts)
    if not counts:
        return "n = 0"
    low, high = min(counts), max(counts)
    return f"n = {low} examples a point" if low == high else f"n = {low} to {high} examples a point"


def _rows(results: Results, statistic: str, panel: tuple[str, str, str], scale: float = 1.0) -> list[dict[str, Any]]:
    """Points of one panel, the policies set a little apart so that their intervals can be told apart."""
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
    """Points inside a transition zone, and points of collapse, of the panel's curves."""
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
        scale=alt.Scale(domain=[numbers[0] - 0.45, numbers[-1] + 0.45], nice=False, zero=False),
        axis=alt.Axis(
            values=numbers, labelExpr=expression, grid=False, title="tokens in the document", labelOverlap=False
        ),
    )
    y_scale = alt.Scale(domain=[0, top], nice=False, clamp=True)
    y = alt.Y("estimate:Q", scale=y_scale, axis=alt.Axis(title=title_y, tickCount=5))
    colors, shapes = color(results.policies), shape(results.policies)

    def of(values: list[dict]) -> alt.Chart:
        return alt.Chart(data.add(values))

    full = [r for r in rows if r["policy"] == FULL["policy"]]
    own = [r for r in rows if r["policy"] != FULL["policy"]]
    bounded = [r for r in own if r["low"] is not None and r["high"] is not None]
    zone, collapse = _marked(results, panel, own) if statistic != "latency_p50" else ([], [])
    y_low, y_high = alt.Y("low:Q", scale=y_scale), alt.Y2("high:Q")
    tip = [alt.Tooltip(f"{c}:N", title=c) for c in ("policy", "tokens", "interval", "n")]
    layers = [
        of([r for r in full if r["low"] is not None and r["high"] is not None])
        .mark_area(color=NEUTRAL, opacity=0.16)
        .encode(x=x, y=y_low, y2=y_high),
        of(full).mark_line(strokeDash=[5, 3], strokeWidth=1.6).encode(x=x, y=y, color=colors),
        of(zone)
        .mark_line(strokeWidth=13, opacity=0.22, strokeCap="round", strokeJoin="round")
        .encode(x=x, y=y, color=colors, detail="policy:N"),
        of(bounded).mark_rule(strokeWidth=1.3, opacity=0.55).encode(x=x, y=y_low, y2=y_high, color=colors),
        of(own).mark_line(strokeWidth=1.9).encode(x=x, y=y, color=colors),
        of(own)
        .mark_point(filled=True, size=46, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=y, color=colors, shape=shapes, tooltip=tip),
        of(collapse).mark_text(text="×", fontSize=26, fontWeight="bold", dy=1).encode(x=x, y=y, color=colors),
    ]
    several = len({p[0] for p in results.panels}) > 1
    head = f"{task}, {labels.mode(mode)}" if several else labels.mode(mode).capitalize()
    shown = "full cache" if budget == FULL["budget"] else f"{labels.budget(budget)} of the cache kept"
    if budget.startswith("t"):
        shown = f"{labels.budget(budget)} kept"
    title = {"text": head, "subtitle": shown, "fontSize": 13, "subtitleFontSize": 11, "offset": 8}
    return view(layers, PANEL_WIDTH, PANEL_HEIGHT, title)


def along_length(results: Results, figure: str) -> Spec:
    """One statistic against the length bins: a panel per task, mode and budget, all on one scale."""
    statistic, title_y, title = FIGURES[figure]
    shown = results.stats.filter(statistic=statistic).drop_nulls("estimate")
    share = f"{100 * results.confidence:g} % intervals"
    if not shown.height:
        reasons = results.stats.filter(statistic=statistic)["method"].unique().sort().to_list()
        text = f"Nothing to draw: {'; '.join(reasons) or 'not measured'}."
        return note(text, title, share)
    top = 1.03
    if statistic == "score_std":
        top = 0.55
    if statistic == "latency_p50":
        top = 1.05 * max(v for name in ("estimate", "ci_high") for v in shown[name].drop_nulls())
    subtitle = [f"{share}; {_say_n(shown['n'])}; grey: the full cache"]
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
        rows += rows_of(own, COLUMNS)
    return compose({"vconcat": rows, "spacing": 26}, data, title, *subtitle)


# Where the machinery failed, where the model said nothing useful, where it declined.
FAILURE_COLORS = dict(
    zip(
        LABELS,
        ("#000000", "#7F0000", "#8C6D1F", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73"),
        strict=True,
    )
)


def failure_rows(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shares of each failure by task, mode, budget and policy, over all bins; and the whole rate with its interval."""
    frame = results.scores.filter(~pl.col("alias"))
    group = ["task", "mode", "policy", "budget"]
    parts, totals = [], []
    for key, cell in frame.sort(group).group_by(group, maintain_order=True):
        named = dict(zip(group, key, strict=True))
        per_example = cell.group_by("bin", "example_id").agg(pl.col("failure").is_not_null().mean().alias("rate"))
        whole = intervals.bounded_mean(per_example["rate"].to_numpy()[None], results.confidence).row(0)
        text = f"{labels.interval(whole['estimate'], whole['ci_low'], whole['ci_high'])}, n = {whole['n']}"
        totals.append({**named, **whole, "text": text})
        counts = dict(cell["failure"].drop_nulls().value_counts().iter_rows())
        for label in LABELS:
            if label in counts:
                share = counts[label] / cell.height
                parts.append({**named, "failure": labels.failure(label), "share": share, "order": LABELS.index(label)})
    return parts, totals


def failure_stack(results: Results) -> Spec:
    """What the failed answers look like: stacked shares per policy and budget, the whole rate with its interval."""
    parts, totals = failure_rows(results)
    title = "What failed answers look like"
    share = f"share of all answers over all lengths; whole rate with {100 * results.confidence:g} % interval and n"
    if not parts:
        n = sum(row["n"] for row in totals)
        return note(f"No answer failed (n = {n}).", title, share)
    for row in (*parts, *totals):
        cache = "" if row["policy"] == FULL["policy"] else f", {labels.budget(row['budget'])}"
        row["name"] = row["policy"] + cache
    order = [FULL["policy"], *results.policies]
    ranked = sorted(totals, key=lambda r: (labels.budget_order(r["budget"]), order.index(r["policy"])))
    names = list(dict.fromkeys(row["name"] for row in ranked))
    shown = [label for label in LABELS if any(row["order"] == LABELS.index(label) for row in parts)]
    scale = alt.Scale(domain=[labels.failure(f) for f in shown], range=[FAILURE_COLORS[f] for f in shown])
    top = max(row["ci_high"] or row["estimate"] for row in totals)
    several = len({row["task"] for row in totals}) > 1
    data, panels = Datasets(), []
    for task, mode in dict.fromkeys(panel[:2] for panel in results.panels):
        own, whole = ([r for r in rows if (r["task"], r["mode"]) == (task, mode)] for rows in (parts, totals))
        y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=200, domain=False, ticks=False))
        x_scale = alt.Scale(domain=[0, top * 1.55])
        axis = alt.Axis(title="share of answers", values=[i / 10 for i in range(11)], format=".1f", grid=False)
        bars = (
            alt.Chart(data.add(own))
            .mark_bar(height=11)
            .encode(
                y=y,
                x=alt.X("share:Q", stack="zero", scale=x_scale, axis=axis),
                color=alt.Color("failure:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
                order=alt.Order("order:Q"),
            )
        )
        base = alt.Chart(data.add(whole))
        rules = base.mark_rule(color=INK, strokeWidth=1).encode(y=y, x=alt.X("ci_low:Q"), x2="ci_high:Q")
        text = base.mark_text(align="left", dx=6, fontSize=10, color=INK).encode(y=y, x="ci_high:Q", text="text:N")
        head = f"{task}, {labels.mode(mode)}" if several else labels.mode(mode).capitalize()
        layers = (bars, rules, text)
        panels.append(view(layers, 300, {"step": 19}, {"text": head, "fontSize": 13}))
    return compose({"vconcat": rows_of(panels, 2), "spacing": 24}, data, title, share)


# What can be chosen in the interactive figure: the statistic of the table, how it is called, its scale.
MEASURES = {
    "Score": ("score_mean", 1.0),
    "Failure rate": ("failure_rate", 1.0),
    "Seconds to the answer, median": ("latency_p50", 1.0),
    "Seconds to the first token, median": ("ttft_p50", 1.0),
    "Tokens per second, median": ("tokens_per_s", 1.0),
    "Cache, MiB": ("cache_bytes", 1 / 2**20),
    "Cache, share of the full one": ("footprint", 1.0),
    "Peak memory, MB": ("peak_mem_mb", 1.0),
    "Standard deviation of the score": ("score_std", 1.0),
}
_ZONED = ("Score", "Failure rate")


def _explored(results: Results) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of every measure, of the transition zones and of the collapses, with what they are chosen by."""
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
    """One chart to ask: choose measure, mode, budget and policy; point for the interval and n; as wide as its place."""
    rows, zones, collapses = _explored(results)
    if not rows:
        return note("Nothing to draw: no statistic has an estimate.", "Answers against document length", "")
    controls = {"budget": "Cache kept", "mode": "Compressed", "task": "Task", "measure": "Measure"}
    by = choices(rows, controls)
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
        scale=alt.Scale(domain=[numbers[0] - 0.45, numbers[-1] + 0.45], nice=False, zero=False),
        axis=alt.Axis(values=numbers, grid=False, title="tokens in the document" if one_task else "length bin",
                      **({"labelExpr": expression} if one_task else {"format": "d"})),
    )  # fmt: skip
    colors, shapes = color(results.policies), shape(results.policies)
    tip = [
        alt.Tooltip(f"{field}:N", title=title)
        for field, title in (
            ("policy", "policy"), ("budget", "cache kept"), ("mode", "compressed"), ("tokens", "tokens"),
            ("interval", "estimate [interval]"), ("n", "n"), ("method", "method"),
        )
    ]  # fmt: skip
    data = Datasets()

    def of(values: list[dict]) -> alt.Chart:
        return filtered(data.add(values), by).encode(x=x, color=colors)

    base = of(rows).encode(opacity=faint)
    full = of([row for row in rows if row["policy"] == FULL["policy"]]).encode(opacity=faint)
    y = alt.Y("estimate:Q", axis=alt.Axis(title=None))
    band = alt.condition(lit, alt.value(0.22), alt.value(0.03))
    layers = alt.layer(
        of(zones).mark_line(strokeWidth=14, strokeCap="round").encode(y=y, opacity=band),
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=90).encode(y=y, shape=shapes, tooltip=tip),
        full.mark_point(filled=True, size=40, shape="circle").encode(y=y, tooltip=tip),
        of(collapses).mark_text(text="×", fontSize=26, fontWeight="bold", dy=1).encode(y=y, opacity=faint),
    ).add_params(lit, *by)
    share = f"{100 * results.confidence:g} % intervals; grey: the full cache"
    content = as_wide_as_its_place(inner(layers), 390)
    key = ("; wide band: transition zone" if zones else "") + ("; ×: collapse" if collapses else "")
    return compose(content, data, "Answers against document length", share + key)


FIGURE_NAMES = (*FIGURES, "failures", "front", "differences")


def draw(results: Results, name: str) -> Spec:
    """The static figure of this name. Raises UserError if there is none."""
    if name in FIGURES:
        return along_length(results, name)
    drawers = {"failures": failure_stack, "front": tradeoff.front_figure, "differences": tradeoff.difference_figure}
    if name not in drawers:
        raise UserError(f"plots: no figure is called {name!r}; known are {', '.join(FIGURE_NAMES)}")
    return drawers[name](results)


def write_plots(scores: str, bin_stats: str, comparisons: str, transition: str, outputs: Mapping[str, str]) -> None:
    """The `plots` rule. ``outputs``: path by ``{figure}_{svg|png}`` and ``interactive``.

    Raises UserError for an output of another name.
    """
    results = read_results(scores, bin_stats, comparisons, transition)
    drawn: dict[str, str] = {}
    for name, path in outputs.items():
        if name == "interactive":
            save_html(interactive(results), path)
            continue
        figure, _, ext = name.rpartition("_")
        if ext not in ("svg", "png"):
            raise UserError(f"plots: no figure is called {name!r}; known are {', '.join(FIGURE_NAMES)} (with _svg or "
                            "_png), interactive")  # fmt: skip
        if figure not in drawn:
            drawn[figure] = svg(draw(results, figure))
        if ext == "svg":
            write_text(path, drawn[figure])
        else:
            with atomic_path(path) as temporary:
                temporary.write_bytes(png(drawn[figure]))
