"""Figures of entropy and recall: by entropy bin, by step, and the score of recalling against its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels, parsing
from kv_transition.plotting import marks, panels, save, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.stats.examples import FULL, example_values, is_full
from kv_transition.stats.frames import read_table
from kv_transition.studies.recall import moments as recall_moments
from kv_transition.studies.recall.observations import LEVELS, read_observations
from kv_transition.studies.recall.step_logs import write_logs
from kv_transition.studies.recall.verdict import FAILS, HOLDS

KEY = ["task", "policy", "granularity", "memory"]
# A policy is drawn in the study's form if that was observed, otherwise in the first observed form of this list.
PREFERRED = (("global", "ideal"), ("per_head", "ideal"), ("global", "irreversible"), ("per_head", "irreversible"))
BINS = ("low\n< 1 nat", "medium", "high\n> 2.5 nats")
POINTS = 150  # points of a policy and budget in the scatter plot
SEED = 0
WIDTH, HEIGHT, COLUMNS = 260, 190, 3
GRANULARITY = {"global": "one set for all heads", "per_head": "one set for each head"}


def chosen(table: pl.DataFrame) -> list[tuple[str, str, str, str]]:
    """Return (task, policy, granularity, memory), one for each policy, sorted by name."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for task, policy, granularity, memory in table.select(KEY).unique().sort(KEY).iter_rows():
        best = found.get((task, policy), (granularity, memory))
        found[task, policy] = min(best, (granularity, memory), key=PREFERRED.index)
    return [(*name, *kind) for name, kind in found.items()]


def _budgets(table: pl.DataFrame) -> list[str]:
    return sorted(table["budget"].drop_nulls().unique(), key=labels.budget_order)


def bin_rows(table: pl.DataFrame) -> list[Row]:
    """Return mean recall of each entropy bin with its interval; the budgets are drawn slightly side by side."""
    budgets, rows = _budgets(table), []
    names = {f"recall_{level}": i for i, level in enumerate(LEVELS)}
    own = table.filter(pl.col("statistic").is_in(list(names))).drop_nulls("estimate")
    for row in own.iter_rows(named=True):
        at = names[row["statistic"]]
        rows.append({
            **{k: row[k] for k in KEY}, "budget": labels.budget(row["budget"]), "bin": LEVELS[at],
            "x": at + (budgets.index(row["budget"]) - (len(budgets) - 1) / 2) * 0.07,
            "estimate": row["estimate"], "low": row["ci_low"], "high": row["ci_high"], "n": row["n"],
            "clusters": row["clusters"], "steps": row["steps"], "method": row["method"],
            "interval": labels.interval(row["estimate"], row["ci_low"], row["ci_high"]),
        })  # fmt: skip
    return sorted(rows, key=lambda r: r["x"])


def _chance(rows: list[Row]) -> list[Row]:
    """Return the expected recall of a random set for each budget."""
    shares = {(*(r[k] for k in KEY), r["budget"]): r for r in rows if r["budget"].endswith("%")}
    return [r | {"chance": float(r["budget"].removesuffix("%")) / 100} for r in shares.values()]


def _budget_scales(table: pl.DataFrame) -> tuple[alt.Color, alt.Shape]:
    return theme.category_scales("budget", [labels.budget(budget) for budget in _budgets(table)], "cache kept")


_CRITERIA = [{"x": -0.4, "x2": 0.4, "y": HOLDS}, {"x": 1.6, "x2": 2.4, "y": FAILS}]


def _bin_layers(table: pl.DataFrame, rows: list[Row], data: Datasets) -> list[alt.Chart]:
    expression = "[" + ",".join(repr(name.split("\n")) for name in BINS) + "][datum.value]"
    x = alt.X(
        "x:Q",
        scale=marks.index_scale((0, 2), 0.45),
        axis=alt.Axis(values=[0, 1, 2], labelExpr=expression, grid=False, title="entropy of the token"),
    )
    y_scale, scales = marks.unit_scale(), _budget_scales(table)
    y = alt.Y("estimate:Q", scale=y_scale, axis=alt.Axis(title="recall, mean", tickCount=5))
    fields = {"budget": "cache kept", "bin": "entropy", "interval": "recall [interval]", "n": "examples",
              "clusters": "contexts", "steps": "steps", "method": "method"}  # fmt: skip
    return [
        data.chart(_chance(rows)).mark_rule(strokeDash=[2, 4], strokeWidth=1.2, opacity=0.8)
        .encode(y=alt.Y("chance:Q", scale=y_scale), color=scales[0]),
        data.chart(_CRITERIA, filtered=False).mark_rule(strokeWidth=1.4, color=theme.INK)
        .encode(x=x, x2=alt.X2("x2:Q"), y=alt.Y("y:Q", scale=y_scale)),
        *marks.curves(data, rows, x, y, scales, tip=panels.tooltip(fields)),
    ]  # fmt: skip


_BINS_TITLE = "Recall of the needed entries, by the model's uncertainty"


def _bins_note(rows: list[Row], confidence: float) -> tuple[str, str]:
    n = f"n = {panels.span([row['n'] for row in rows])} examples per point"
    if any(row["clusters"] != row["n"] for row in rows):
        n += f" from {panels.span([row['clusters'] for row in rows])} contexts"
    return (
        f"share of the needed entries that the policy holds; {panels.share(confidence)}, {n}",
        f"dotted: chance level; black: the criteria, at least {HOLDS:g} at low and below {FAILS:g} at high entropy",
    )


def bins_figure(table: pl.DataFrame, confidence: float) -> Spec:
    """Return the figure of mean recall against the entropy bin: a panel per policy, a line per budget."""
    rows = bin_rows(table)
    if not rows:
        return panels.note("No step has entropy and recall.", _BINS_TITLE, panels.share(confidence))
    data, drawn = Datasets(), []
    several = table["task"].n_unique() > 1
    for key in chosen(table):
        own = [row for row in rows if tuple(row[k] for k in KEY) == key]
        if own:
            drawn.append(panels.panel(_bin_layers(table, own, data), WIDTH, HEIGHT, _panel_title(key, several)))
    return panels.figure(drawn, COLUMNS, data, _BINS_TITLE, *_bins_note(rows, confidence))


def _panel_title(key: tuple[str, str, str, str], several: bool, more: str = "") -> Spec:
    task, policy, granularity, memory = key
    subtitle = (f"{GRANULARITY[granularity]}, {memory} memory", *([more] if more else []))
    return panels.title(f"{task}: {policy}" if several else policy, *subtitle)


def bins_explorer(table: pl.DataFrame, confidence: float) -> Spec | None:
    """Return the same as an interactive chart for one policy, granularity and memory at a time; None without data."""
    rows = bin_rows(table)
    if not rows:
        return None
    for row in rows:
        row["granularity"] = GRANULARITY[row["granularity"]]
    order = {name: i for i, name in enumerate(GRANULARITY.values())}
    rows.sort(key=lambda r: (r["task"], r["policy"], order[r["granularity"]], r["memory"], r["x"]))
    controls = {"memory": "Memory", "granularity": "Kept", "policy": "Policy", "task": "Task"}
    data = Datasets(panels.choices(rows, controls))
    return panels.explorer(_bin_layers(table, rows, data), 210, data, _BINS_TITLE, *_bins_note(rows, confidence))


_SCATTER_TITLE = "Entropy and recall, step by step"


def scatter_figure(table: pl.DataFrame, observations: pl.DataFrame, confidence: float) -> Spec:
    """Return the figure of steps as points (a seeded sample), with the least-squares line of all steps; a panel per
    policy.
    """
    steps = observations.drop_nulls(["entropy", "recall"])
    share = f"at most {POINTS} steps of each budget are drawn; lines: least squares over all steps"
    if not steps.height:
        return panels.note("No step has entropy and recall.", _SCATTER_TITLE, share)
    data, drawn = Datasets(), []
    several = table["task"].n_unique() > 1
    for key in chosen(table):
        own = steps.filter(**dict(zip(KEY, key, strict=True)))
        if own.height:
            layers, more = _scatter_layers(table, own, data, dict(zip(KEY, key, strict=True)))
            drawn.append(panels.panel(layers, WIDTH, HEIGHT, _panel_title(key, several, more)))
    r = f"r: Pearson with its {100 * confidence:g} % interval"
    return panels.figure(drawn, COLUMNS, data, _SCATTER_TITLE, share, r)


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
        if r["estimate"] is not None:  # the last one is that of the smallest budget
            interval = labels.interval(r["estimate"], r["ci_low"], r["ci_high"]).replace("-", "−")
            said = f"r = {interval} at {name}, n = {r['n']}"
    x = alt.X("x:Q", axis=alt.Axis(title="entropy of the token, nats", grid=False, tickCount=6))
    # not clamped, because a line that leaves the panel must keep its slope
    y = alt.Y("y:Q", scale=marks.unit_scale(clamp=False), axis=alt.Axis(title="recall", tickCount=5))
    colors, _ = _budget_scales(table)
    return [
        data.chart(points).mark_point(filled=True, size=9, opacity=0.35).encode(x=x, y=y, color=colors),
        data.chart(lines).mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, color=colors),
    ], said


MOVED = {"moved_bytes": "moved between the two, MiB", "hot_bytes": "in the cache (hot), MiB",
         "total_bytes": "in cache and store (total), MiB"}  # fmt: skip
_MOMENTS_TITLE = "Score and cost of recalling evicted entries"


def moments_figure(scores: Any, policies: recall_moments.Options, confidence: float) -> Spec:
    """Return the figure of the mean score of entropy_recall and its controls against bytes moved, hot and total.

    There is a row of panels for each task and mode.
    """
    points = recall_moments.points(scores, policies, confidence)
    share = f"means per answer, over all lengths; {panels.share(confidence)}"
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
        return panels.note("No answer records the bytes that the policy entropy_recall moved.", _MOMENTS_TITLE, share)
    names, data, drawn = sorted({row["policy"] for row in rows}), Datasets(), []
    full = _full_scores(scores, confidence)
    for task, mode in dict.fromkeys((row["task"], row["mode"]) for row in rows):
        for column, title in MOVED.items():
            own = [r for r in rows if (r["task"], r["mode"], r["cost"]) == (task, mode, column)]
            whole = [r for r in full if (r["task"], r["mode"]) == (task, mode)]
            head = panels.title(f"{task}, {labels.mode(mode)}" if column == "moved_bytes" else "")
            drawn.append(panels.panel(_moments_layers(own, whole, names, title, data), 250, 210, head))
    key = "lines join the budgets of a policy; grey: the full cache"
    n = panels.span([row["n"] for row in rows])
    return panels.figure(drawn, len(MOVED), data, _MOMENTS_TITLE, f"{share}, n = {n}", key)


def _full_scores(scores: Any, confidence: float) -> list[Row]:
    frame = example_values(scores).filter(is_full())
    found = []
    for (task, mode), own in frame.group_by("task", "mode", maintain_order=True):
        found.append({"task": task, "mode": mode, "policy": FULL["policy"], "estimate": own["score"].mean()})
    return found


def _moments_layers(rows: list[Row], full: list[Row], names: list[str], title: str, data: Datasets) -> list[alt.Chart]:
    x = alt.X("x:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=title, grid=False, tickCount=5))
    y = alt.Y("estimate:Q", scale=marks.unit_scale(), axis=alt.Axis(title="score, mean", tickCount=5))
    return [marks.level(data, full, y), *marks.curves(data, rows, x, y, theme.policy_scales(names))]


def write_entropy_recall_plots(
    table: str, observations: Sequence[str], confidence: float, outputs: Mapping[str, str], logs: Sequence[str] = ()
) -> None:
    """Write the figures, and the logs of each task. Raises UserError for an output of another name.

    outputs: path by ``{entropy_bins|entropy_scatter}_{svg|png}``. logs: folders beside the observations of their task.
    """
    found = read_table(table)
    figures = {
        "entropy_bins": lambda: bins_figure(found, confidence),
        "entropy_scatter": lambda: scatter_figure(found, read_observations(observations), confidence),
    }
    save.save_figures(figures, outputs)
    for folder in logs:
        write_logs([path for path in observations if Path(path).parent == Path(folder).parent], folder)


def write_moments_plots(
    scores: str, policies: recall_moments.Options, confidence: float, outputs: Mapping[str, str]
) -> None:
    """Write the figure of the moments. Raises UserError for an output of another name.

    outputs: path by ``recall_moments_{svg|png}``.
    """
    figures = {"recall_moments": lambda: moments_figure(parsing.read_parquet(scores), policies, confidence)}
    save.save_figures(figures, outputs)


def write_recalling(
    scores: str,
    table: str,
    statistics: Mapping[str, Any],
    policies: recall_moments.Options,
    outputs: Mapping[str, str],
) -> None:
    """Write the comparison of entropy's moments with those of chance, and the figure of score against cost."""
    recall_moments.write_recall_moments(scores, table, statistics, policies)
    write_moments_plots(scores, policies, statistics["confidence"], outputs)
