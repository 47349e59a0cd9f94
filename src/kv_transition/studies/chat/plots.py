"""Figures of conversations: retention and survival along the turns, the size of the cache, who wins a conflict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.plotting.drawing import (
    NEUTRAL,
    PALETTE,
    SHAPES,
    Datasets,
    Spec,
    as_wide_as_its_place,
    choices,
    color,
    compose,
    filtered,
    inner,
    note,
    rows_of,
    save_figures,
    shape,
    view,
)
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table
from kv_transition.studies.chat.analysis import WINNERS

WIDTH, HEIGHT, COLUMNS = 330, 220, 2
TOP = 1.02
BY = {"rule": "by rule", "judge": "by judge"}
FOLLOWS = {"new": "the new one alone", "old": "the old one alone", "both": "both", "neither": "neither"}
Row = dict[str, Any]


def policies(table: pl.DataFrame) -> list[str]:
    """All but the full cache, in the order of the names."""
    return sorted(set(table["policy"].drop_nulls()) - {FULL["policy"]})


def panels(table: pl.DataFrame, statistic: str, by: str | None = "rule") -> list[tuple[str, str]]:
    """(set, budget) of each panel: a policy's own budget is drawn beside the full cache."""
    own = table.filter(statistic=statistic).filter(pl.col("by").eq_missing(by) & (pl.col("policy") != FULL["policy"]))
    keys = own.select("chat_set", "budget").unique().rows()
    if not keys:
        keys = table.filter(statistic=statistic).select("chat_set", "budget").unique().rows()
    return sorted(keys, key=lambda key: (key[0], labels.budget_order(key[1])))


def turn_rows(
    table: pl.DataFrame, statistic: str, panel: tuple[str, str], by: str | None = "rule", along: str = "turn"
) -> list[Row]:
    """A statistic along the turns of one panel, of its policies and the full cache."""
    chat_set, budget = panel
    own = table.filter(pl.col("chat_set").eq(chat_set) & pl.col("statistic").eq(statistic))
    own = own.filter(pl.col("by").eq_missing(by) & pl.col(along).is_not_null() & pl.col("estimate").is_not_null())
    own = own.filter(pl.col("budget").eq(budget) | pl.col("policy").eq(FULL["policy"])).sort("policy", along)
    return [
        {
            "policy": row["policy"], "budget": labels.budget(budget), "turn": row[along],
            "estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"], "n": row["n"],
            "clusters": row["clusters"], "method": row["method"], "by": BY.get(by or "", ""),
            "interval": labels.interval(row["estimate"], row["ci_low"], row["ci_high"]), "set": chat_set,
        }
        for row in own.iter_rows(named=True)
    ]  # fmt: skip


def _layers(
    rows: Sequence[Row],
    names: Sequence[str],
    data: Datasets,
    y_title: str,
    y_scale: alt.Scale,
    chance: Sequence[Row] = (),
    step: bool = False,
    by: Sequence[alt.Parameter] = (),
) -> list[alt.Chart]:
    """A line per policy with its band; the full cache grey and dashed, chance dotted."""
    turns = sorted({row["turn"] for row in rows}) or [1]
    ends = alt.Scale(domain=[turns[0] - 0.3, turns[-1] + 0.3], nice=False, zero=False)
    ticks = [t for t in turns if len(turns) <= 16 or t % 5 == 0]
    x = alt.X("turn:Q", scale=ends, axis=alt.Axis(values=ticks, format="d", grid=False, title="turn"))
    y = alt.Y("estimate:Q", scale=y_scale, axis=alt.Axis(title=y_title, tickCount=5))
    y_low = alt.Y("low:Q", scale=y_scale)
    how = {"interpolate": "step-after"} if step else {}
    full = [row for row in rows if row["policy"] == FULL["policy"]]
    own = [row for row in rows if row["policy"] != FULL["policy"]]
    bounded = [row for row in own if row["low"] is not None and row["high"] is not None]
    fields = {"policy": "policy", "turn": "turn", "interval": "estimate [interval]", "n": "n",
              "clusters": "conversations", "method": "method"}  # fmt: skip
    tip = [alt.Tooltip(f"{field}:N", title=title) for field, title in fields.items()]
    layers = []
    if chance:
        drawn = filtered(data.add(list(chance)), by)
        layers.append(drawn.mark_line(color=NEUTRAL, strokeDash=[2, 4], strokeWidth=1.3).encode(x=x, y=y))
    layers += [
        filtered(data.add([r for r in full if r["low"] is not None and r["high"] is not None]), by)
        .mark_area(color=NEUTRAL, opacity=0.16, **how).encode(x=x, y=y_low, y2="high:Q"),
        filtered(data.add(bounded), by).mark_area(opacity=0.16, **how)
        .encode(x=x, y=y_low, y2="high:Q", color=color(names)),
        filtered(data.add(full), by).mark_line(strokeDash=[5, 3], strokeWidth=1.6, **how)
        .encode(x=x, y=y, color=color(names), tooltip=tip),
        filtered(data.add(own), by).mark_line(strokeWidth=2, **how).encode(x=x, y=y, color=color(names)),
        filtered(data.add(own), by).mark_point(filled=True, size=48, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=y, color=color(names), shape=shape(names), tooltip=tip),
    ]  # fmt: skip
    return layers


def _heading(panel: tuple[str, str], several: bool) -> Spec:
    chat_set, budget = panel
    kept = f"{labels.budget(budget)} of the cache kept" if budget.startswith("r") else f"{labels.budget(budget)} kept"
    if budget == FULL["budget"]:
        kept = "footprints of their own"
    return {"text": f"{chat_set}: {kept}" if several else kept, "fontSize": 13, "offset": 8}


def _count(rows: Sequence[Row]) -> str:
    counts = [row["clusters"] for row in rows] or [0]
    span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"n = {span} conversations"


def _shares(
    table: pl.DataFrame, statistic: str, title: str, y_title: str, about: str, confidence: float, step: bool = False
) -> Spec:
    names, data, drawn, every = policies(table), Datasets(), [], []
    several = table["chat_set"].n_unique() > 1
    for panel in panels(table, statistic):
        rows = turn_rows(table, statistic, panel)
        chance = turn_rows(table, "chance", panel) if statistic == "retention" else []
        scale = alt.Scale(domain=[0, TOP], nice=False, clamp=True)
        drawn.append(
            view(_layers(rows, names, data, y_title, scale, chance, step), WIDTH, HEIGHT, _heading(panel, several))
        )
        every += rows
    if not every:
        return note("No instruction was in force at any answer.", title, about)
    how = f"{about}, by rule; {100 * confidence:g} % intervals, {_count(every)}"
    key = "grey, dashed: the full cache" + (
        "; dotted: answers of conversations without the instruction"
        if statistic == "retention" and table.filter(statistic="chance").height
        else ""
    )
    return compose({"vconcat": rows_of(drawn, COLUMNS), "spacing": 26}, data, title, how, key)


_RETENTION = "How long instructions are kept"


def retention_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Figure 1 of the memory study: retention against the turn, one line per policy with its band."""
    return _shares(
        table,
        "retention",
        _RETENTION,
        "instructions followed",
        "share of the instructions that answers follow",
        confidence,
    )


def survival_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """The share of conversations in which no instruction has been broken by the turn."""
    return _shares(
        table, "survival", "Conversations without a failure so far", "not yet failed",
        "share in which every instruction was followed up to the turn", confidence, step=True,
    )  # fmt: skip


def size_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Entries per KV head after each turn's compression."""
    title, about = "What is left of the cache after each turn", "entries per KV head, mean over the conversations"
    names, data, drawn, every = policies(table), Datasets(), [], []
    several = table["chat_set"].n_unique() > 1
    found = table.filter(statistic="entries_after")
    for panel in panels(table, "entries_after", None):
        rows = turn_rows(found, "entries_after", panel, None)
        top = max((row["high"] or row["estimate"] for row in rows), default=1)
        scale = alt.Scale(domain=[0, top * 1.03], nice=False)
        drawn.append(view(_layers(rows, names, data, "entries", scale), WIDTH, HEIGHT, _heading(panel, several)))
        every += rows
    if not every:
        return note("No answer says what its cache held.", title, about)
    how = f"{about}; {100 * confidence:g} % intervals, {_count(every)}"
    return compose(
        {"vconcat": rows_of(drawn, COLUMNS), "spacing": 26}, data, title, how, "grey, dashed: the full cache"
    )


_CONFLICT = "Which of two conflicting instructions is followed"


def conflict_rows(table: pl.DataFrame) -> list[Row]:
    """Shares of answers that follow the new instruction, the old one, both or neither, by turns since the conflict."""
    rows = []
    for name in WINNERS:
        own = table.filter(statistic=f"conflict_{name}", by="rule").drop_nulls("age")
        rows += [
            {
                "set": row["chat_set"], "policy": row["policy"], "budget": row["budget"], "follows": FOLLOWS[name],
                "age": row["age"], "estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"],
                "n": row["n"], "clusters": row["clusters"],
                "interval": labels.interval(row["estimate"], row["ci_low"], row["ci_high"]),
            }
            for row in own.iter_rows(named=True)
        ]  # fmt: skip
    return rows


def conflict_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Who wins, by turns since the conflict: a panel per policy and budget."""
    rows, about = conflict_rows(table), "share of the answers after the second instruction, by rule"
    if not rows:
        return note("No instruction overrides another one.", _CONFLICT, about)
    data, drawn = Datasets(), []
    several = len({row["set"] for row in rows}) > 1
    keys = {(row["set"], row["policy"], row["budget"]) for row in rows}
    for key in sorted(keys, key=lambda k: (k[0], k[1] != FULL["policy"], k[1], labels.budget_order(k[2]))):
        own = [row for row in rows if (row["set"], row["policy"], row["budget"]) == key]
        name = key[1] if key[1] == FULL["policy"] else f"{key[1]}, {labels.budget(key[2])} kept"
        head = {"text": f"{key[0]}: {name}" if several else name, "fontSize": 13, "offset": 8}
        drawn.append(view(_conflict_layers(own, data), 240, 170, head))
    how = f"{about}; {100 * confidence:g} % intervals, {_count(rows)}"
    return compose({"vconcat": rows_of(drawn, 3), "spacing": 26}, data, _CONFLICT, how)


def _conflict_layers(rows: Sequence[Row], data: Datasets) -> list[alt.Chart]:
    ages, names = sorted({row["age"] for row in rows}), list(FOLLOWS.values())
    x = alt.X(
        "age:Q", scale=alt.Scale(domain=[ages[0] - 0.3, ages[-1] + 0.3], nice=False, zero=False),
        axis=alt.Axis(values=ages, format="d", grid=False, title="turns since the conflict"),
    )  # fmt: skip
    scale = alt.Scale(domain=[0, TOP], nice=False, clamp=True)
    y = alt.Y("estimate:Q", scale=scale, axis=alt.Axis(title="answers", tickCount=5))
    legend = alt.Legend(title="follows", orient="top", symbolSize=90, symbolOpacity=1, symbolStrokeWidth=2)
    colors = alt.Color("follows:N", legend=legend, scale=alt.Scale(domain=names, range=list(PALETTE[: len(names)])))
    shapes = alt.Shape("follows:N", legend=legend, scale=alt.Scale(domain=names, range=list(SHAPES[: len(names)])))
    fields = {"follows": "follows", "age": "turns since", "interval": "share [interval]", "n": "n"}
    own = alt.Chart(data.add(list(rows)))
    return [
        own.mark_rule(strokeWidth=1.2, opacity=0.5)
        .encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colors),
        own.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=colors),
        own.mark_point(filled=True, size=48, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=y, color=colors, shape=shapes,
                tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in fields.items()]),
    ]  # fmt: skip


def explorer(table: pl.DataFrame, confidence: float) -> Spec | None:
    """Figure 1 to ask: one budget, rater and set at a time, as wide as its place; None without any verdict."""
    rows: list[Row] = []
    for panel in panels(table, "retention"):
        for by in BY:
            rows += [row | {"chat_set": panel[0]} for row in turn_rows(table, "retention", panel, by)]
    if not rows:
        return None
    by = choices(rows, {"by": "Judged", "budget": "Kept", "chat_set": "Conversations"})
    data, names = Datasets(), policies(table)
    scale = alt.Scale(domain=[0, TOP], nice=False, clamp=True)
    layers = alt.layer(*_layers(rows, names, data, "instructions followed", scale, by=by)).add_params(*by)
    about = f"share of the instructions that answers follow; {100 * confidence:g} % intervals, {_count(rows)}"
    return compose(as_wide_as_its_place(inner(layers), 340), data, _RETENTION, about)


FIGURES = {
    "retention": retention_figure,
    "survival": survival_figure,
    "cache_size": size_figure,
    "conflicts": conflict_figure,
}


def write_retention_plots(table: str, confidence: float, outputs: Mapping[str, str]) -> None:
    """The `retention_plots` rule; ``outputs``: path by ``{name of FIGURES}_{svg|png}``.

    Raises UserError for an output of another name.
    """
    found = read_table(table)
    save_figures({name: draw(found, confidence) for name, draw in FIGURES.items()}, outputs)
