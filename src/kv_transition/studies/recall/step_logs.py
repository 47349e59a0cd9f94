"""Observations in the recall study's own file format: a log of steps and a plot for each budget.

    {task}_budget_{ratio}_{timestamp}.jsonl   metadata in the first line, then one step per line
    {task}_budget_{ratio}/logs.json           the same as {"metadata", "steps"}
    {task}_budget_{ratio}/plots/entropy_recall.svg, .png

As in the study, they show accumulated attention (h2o_heavy, else h2o, else the first observed policy), with scores of
the full cache (memory ideal) and sets averaged over layers and heads (granularity global), if these were observed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from kv_transition.plotting import panels, save, theme
from kv_transition.provenance import read_metadata, write_text
from kv_transition.stats import frames

_PREFERRED = {"policy": ("h2o_heavy", "h2o"), "memory": ("ideal",), "granularity": ("global",)}
_COLUMNS = ["example_id", "prompt_kind", "step", "token_id", "entropy", "n"]


def write_logs(observations: Sequence[str], folder: str) -> None:
    """Write the study's logs from the observation files of one task; a second run replaces them."""
    steps = pl.concat([frames.read_parquet(path) for path in observations])
    about = read_metadata(observations[0])
    chosen: dict[str, str] = {}
    for column, names in _PREFERRED.items():
        there = steps[column].unique(maintain_order=True).to_list()
        if there:
            chosen[column] = next((name for name in names if name in there), there[0])
            steps = steps.filter(pl.col(column) == chosen[column])
    written = max(read_metadata(path)["timestamp"] for path in observations)
    metadata = {
        "model": Path(about["model"]).name,
        "model_path": about["model"],
        "model_revision": None if about.get("model_revision") in ("", "null") else about.get("model_revision"),
        **{key: about.get(key) for key in ("dataset", "split", "attention", "attention_version", "dtype")},
        "max_length": int(about["max_length"]) if "max_length" in about else None,
        "timestamp": written,
        **chosen,
    }
    task = steps["task"][0] if len(steps) else Path(observations[0]).parent.name
    budgets = steps["budget"].unique(maintain_order=True).to_list()
    logs = _in_columns(steps, budgets)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    moment = datetime.fromisoformat(written).strftime("%Y%m%dT%H%M%S")
    for budget in budgets:
        own = metadata | {"budget": float(budget[1:])}
        rows = logs.with_columns(pl.col(_column(budget)).alias("recall")).to_dicts()
        name = f"{task}_budget_{budget[1:]}"
        head, lines = json.dumps(own), [json.dumps(row) for row in rows]
        write_text(out / f"{name}_{moment}.jsonl", "\n".join([f'{{"metadata": {head}}}', *lines]) + "\n")
        listed = ",\n".join(lines)
        write_text(out / name / "logs.json", f'{{"metadata": {head},\n"steps": [\n{listed}\n]}}\n')
        plots = {f"entropy_recall_{ext}": str(out / name / "plots" / f"entropy_recall.{ext}") for ext in ("svg", "png")}
        save.save_figures({"entropy_recall": partial(_figure, rows, own)}, plots)


def _column(budget: str) -> str:
    """Return the name of a budget's column, such as ``recall_10`` for ``r0.1``."""
    return f"recall_{float(budget[1:]) * 100:g}"


def _in_columns(steps: pl.DataFrame, budgets: Sequence[str]) -> pl.DataFrame:
    """Return a row per step with its entropy and recall_10, recall_20, ..."""
    logs = steps.select(_COLUMNS).unique(maintain_order=True)
    for budget in budgets:
        own = steps.filter(pl.col("budget") == budget).select(
            "example_id", "prompt_kind", "step", pl.col("recall").alias(_column(budget))
        )
        logs = logs.join(own, on=["example_id", "prompt_kind", "step"], how="left", maintain_order="left")
    return logs


def _figure(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> panels.Spec:
    """Return the figure of every step as a point with the least-squares line, and the chance level."""
    data = panels.Datasets()
    points = data.chart([{"entropy": row["entropy"], "recall": row["recall"]} for row in rows])
    chance = data.chart([{"recall": metadata["budget"]}])
    at = {"x": alt.X("entropy:Q", title="token entropy (nats)"), "y": alt.Y("recall:Q", title="recall")}
    layers = [
        chance.mark_rule(strokeDash=[4, 4], color=theme.NEUTRAL).encode(y=alt.Y("recall:Q")),
        points.mark_circle(size=14, opacity=0.35, color=theme.PALETTE[0]).encode(**at),
        points.transform_regression("entropy", "recall").mark_line(color=theme.PALETTE[1]).encode(**at),
    ]
    budget, policy = metadata["budget"], metadata.get("policy")
    return panels.compose(
        {"layer": [panels.inner(layer) for layer in layers], "width": 460, "height": 300},
        data,
        f"Entropy and recall, budget {budget:g}",
        f"{policy}, {len(rows)} steps; dashed: chance",
    )
