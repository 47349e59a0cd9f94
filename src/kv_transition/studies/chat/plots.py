"""Figures of conversations by turn: retention, survival, size of the cache, and conflicts of instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.plotting import marks, panels, save, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table
from kv_transition.studies.chat.analysis import WINNERS

WIDTH, HEIGHT, COLUMNS = 330, 220, 2
BY = {"rule": "by rule", "judge": "by judge"}
FOLLOWS = {"new": "only the new one", "old": "only the old one", "both": "both", "neither": "neither"}


def policies(table: pl.DataFrame) -> list[str]:
    """Return the policies without the full cache, sorted."""
    return sorted(set(table["policy"].drop_nulls()) - {FULL["policy"]})


def places(table: pl.DataFrame, statistic: str, by: str | None = "rule") -> list[tuple[str, str]]:
    """Return (set, budget) of each panel; the full cache is drawn in every panel."""
    own = table.filter(statistic=statistic).filter(pl.col("by").eq_missing(by) & (pl.col("policy") != FULL["policy"]))
    keys = own.select("chat_set", "budget").unique().rows()
    if not keys:
        keys = table.filter(statistic=statistic).select("chat_set", "budget").unique().rows()
    return sorted(keys, key=lambda key: (key[0], labels.budget_order(key[1])))


def turn_rows(
    table: pl.DataFrame, statistic: str, panel: tuple[str, str], by: str | None = "rule", along: str = "turn"
) -> list[Row]:
    """Return a statistic by turn in one panel, for its policies and the full cache."""
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
    y: alt.Y,
    chance: Sequence[Row] = (),
    interpolate: str | None = None,
) -> list[alt.Chart]:
    """Return a line with a band for each policy; the full cache is grey and dashed, chance is dotted."""
    turns = sorted({row["turn"] for row in rows}) or [1]
    ticks = [t for t in turns if len(turns) <= 16 or t % 5 == 0]
    axis = alt.Axis(values=ticks, format="d", grid=False, title="turn")
    x = alt.X("turn:Q", scale=marks.index_scale(turns, 0.3), axis=axis)
    full = [row for row in rows if row["policy"] == FULL["policy"]]
    own = [row for row in rows if row["policy"] != FULL["policy"]]
    fields = {"policy": "policy", "turn": "turn", "interval": "estimate [interval]", "n": "n",
              "clusters": "conversations", "method": "method"}  # fmt: skip
    tip, scales = panels.tooltip(fields), theme.policy_scales(names)
    dotted = data.chart(chance).mark_line(color=theme.NEUTRAL, strokeDash=[2, 4], strokeWidth=1.3)
    return [
        *([dotted.encode(x=x, y=y)] if chance else []),
        *marks.reference(data, full, x, y, scales[0], tip, interpolate),
        *marks.curves(data, own, x, y, scales, "bands", tip, interpolate),
    ]


def _share_axis(title: str) -> alt.Y:
    return alt.Y("estimate:Q", scale=marks.unit_scale(), axis=alt.Axis(title=title, tickCount=5))


def _heading(panel: tuple[str, str], several: bool) -> Spec:
    chat_set, budget = panel
    kept = f"{labels.budget(budget)} of the cache kept" if budget.startswith("r") else f"{labels.budget(budget)} kept"
    if budget == FULL["budget"]:
        kept = "each policy's own footprint"
    return panels.title(f"{chat_set}: {kept}" if several else kept)


def _count(rows: Sequence[Row]) -> str:
    return f"n = {panels.span([row['clusters'] for row in rows])} conversations"


def _shares(
    table: pl.DataFrame,
    statistic: str,
    title: str,
    y_title: str,
    about: str,
    confidence: float,
    interpolate: str | None = None,
) -> Spec:
    names, data, drawn, every = policies(table), Datasets(), [], []
    several = table["chat_set"].n_unique() > 1
    for panel in places(table, statistic):
        rows = turn_rows(table, statistic, panel)
        chance = turn_rows(table, "chance", panel) if statistic == "retention" else []
        layers = _layers(rows, names, data, _share_axis(y_title), chance, interpolate)
        drawn.append(panels.panel(layers, WIDTH, HEIGHT, _heading(panel, several)))
        every += rows
    if not every:
        return panels.note("No instruction was in force at any answer.", title, about)
    how = f"{about}, by rule; {panels.share(confidence)}, {_count(every)}"
    key = "grey, dashed: the full cache" + (
        "; dotted: answers of conversations without the instruction"
        if statistic == "retention" and table.filter(statistic="chance").height
        else ""
    )
    return panels.figure(drawn, COLUMNS, data, title, how, key)


_RETENTION = "Retention of instructions by turn"


def retention_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Return figure 1 of the memory study: retention against the turn, one line with a band per policy."""
    return _shares(
        table,
        "retention",
        _RETENTION,
        "instructions followed",
        "share of the instructions that answers follow",
        confidence,
    )


def survival_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Return the figure of the share of conversations in which every instruction was followed up to the turn."""
    return _shares(
        table, "survival", "Conversations without a failure up to the turn", "not yet failed",
        "share with every instruction followed up to the turn", confidence, "step-after",
    )  # fmt: skip


def size_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Return the figure of the entries per KV head after each turn's compression."""
    title, about = "Size of the cache after each turn", "entries per KV head, mean over the conversations"
    names, data, drawn, every = policies(table), Datasets(), [], []
    several = table["chat_set"].n_unique() > 1
    found = table.filter(statistic="entries_after")
    for panel in places(table, "entries_after", None):
        rows = turn_rows(found, "entries_after", panel, None)
        top = max((row["high"] or row["estimate"] for row in rows), default=1)
        y = alt.Y("estimate:Q", scale=marks.unit_scale(top * 1.03, clamp=False), axis=alt.Axis(title="entries"))
        drawn.append(panels.panel(_layers(rows, names, data, y), WIDTH, HEIGHT, _heading(panel, several)))
        every += rows
    if not every:
        return panels.note("No answer has the size of its cache.", title, about)
    how = f"{about}; {panels.share(confidence)}, {_count(every)}"
    return panels.figure(drawn, COLUMNS, data, title, how, "grey, dashed: the full cache")


_CONFLICT = "Which of two conflicting instructions is followed"


def conflict_rows(table: pl.DataFrame) -> list[Row]:
    """Return the shares of answers that follow the new, the old, both or neither, by turns since the conflict."""
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
    """Return the figure of which of two conflicting instructions is followed: a panel per policy and budget."""
    rows, about = conflict_rows(table), "share of the answers after the second instruction, by rule"
    if not rows:
        return panels.note("No instruction overrides another one.", _CONFLICT, about)
    data, drawn = Datasets(), []
    several = len({row["set"] for row in rows}) > 1
    keys = {(row["set"], row["policy"], row["budget"]) for row in rows}
    for key in sorted(keys, key=lambda k: (k[0], k[1] != FULL["policy"], k[1], labels.budget_order(k[2]))):
        own = [row for row in rows if (row["set"], row["policy"], row["budget"]) == key]
        name = key[1] if key[1] == FULL["policy"] else f"{key[1]}, {labels.budget(key[2])} kept"
        head = panels.title(f"{key[0]}: {name}" if several else name)
        drawn.append(panels.panel(_conflict_layers(own, data), 240, 170, head))
    return panels.figure(drawn, 3, data, _CONFLICT, f"{about}; {panels.share(confidence)}, {_count(rows)}")


def _conflict_layers(rows: Sequence[Row], data: Datasets) -> list[alt.Chart]:
    ages = sorted({row["age"] for row in rows})
    axis = alt.Axis(values=ages, format="d", grid=False, title="turns since the conflict")
    x = alt.X("age:Q", scale=marks.index_scale(ages, 0.3), axis=axis)
    scales = theme.category_scales("follows", list(FOLLOWS.values()), "follows")
    tip = panels.tooltip({"follows": "follows", "age": "turns since", "interval": "share [interval]", "n": "n"})
    return marks.curves(data, rows, x, _share_axis("answers"), scales, tip=tip)


def explorer(table: pl.DataFrame, confidence: float) -> Spec | None:
    """Return figure 1 as an interactive chart for one budget, rater and set at a time; None without verdicts."""
    rows: list[Row] = []
    for panel in places(table, "retention"):
        for by in BY:
            rows += [row | {"chat_set": panel[0]} for row in turn_rows(table, "retention", panel, by)]
    if not rows:
        return None
    data = Datasets(panels.choices(rows, {"by": "Judged", "budget": "Kept", "chat_set": "Conversations"}))
    layers = _layers(rows, policies(table), data, _share_axis("instructions followed"))
    about = f"share of the instructions that answers follow; {panels.share(confidence)}, {_count(rows)}"
    return panels.explorer(layers, 210, data, _RETENTION, about)


FIGURES = {
    "retention": retention_figure,
    "survival": survival_figure,
    "cache_size": size_figure,
    "conflicts": conflict_figure,
}


def write_retention_plots(table: str, confidence: float, outputs: Mapping[str, str]) -> None:
    """Write the figures of the `retention_plots` rule. Raises UserError for an output of another name.

    outputs: path by ``{name of FIGURES}_{svg|png}``.
    """
    found = read_table(table)
    figures = {name: partial(draw, found, confidence) for name, draw in FIGURES.items()}
    save.save_figures(figures, outputs)
