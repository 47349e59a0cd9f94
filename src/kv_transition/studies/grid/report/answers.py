"""Single answers: the question, the gold answers and each policy's answer of every example, within a size limit."""

from __future__ import annotations

from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.report.numbers import tokens_of
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid.results import Results

LONGEST_TEXT = 240  # characters of a question, a gold answer or an answer
MOST_CHARACTERS = 1_500_000  # of all texts together, so that a page stays below a few MB


def examples(results: Results) -> dict[str, Any]:
    """Return the data of the page's table of answers, as plain JSON.

    ``budgets`` by key; ``policies``; ``rows``, one for each example and mode, by task and length: ``mode``, ``tokens``,
    ``bin``, ``question``, ``gold``, ``full``, and per budget and policy ``answers[budget][policy]`` as [text, score,
    failure], first repeats only. ``left_out``: number of examples that exceed the size limit; each bin shows the same
    number.
    """
    frame = results.scores.filter(pl.col("repeat") == 0)
    answers = frame.with_columns(
        _cut(pl.col("text").fill_null("")).alias("text"),
        _cut(pl.col("question").fill_null("")).alias("question"),
        _cut(pl.col("answers").list.join(" | ").fill_null("")).alias("gold"),
    )
    shown, left_out = _fitting(answers)
    names = {(t, b["bin"]): f"{tokens_of(b)} tokens" for t, _ in results.groups for b in results.bins(t)}
    rows = []
    group = ["task", "mode", "bin", "example_id"]
    order = {g: i for i, g in enumerate(results.groups)}
    for key, cells in shown.sort("bin", "token_len", "example_id").group_by(group, maintain_order=True):
        task, mode, bin, example_id = key
        row = {
            "task": task, "mode": labels.mode(mode), "bin": names[task, bin], "id": example_id,
            "question": cells["question"][0], "gold": cells["gold"][0], "full": None, "answers": {},
            "order": order[task, mode],
        }  # fmt: skip
        for policy, budget, text, score, failure in cells.select(
            "policy", "budget", "text", "score", "failure"
        ).iter_rows():
            entry = [text, None if score is None else round(score, 3), failure and labels.failure(failure)]
            if policy == FULL["policy"]:
                row["full"] = entry
            else:
                row["answers"].setdefault(labels.budget(budget), {})[policy] = entry
        rows.append(row)
    rows.sort(key=lambda row: row.pop("order"))
    return {
        "budgets": [labels.budget(b) for b in results.budgets],
        "policies": results.policies,
        "modes": list(dict.fromkeys(labels.mode(m) for _, m in results.groups)),
        "bins": list(dict.fromkeys(row["bin"] for row in rows)),
        "several_tasks": results.several_tasks,
        "rows": rows,
        "left_out": left_out,
        "repeats": int(results.scores["repeat"].max() or 0) + 1,
    }


def _cut(text: pl.Expr) -> pl.Expr:
    return pl.when(text.str.len_chars() > LONGEST_TEXT).then(text.str.head(LONGEST_TEXT) + "…").otherwise(text)


def _fitting(answers: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Return the examples of each bin that fit, in the order of their ids, and the number of omitted ones."""
    size = answers.select((pl.col("text").str.len_chars() + 20).sum()).item() or 0
    unit = ["task", "bin", "example_id"]
    every = answers.select(*unit).unique().sort(unit)
    most = every.group_by("task", "bin").len()["len"].max() or 0
    number = max(1, int(most * min(1.0, MOST_CHARACTERS / max(size, 1))))
    kept = every.with_columns(rank=pl.int_range(pl.len()).over("task", "bin")).filter(pl.col("rank") < number)
    return answers.join(kept.drop("rank"), on=unit), every.height - kept.height
