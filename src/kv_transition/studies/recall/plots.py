"""Figures of entropy against recall: by bin, step by step, and what recalling gives against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels, parsing
from kv_transition.plotting.drawing import (  # fmt: skip
    INK,
    NEUTRAL,
    PALETTE,
    SHAPES,
    Datasets,
    Spec,
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
from kv_transition.stats import intervals
from kv_transition.stats.examples import FULL, example_values, is_full
from kv_transition.stats.frames import read_table
from kv_transition.studies.recall import moments as recall_moments
from kv_transition.studies.recall.observations import LEVELS, read_observations
from kv_transition.studies.recall.verdict import FAILS, HOLDS

KEY = ["task", "policy", "granularity", "memory"]
# A policy is drawn as the study has it where that was observed, else as it could be.
PREFERRED = (("global", "ideal"), ("per_head", "ideal"), ("global", "irreversible"), ("per_head", "irreversible"))
BINS = ("low\n< 1 nat", "medium", "high\n> 2.5 nats")
POINTS = 150  # of a policy and budget in the scatter
SEED = 0
WIDTH, HEIGHT, COLUMNS = 260, 190, 3
GRANULARITY = {"global": "one set for all heads", "per_head": "a set for each head"}
Row = dict[str, Any]


def chosen(table: pl.DataFrame) -> list[tuple[str, str, str, str]]:
    """(task, policy, granularity, memory) of each policy, one each, in the order of the names."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for task, policy, granularity, memory in table.select(KEY).unique().sort(KEY).iter_rows():
        best = found.get((task, policy), (granularity, memory))
        found[task, policy] = min(best, (granularity, memory), key=PREFERRED.index)
    return [(*name, *kind) for name, kind in found.items()]


def _budgets(table: pl.DataFrame) -> list[str]:
    return sorted(table["budget"].drop_nulls().unique(), key=labels.budget_order)


def bin_rows(table: pl.DataFrame) -> list[Row]:
    """Mean recall of each entropy bin with its interval, as drawn; budgets a little apart."""
    budgets, rows = _budgets(table), []
    names = {f"recall_{level}": i for i, level in enumerate(LEVELS)}
    own = table.filter(pl.col("statistic").is_in(list(names))).drop_nulls("estimate")
    for row in own.iter_rows(named=True):
        at = names[row["statistic"]]
        rows.append({
            **{k: row[k] for k in KEY}, "budget": labels.budget(row["budget"]), "bin": LEVELS[at],
            "x": at + (budgets.index(row["budget"]) - (len(budgets) - 1) / 2) * 0.07,
            "estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"], "n": row["n"],
            "steps": row["steps"], "method": row["method"],
            "interval": labels.interval(row["estimate"], row["ci_low"], row["ci_high"]),
        })  # fmt: skip
    return sorted(rows, key=lambda r: r["x"])


def _chance(rows: list[Row]) -> list[Row]:
    """What a random set of each drawn share would recall."""
    shares = {(*(r[k] for k in KEY), r["budget"]): r for r in rows if r["budget"].endswith("%")}
    return [r | {"chance": float(r["budget"].removesuffix("%")) / 100} for r in shares.values()]


def _budget_scales(table: pl.DataFrame) -> tuple[alt.Color, alt.Shape]:
    names = [labels.budget(budget) for budget in _budgets(table)]
    legend = alt.Legend(title="cache kept", orient="top", symbolSize=90, symbolOpacity=1, symbolStrokeWidth=2)
    colors = alt.Scale(domain=names, range=[PALETTE[i % len(PALETTE)] for i in range(len(names))])
    shapes = alt.Scale(domain=names, range=[SHAPES[i % len(SHAPES)] for i in range(len(names))])
    return alt.Color("budget:N", scale=colors, legend=legend), alt.Shape("budget:N", scale=shapes, legend=legend)


_Y = alt.Scale(domain=[0, 1.02], nice=False, clamp=True)
_CRITERIA = [{"x": -0.4, "x2": 0.4, "y": HOLDS}, {"x": 1.6, "x2": 2.4, "y": FAILS}]


def _bin_layers(table: pl.DataFrame, rows: list[Row], data: Datasets, by: Sequence[alt.Parameter] = ()) -> list:
    expression = "[" + ",".join(repr(name.split("\n")) for name in BINS) + "][datum.value]"
    x = alt.X(
        "x:Q",
        scale=alt.Scale(domain=[-0.45, 2.45], nice=False, zero=False),
        axis=alt.Axis(values=[0, 1, 2], labelExpr=expression, grid=False, title="entropy of the token"),
    )
    y = alt.Y("estimate:Q", scale=_Y, axis=alt.Axis(title="recall, mean", tickCount=5))
    colors, shapes = _budget_scales(table)
    fields = {"budget": "cache kept", "bin": "entropy", "interval": "recall [interval]", "n": "examples",
              "steps": "steps", "method": "method"}  # fmt: skip
    own = filtered(data.add(rows), by)
    return [
        filtered(data.add(_chance(rows)), by).mark_rule(strokeDash=[2, 4], strokeWidth=1.2, opacity=0.8)
        .encode(y=alt.Y("chance:Q", scale=_Y), color=colors),
        alt.Chart(data.add(_CRITERIA)).mark_rule(strokeWidth=1.4, color=INK)
        .encode(x=x, x2="x2:Q", y=alt.Y("y:Q", scale=_Y)),
        own.mark_rule(strokeWidth=1.3, opacity=0.6).encode(x=x, y=alt.Y("low:Q", scale=_Y), y2="high:Q", color=colors),
        own.mark_line(strokeWidth=1.9).encode(x=x, y=y, color=colors),
        own.mark_point(filled=True, size=52, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=y, color=colors, shape=shapes,
                tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in fields.items()]),
    ]  # fmt: skip


_BINS_TITLE = "What the cache would have held, by the model's uncertainty"


def _bins_note(rows: list[Row], confidence: float) -> tuple[str, str]:
    counts = [row["n"] for row in rows]
    span = f"n = {min(counts)} to {max(counts)} examples a point" if len(set(counts)) > 1 else f"n = {counts[0]}"
    return (
        f"share of the needed entries that the policy holds; {100 * confidence:g} % intervals, {span}",
        f"dotted: chance level; black: the criteria, at least {HOLDS:g} at low and below {FAILS:g} at high entropy",
    )


def bins_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Mean recall against the entropy bin: a panel per policy, a line per budget."""
    rows = bin_rows(table)
    if not rows:
        return note("No step has entropy and recall.", _BINS_TITLE, f"{100 * confidence:g} % intervals")
    data, panels = Datasets(), []
    several = table["task"].n_unique() > 1
    for key in chosen(table):
        own = [row for row in rows if tuple(row[k] for k in KEY) == key]
        if own:
            panels.append(view(_bin_layers(table, own, data), WIDTH, HEIGHT, _panel_title(key, several)))
    return compose(
        {"vconcat": rows_of(panels, COLUMNS), "spacing": 26}, data, _BINS_TITLE, *_bins_note(rows, confidence)
    )


def _panel_title(key: tuple[str, str, str, str], several: bool, more: str = "") -> Spec:
    task, policy, granularity, memory = key
    subtitle = [f"{GRANULARITY[granularity]}, {memory} memory", *([more] if more else [])]
    head = f"{task}: {policy}" if several else policy
    return {"text": head, "subtitle": subtitle, "fontSize": 13, "subtitleFontSize": 11, "offset": 8}


def bins_explorer(table: pl.DataFrame, confidence: float) -> Spec | None:
    """The same to ask: one policy, granularity and memory at a time, as wide as its place; None without any mean."""
    rows = bin_rows(table)
    if not rows:
        return None
    for row in rows:
        row["granularity"] = GRANULARITY[row["granularity"]]
    order = {name: i for i, name in enumerate(GRANULARITY.values())}
    rows.sort(key=lambda r: (r["task"], r["policy"], order[r["granularity"]], r["memory"], r["x"]))
    by = choices(rows, {"memory": "Memory", "granularity": "Kept", "policy": "Policy", "task": "Task"})
    data = Datasets()
    layers = alt.layer(*_bin_layers(table, rows, data, by)).add_params(*by)
    size = {"width": "container", "height": 340, "autosize": {"type": "fit", "contains": "padding"}}
    return compose(inner(layers) | size, data, _BINS_TITLE, *_bins_note(rows, confidence))


_SCATTER_TITLE = "Entropy and recall, step by step"


def scatter_figure(table: pl.DataFrame, observations: pl.DataFrame, confidence: float) -> Spec:
    """Steps as points (a seeded sample) with the least-squares line of all steps: a panel per policy."""
    steps = observations.drop_nulls(["entropy", "recall"])
    share = f"at most {POINTS} steps of each budget are drawn; lines: least squares over all steps"
    if not steps.height:
        return note("No step has entropy and recall.", _SCATTER_TITLE, share)
    data, panels = Datasets(), []
    several = table["task"].n_unique() > 1
    for key in chosen(table):
        own = steps.filter(**dict(zip(KEY, key, strict=True)))
        if own.height:
            layers, more = _scatter_layers(table, own, data, dict(zip(KEY, key, strict=True)))
            panels.append(view(layers, WIDTH, HEIGHT, _panel_title(key, several, more)))
    content = {"vconcat": rows_of(panels, COLUMNS), "spacing": 26}
    return compose(content, data, _SCATTER_TITLE, share, f"r: Pearson with its {100 * confidence:g} % interval")


def _scatter_layers(table: pl.DataFrame, steps: pl.DataFrame, data: Datasets, key: Row) -> tuple[list, str]:
    points, lines, said = [], [], ""
    for budget in sorted(steps["budget"].unique(), key=labels.budget_order):
        own = steps.filter(budget=budget).sort("example_id", "prompt_kind", "step")
        name = labels.budget(budget)
        drawn = own.sample(min(POINTS, own.height), seed=SEED)
        points += [{"budget": name, "x": h, "y": r} for h, r in drawn.select("entropy", "recall").iter_rows()]
        found = {row["statistic"]: row for row in table.filter(budget=budget, **key).iter_rows(named=True)}
        slope = found["slope"]["estimate"]
        if slope is not None:
            mean_x, mean_y = own["entropy"].mean(), own["recall"].mean()
            ends = (own["entropy"].min(), own["entropy"].max())
            lines += [{"budget": name, "x": x, "y": mean_y + slope * (x - mean_x)} for x in ends]
        r = found["pearson"]
        if r["estimate"] is not None:  # the last, smallest budget's
            interval = labels.interval(r["estimate"], r["ci_low"], r["ci_high"]).replace("-", "−")
            said = f"r = {interval} at {name}, n = {r['n']}"
    x = alt.X("x:Q", axis=alt.Axis(title="entropy of the token, nats", grid=False, tickCount=6))
    # not clamped: a line that leaves the panel must keep its slope
    y = alt.Y("y:Q", scale=alt.Scale(domain=[0, 1.02], nice=False), axis=alt.Axis(title="recall", tickCount=5))
    colors, _ = _budget_scales(table)
    return [
        alt.Chart(data.add(points)).mark_point(filled=True, size=9, opacity=0.35).encode(x=x, y=y, color=colors),
        alt.Chart(data.add(lines)).mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, color=colors),
    ], said


MOVED = {"moved_bytes": "moved between the two, MiB", "hot_bytes": "in the cache (hot), MiB",
         "total_bytes": "in cache and store (total), MiB"}  # fmt: skip
_MOMENTS_TITLE = "What recalling evicted entries gives, and what it costs"


def moments_figure(scores: Any, policies: recall_moments.Options, confidence: float) -> Spec:
    """Mean score of entropy_recall and its controls against bytes moved, hot and total; a row per task and mode."""
    points = recall_moments.points(scores, policies, confidence)
    share = f"means of an answer, over all lengths; {100 * confidence:g} % intervals"
    rows = []
    for point in points:
        for column in MOVED:
            if point[column]["estimate"] is not None and point["score"]["estimate"] is not None:
                rows.append({
                    **{k: point[k] for k in recall_moments.CELL}, "cost": column,
                    "x": point[column]["estimate"] / 2**20, "estimate": point["score"]["estimate"],
                    "low": point["score"]["ci_low"], "high": point["score"]["ci_high"], "n": point["score"]["n"],
                })  # fmt: skip
    if not rows:
        return note("No answer records the bytes that the policy entropy_recall moved.", _MOMENTS_TITLE, share)
    counts = sorted({row["n"] for row in rows})
    span = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    names, data, panels = sorted({row["policy"] for row in rows}), Datasets(), []
    full = _full_scores(scores, confidence)
    top = 1.02
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        line = []
        for column, title in MOVED.items():
            own = [r for r in rows if (r["task"], r["mode"], r["cost"]) == (task, mode, column)]
            whole = [r for r in full if (r["task"], r["mode"]) == (task, mode)]
            head = {"text": f"{task}, {labels.mode(mode)}", "fontSize": 12} if column == "moved_bytes" else {"text": ""}
            line.append(view(_moments_layers(own, whole, names, title, top, data), 250, 210, head))
        panels.append({"hconcat": line, "spacing": 24})
    key = "lines join the budgets of a policy; grey: the full cache"
    return compose({"vconcat": panels, "spacing": 24}, data, _MOMENTS_TITLE, f"{share}, {span}", key)


def _full_scores(scores: Any, confidence: float) -> list[Row]:
    frame = example_values(scores).filter(is_full())
    found = []
    for (task, mode), own in frame.group_by("task", "mode", maintain_order=True):
        mean = intervals.bounded_mean(own["score"].to_numpy()[None], confidence)
        found.append({"task": task, "mode": mode, "policy": FULL["policy"], "estimate": float(mean.estimate[0])})
    return found


def _moments_layers(rows: list[Row], full: list[Row], names: list[str], title: str, top: float, data: Datasets) -> list:
    y_scale = alt.Scale(domain=[0, top], nice=False, clamp=True)
    x = alt.X("x:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=title, grid=False, tickCount=5))
    y = alt.Y("estimate:Q", scale=y_scale, axis=alt.Axis(title="score, mean", tickCount=5))
    own = alt.Chart(data.add(rows))
    return [
        alt.Chart(data.add(full)).mark_rule(color=NEUTRAL, strokeDash=[5, 3]).encode(y=y),
        own.mark_rule(strokeWidth=1.2, opacity=0.6)
        .encode(x=x, y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=color(names)),
        own.mark_line(strokeWidth=1.4).encode(x=x, y=y, color=color(names)),
        own.mark_point(filled=True, size=70, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=y, color=color(names), shape=shape(names)),
    ]  # fmt: skip


def write_entropy_recall_plots(
    table: str, observations: Sequence[str], confidence: float, outputs: Mapping[str, str]
) -> None:
    """The `entropy_recall_plots` rule. ``outputs``: path by ``{entropy_bins|entropy_scatter}_{svg|png}``.

    Raises UserError for an output of another name.
    """
    found = read_table(table)
    drawn = {"entropy_bins": bins_figure(found, confidence)}
    drawn["entropy_scatter"] = scatter_figure(found, read_observations(observations), confidence)
    save_figures(drawn, outputs)


def write_moments_plots(
    scores: str, policies: recall_moments.Options, confidence: float, outputs: Mapping[str, str]
) -> None:
    """Part of the `recall_moments` rule. ``outputs``: path by ``recall_moments_{svg|png}``.

    Raises UserError for an output of another name.
    """
    save_figures({"recall_moments": moments_figure(parsing.read_parquet(scores), policies, confidence)}, outputs)


def write_recalling(
    scores: str,
    table: str,
    statistics: Mapping[str, Any],
    policies: recall_moments.Options,
    outputs: Mapping[str, str],
) -> None:
    """Write the comparison of entropy's moments to recall with chance's, and the figure of what recalling costs."""
    recall_moments.write_recall_moments(scores, table, statistics, policies)
    write_moments_plots(scores, policies, statistics["confidence"], outputs)
