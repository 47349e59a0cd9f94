"""The sections of docs/findings.md, each from the tables that were kept of one experiment on a real language model.

Every number is read from benchmarks/results/real; every answer is chosen by what the intervals carry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import findings_figures as figures
import polars as pl
from document import table

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "real"
IMAGES = ROOT / "docs" / "images"
SETS = {"books": "perplexity.path=BOOKS", "records": "dataset.path=DATA", "rules": "chat.path=DATA"}
TEXTS = {"one_hop": "HotpotQA, one hop", "musique": "MuSiQue, cut down", "pg19": "PG-19"}
"""names of tasks that a reader knows"""
Row = dict[str, Any]


def kept(name: str, what: str) -> pl.DataFrame:
    return pl.read_parquet(KEPT / name / f"{what}.parquet")


def run(name: str) -> Row:
    return json.loads((KEPT / name / "run.json").read_text(encoding="utf-8"))


def interval(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ending(name: str, not_shown: str, given: str | None = None) -> list[str]:
    """What the study does not show, its command, what it took and at which commit it was run."""
    facts = run(name)
    assignment = f" --config set='{SETS[given]}'" if given else ""
    versions = facts["package_versions"]
    took = facts.get("took") or f"{facts['processor_s'] / 60:.0f} minutes of processor time"
    made = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return [
        "",
        f"What it does not show: {not_shown}",
        "",
        f"Command: `snakemake --cores 1 --configfile config/experiments/{facts['experiment']}.yaml{assignment}`; "
        f"{took}. Commit {facts['git_commit'][:12]}, {made}.",
    ]


def picture(name: str, text: str) -> list[str]:
    return ["", f"![{text}](images/{name}.svg)", ""]


# ----------------------------------------------------------------------------------------------------
# Study 1


def full_cache() -> list[str]:
    """What the model can do before anything is evicted."""
    rows: list[Row] = []
    for name in ("lengths", "one_hop", "transition"):
        if (KEPT / name).is_dir():
            found = kept(name, "bin_stats").filter(policy="full", statistic="score_mean", mode="after_prompt")
            rows += found.sort("task", "bin").to_dicts()
    best: dict[tuple[str, int], Row] = {}
    for row in rows:  # the same task was run with more examples as well
        key = (row["task"], row["token_max"])
        best[key] = max(row, best.get(key, row), key=lambda r: r["n"])
    chosen = sorted(best.values(), key=lambda r: (r["task"], r["token_max"]))
    good = sorted({r["task"] for r in chosen if all(o["estimate"] >= 0.5 for o in chosen if o["task"] == r["task"])})
    weak = sorted({r["task"] for r in chosen} - set(good))
    figures.dots(
        [r | {"label": f"{r['task']}, {r['token_max']} tokens", "low": r["ci_low"], "high": r["ci_high"]}
         for r in chosen],
        "label", "estimate", title="mean score, 95 % interval", output=IMAGES / "real_full_cache.svg", reference=0.5,
        head=("What the model can do with its full cache", "SmolLM2-135M-Instruct, nothing evicted"),
    )  # fmt: skip
    lines = [
        "## What can the model do at all?",
        "",
        f"Its mean score is 0.5 or more on {_listed(good)}, and lower on {_listed(weak)}, at the lengths that were "
        "run. Only a task that the model can do shows what eviction costs.",
        *picture("real_full_cache", "mean score of the full cache by task and length"),
        table(
            ["task", "tokens", "n", "mean score [95 %]"],
            [[r["task"], str(r["token_max"]), str(r["n"]), interval(r["estimate"], r["ci_low"], r["ci_high"], 2)]
             for r in chosen],
        ),
        "",
        "`one_hop`: questions of HotpotQA with the one paragraph that holds the answer among distractors (F1); "
        "`key_value`: copying a number from a list (F1)."
        + (" The others are this project's ruler tasks." if len({r["task"] for r in chosen}) > 2 else ""),
    ]  # fmt: skip
    return lines + ending(
        "one_hop",
        "lengths beyond 1,024 tokens, this project's ruler tasks (`real_lengths.yaml`), LongBench's tasks (almost all "
        "of the texts at hand are longer than 2,000 tokens); with so few examples, any difference that the intervals "
        "do not show.",
        "records",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no task"


# ----------------------------------------------------------------------------------------------------
# Study 2


def entropy() -> list[str]:
    """Entropy and recall."""
    found = kept("entropy", "entropy_recall").filter(pl.col("policy") != "oracle", granularity="global", memory="ideal")
    cells = {
        key: {row["statistic"]: row for row in rows.to_dicts()}
        for key, rows in found.group_by("task", "policy", "budget")
    }
    verdicts = found.filter(statistic="verdict_controlled")["outcome"].value_counts().sort("count", descending=True)
    counted = found.filter(statistic="pearson").group_by("task").agg(pl.col("n", "steps").max()).sort("task").to_dicts()
    texts, steps = (sum(row[name] for row in counted) for name in ("n", "steps"))
    keys = sorted(key for key in cells if key[2] == "r0.2")
    points = [
        {"cell": f"{TEXTS.get(task, task)}: {policy}", "entropy": f"{part} entropy", "recall": row["estimate"],
         "low": row["ci_low"], "high": row["ci_high"]}
        for task, policy, budget in keys for part in ("low", "medium", "high")
        if (row := cells[task, policy, budget].get(f"recall_{part}")) and row["estimate"] is not None
    ]  # fmt: skip
    figures.dots(
        points, "cell", "recall", group="entropy", title="mean recall, 95 % interval",
        head=("Recall of what a step needs, by its token's entropy", f"20 % held, n = {texts} texts, {steps} steps"),
        output=IMAGES / "real_entropy.svg", reference=0.2,
    )  # fmt: skip
    down = [key for key in keys if (t := cells[key].get("trend")) and t["ci_high"] is not None and t["ci_high"] < 0]
    counts = ", ".join(f"{row['count']} {row['outcome']}" for row in verdicts.to_dicts())
    confirmed = verdicts.filter(outcome="confirmed")["count"].sum()
    refused = verdicts.filter(outcome="not confirmed")["count"].sum()
    answer = (
        "No" if refused == verdicts["count"].sum() else "Yes" if confirmed == verdicts["count"].sum() else "In part"
    )
    if not confirmed and answer == "In part":
        answer = "Not shown"
    lines = [
        "## Does entropy tell that a needed entry is missing?",
        "",
        f"{answer}. The study expects a recall of at least 0.8 at low entropy and below 0.5 at high entropy. Over all "
        f"texts, policies and budgets this is: {counts} (controlled for step, length and kind of prompt). At 20 % "
        f"held, recall falls as entropy rises in {len(down)} of {len(keys)} cases (the interval of the trend is below "
        "0).",
        *picture("real_entropy", "mean recall by entropy bin and policy"),
        table(
            ["text", "policy", "recall, low entropy", "medium", "high", "Pearson r", "verdict"],
            [[TEXTS.get(key[0], key[0]), key[1],
              *(_statistic(cells[key], part) for part in ("recall_low", "recall_medium", "recall_high", "pearson")),
              (cells[key].get("verdict_controlled") or {}).get("outcome") or "n/a"] for key in keys],
        ),
        "",
        "20 % held; " + "; ".join(f"{TEXTS.get(r['task'], r['task'])}: n = {r['n']} texts, {r['steps']} steps"
                                  for r in counted)
        + ". The question and the continuation of a text belong to one text; global sets, ideal memory "
        "(docs/observation.md).",
    ]  # fmt: skip
    return lines + ending(
        "entropy",
        "sets for each head, an irreversible memory and the entropy gap, which were not run; longer texts; and with so "
        "few texts anything that is called undecided.",
        "records",
    )


def _statistic(found: dict[str, Row], name: str) -> str:
    row = found.get(name)
    if row is None or row["estimate"] is None:
        return "–"
    return interval(row["estimate"], row["ci_low"], row["ci_high"], 2)


# ----------------------------------------------------------------------------------------------------
# A peer


def agreement() -> list[str]:
    """Answers of kvpress and of this project."""
    facts = json.loads((KEPT / "agreement" / "agreement.json").read_text(encoding="utf-8"))
    rows, apart = [], []
    for policy, found in facts["policies"].items():
        equal = sum(one["equal"] for one in found)
        both, entries = (sum(one[key] for one in found) for key in ("kept_by_both", "entries"))
        rows.append([policy, f"{equal} of {len(found)}", f"{both} of {entries}"])
        apart += [
            f"{policy} on {one['example']}, at token {one['step'] + 1}: the logits of the two tokens are "
            f"{one['logits_apart']} apart, and {one['entries'] - one['kept_by_both']} of {one['entries']} kept entries "
            "are others"
            for one in found
            if not one["equal"]
        ]
    n = len(next(iter(facts["policies"].values())))
    total = sum(int(row[1].split()[0]) for row in rows)
    return [
        "## Does another implementation say the same?",
        "",
        f"Of {n * len(rows)} answers {total} are equal to the last token to those of kvpress {facts['kvpress']} at the "
        f"same K, float32, before the question; n = {n} prompts of {facts['prompts']}, {facts['steps']} tokens each, "
        f"{facts['budget']} of the entries kept.",
        "",
        table(["policy", "equal answers", "entries kept by both"], rows),
        "",
        f"Where they differ: {'; '.join(apart) or 'nowhere'}.",
        "",
        "What it does not show: more prompts, other tasks and budgets.",
        "",
        "Command: `make bench-peers`, then `python benchmarks/real_agreement.py "
        "results/real_small/data/niah_single/bin0.parquet --n 2`.",
    ]
