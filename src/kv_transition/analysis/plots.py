"""The figures: every point with its interval and n, the full cache as the neutral reference, drawn offline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from kv_transition.analysis import intervals, labels
from kv_transition.analysis.aggregate import FULL
from kv_transition.errors import UserError
from kv_transition.eval.failures import LABELS
from kv_transition.provenance import atomic_path, read_metadata, write_text

# Okabe and Ito (2008), told apart under the common colour-vision deficiencies; shapes repeat what the colours say.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D1F")
# one fewer than the colours, so that the pairs repeat only after 56 policies
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
NEUTRAL, INK, FAINT = "#6B7280", "#1F2937", "#E5E7EB"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 330, 190, 3

FIGURES = {
    "acc_vs_len": ("score_mean", "Score", "Mean score against document length"),
    "std_vs_len": ("score_std", "Standard deviation", "Spread of the score between examples against document length"),
    "failrate_vs_len": ("failure_rate", "Failure rate", "Share of failed answers against document length"),
    "latency_vs_len": ("latency_p50", "Seconds, median", "Time to answer against document length"),
}


@dataclass(frozen=True)
class Results:
    """What the figures are drawn from: the tables scores, bin_stats and transition."""

    scores: pl.DataFrame
    stats: pl.DataFrame
    transition: pl.DataFrame
    confidence: float = 0.95

    @cached_property
    def policies(self) -> list[str]:
        """All but the full cache, always in the same order, so that a policy keeps its colour."""
        return sorted(set(self.stats["policy"]) - {FULL["policy"]})

    @cached_property
    def panels(self) -> list[tuple[str, str, str]]:
        """(task, mode, budget) with anything but the full cache in it, or the full cache alone."""
        frame = self.stats.filter(pl.col("policy") != FULL["policy"])
        if not frame.height:
            frame = self.stats
        found = frame.select("task", "mode", "budget").unique().rows()
        return sorted(found, key=lambda k: (k[0], list(labels.MODES).index(k[1]), labels.budget_order(k[2])))

    def curve(self, statistic: str, task: str, mode: str) -> pl.DataFrame:
        return self.stats.filter(statistic=statistic, task=task, mode=mode).drop_nulls("estimate")


class Datasets(dict[str, list[dict[str, Any]]]):
    """Named rows; ``add`` gives the reference that a chart takes."""

    def add(self, rows: list[dict[str, Any]]) -> alt.NamedData:
        name = f"rows{len(self)}"
        self[name] = rows
        return alt.NamedData(name)


CONFIG = {
    "font": FONT,
    "background": "#FFFFFF",
    "padding": 14,
    "view": {"stroke": None},
    "mark": {"aria": False},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": FAINT,
        "domainColor": "#9CA3AF",
        "tickColor": "#9CA3AF",
        "titlePadding": 8,
    },
    "title": {"color": INK, "subtitleColor": "#4B5563", "anchor": "start"},
    "legend": {"labelFontSize": 12, "labelColor": INK, "columnPadding": 16},
}

PAGE_STYLE = (
    f"body{{margin:1rem;font:15px {FONT};color:{INK};background:#fff}}"
    ".chart-wrapper{display:flex;flex-direction:column-reverse}"
    ".vega-bindings{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;padding:0 14px}.vega-bindings select{font:inherit}"
)

Spec = dict[str, Any]


def _inner(chart: alt.TopLevelMixin) -> Spec:
    return chart.to_dict(validate=False, context={"top_level": False})


def _panel_spec(layers: Sequence[alt.Chart], width: int, height: int | Spec, title: Spec) -> Spec:
    """Layers as one view. Panels are put together as plain specifications: Altair would copy them at every step."""
    return {"layer": [_inner(layer) for layer in layers], "width": width, "height": height, "title": title}


def _figure(content: Spec, data: Datasets, title: str, *subtitle: str) -> Spec:
    """A whole Vega-Lite figure with its title, what it says about n and intervals, and its data by name."""
    heading = {
        "text": title, "subtitle": list(subtitle), "fontSize": 17, "subtitleFontSize": 12, "offset": 16,
        "subtitlePadding": 6,
    }  # fmt: skip
    text = ". ".join((title, *subtitle)) + "."
    return {
        "$schema": alt.SCHEMA_URL, "config": CONFIG, "title": heading, "description": text, "datasets": dict(data),
        **content,
    }  # fmt: skip


def _rows_of(panels: Sequence[Spec], columns: int) -> list[Spec]:
    return [{"hconcat": list(panels[i : i + columns]), "spacing": 28} for i in range(0, len(panels), columns)]


def _legend() -> alt.Legend:
    return alt.Legend(title=None, orient="top", symbolSize=90, symbolOpacity=1, symbolStrokeWidth=2)


def color(policies: Sequence[str]) -> alt.Color:
    domain = [FULL["policy"], *policies]
    scale = alt.Scale(domain=domain, range=[NEUTRAL, *(PALETTE[i % len(PALETTE)] for i in range(len(policies)))])
    return alt.Color("policy:N", scale=scale, legend=_legend())


def shape(policies: Sequence[str]) -> alt.Shape:
    domain = [FULL["policy"], *policies]
    scale = alt.Scale(domain=domain, range=["stroke", *(SHAPES[i % len(SHAPES)] for i in range(len(policies)))])
    return alt.Shape("policy:N", scale=scale, legend=_legend())


def _say_n(counts: Iterable[int]) -> str:
    counts = set(counts)
    if not counts:
        return "n = 0"
    low, high = min(counts), max(counts)
    return f"n = {low} examples a point" if low == high else f"n = {low} to {high} examples a point"


def _rows(results: Results, statistic: str, panel: tuple[str, str, str]) -> list[dict[str, Any]]:
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
        dodge = 0.0 if is_full else (present.index(row["policy"]) - (len(present) - 1) / 2) * step
        rows.append(
            {
                "policy": row["policy"],
                "bin": row["bin"],
                "x": row["bin"] + dodge,
                "tokens": labels.token_range(row["token_min"], row["token_max"]),
                "estimate": row["estimate"],
                "low": row["ci_low"],
                "high": row["ci_high"],
                "n": row["n"],
                "interval": labels.interval(row["estimate"], row["ci_low"], row["ci_high"], 3),
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
    return _panel_spec(layers, PANEL_WIDTH, PANEL_HEIGHT, title)


def _note(text: str, title: str, subtitle: str) -> Spec:
    data = Datasets()
    mark = alt.Chart(data.add([{"text": text}])).mark_text(fontSize=13, color="#4B5563").encode(text="text:N")
    return _figure({**_inner(mark), "width": 680, "height": 60}, data, title, f"{subtitle}. {text}")


def along_length(results: Results, figure: str) -> Spec:
    """One statistic against the length bins: a panel per task, mode and budget, all on one scale."""
    statistic, title_y, title = FIGURES[figure]
    shown = results.stats.filter(statistic=statistic).drop_nulls("estimate")
    share = f"{100 * results.confidence:g} % intervals"
    if not shown.height:
        reasons = results.stats.filter(statistic=statistic)["method"].unique().sort().to_list()
        text = f"Nothing to draw: {'; '.join(reasons) or 'not measured'}."
        return _note(text, title, share)
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
        rows += _rows_of(own, COLUMNS)
    return _figure({"vconcat": rows, "spacing": 26}, data, title, *subtitle)


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
        return _note(f"No answer failed (n = {n}).", title, share)
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
        panels.append(_panel_spec(layers, 300, {"step": 19}, {"text": head, "fontSize": 13}))
    return _figure({"vconcat": _rows_of(panels, 2), "spacing": 24}, data, title, share)


def interactive(results: Results) -> Spec:
    """One chart to ask: choose what is drawn, the mode and the budget; click a policy in the legend; point for n."""
    wanted = {figure: title for figure, (_, title, _) in FIGURES.items()}
    rows = []
    for figure, (statistic, _, _) in FIGURES.items():
        for panel in results.panels:
            task, mode, budget = panel
            for row in _rows(results, statistic, panel):
                shown = {"measure": wanted[figure], "task": task, "mode": labels.mode(mode)}
                rows.append({**row, **shown, "budget": labels.budget(budget)})
    rows = [row for row in rows if row["estimate"] is not None]

    def choose(name: str, label: str) -> alt.Parameter:
        options = list(dict.fromkeys(row[name] for row in rows))
        control = alt.binding_select(options=options, name=f"{label}  ")
        return alt.selection_point(fields=[name], bind=control, value=options[0], name=f"choose_{name}")

    # shown in reverse
    controls = {"budget": "Cache kept", "mode": "Compressed", "task": "Task", "measure": "Measure"}
    by = {name: choose(name, label) for name, label in controls.items()}
    clicked = alt.selection_point(fields=["policy"], bind="legend", name="clicked_policy")
    faint = alt.condition(clicked, alt.value(1), alt.value(0.08))
    numbers = sorted({row["bin"] for row in rows})
    names = {row["bin"]: row["tokens"] for row in rows}
    one_task = len({row["task"] for row in rows}) == 1
    expression = "{" + ",".join(f"{b}: '{names[b]}'" for b in numbers) + "}[datum.value]"
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
    base = alt.Chart(data.add(rows)).encode(x=x, color=colors, opacity=faint)
    for parameter in by.values():
        base = base.transform_filter(parameter)
    y = alt.Y("estimate:Q", axis=alt.Axis(title=None))
    layers = alt.layer(
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=80).encode(y=y, shape=shapes, tooltip=tip),
    ).add_params(*by.values(), clicked)
    share = f"{100 * results.confidence:g} % intervals; click a policy in the legend (shift-click for several)"
    chart = layers.properties(width=760, height=420)
    return _figure(_inner(chart), data, "Answers against document length", share)


def read_results(scores: str, stats: str, transition: str) -> Results:
    """The tables from their files, without the aliases of the full cache. Raises UserError if nothing is left."""
    confidence = json.loads(read_metadata(stats).get("statistics", "{}")).get("confidence", 0.95)
    columns = ["task", "mode", "policy", "budget", "bin", "example_id", "failure", "alias"]
    alias = (pl.col("policy") != FULL["policy"]) & (pl.col("budget") == FULL["budget"])
    results = Results(
        pl.read_parquet(scores, columns=columns).filter(~alias),
        pl.read_parquet(stats).filter(~alias),
        pl.read_parquet(transition).filter(~alias),
        confidence,
    )
    if not results.stats.height:
        raise UserError(f"{stats}: the table is empty; run the aggregate step on at least one scored cell")
    return results


def save_html(figure: Spec, path: str | Path) -> None:
    """A page that needs nothing else, scripts included."""
    from altair.utils.html import spec_to_html

    page = spec_to_html(
        figure,
        mode="vega-lite",
        vega_version=alt.VEGA_VERSION,
        vegaembed_version=alt.VEGAEMBED_VERSION,
        vegalite_version=alt.VEGALITE_VERSION,
        template="inline",
        output_div="chart",
        embed_options={"actions": {"source": False, "editor": False}},
    )
    write_text(path, page.replace("<head>", f"<head><style>{PAGE_STYLE}</style>", 1))


def svg(figure: Spec) -> str:
    return vl_convert.vegalite_to_svg(figure, vl_version=".".join(alt.VEGALITE_VERSION.split(".")[:2]))


def write_plots(scores: str, stats: str, transition: str, outputs: Mapping[str, str]) -> None:
    """The `plots` rule. ``outputs``: path by ``{figure}_{svg|png}``, ``failures_{svg|png}`` and ``interactive``.

    Raises UserError for an output of another name.
    """
    results = read_results(scores, stats, transition)
    drawn: dict[str, str] = {}
    for name, path in outputs.items():
        if name == "interactive":
            save_html(interactive(results), path)
            continue
        figure, _, ext = name.rpartition("_")
        if figure not in (*FIGURES, "failures") or ext not in ("svg", "png"):
            known = ", ".join((*FIGURES, "failures"))
            raise UserError(f"plots: no figure is called {name!r}; known are {known} (with _svg or _png), interactive")
        if figure not in drawn:
            drawn[figure] = svg(failure_stack(results) if figure == "failures" else along_length(results, figure))
        if ext == "svg":
            write_text(path, drawn[figure])
        else:
            with atomic_path(path) as temporary:
                temporary.write_bytes(vl_convert.svg_to_png(drawn[figure], scale=2))
