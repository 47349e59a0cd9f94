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
        f"At the lengths that were run its mean score is 0.5 or more on {_listed(good)}, and lower on {_listed(weak)}. "
        "A score says what eviction costs only on a task that the model can do.",
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
    r = {key: {row["statistic"]: row for row in rows.to_dicts()} for key, rows in found.group_by("policy", "budget")}
    verdicts = found.filter(statistic="verdict_controlled")["outcome"].value_counts().sort("count", descending=True)
    n = int(found.filter(statistic="pearson")["n"].max())
    steps = int(found.filter(statistic="pearson")["steps"].max())
    keys = sorted((key for key in r if key[1] == "r0.2"), key=lambda key: key[0])
    points = []
    for policy, budget in keys:
        for part in ("low", "medium", "high"):
            row = r[policy, budget].get(f"recall_{part}")
            if row and row["estimate"] is not None:
                points.append({"policy": policy, "entropy": f"{part} entropy", "recall": row["estimate"],
                               "low": row["ci_low"], "high": row["ci_high"]})  # fmt: skip
    figures.dots(
        points, "policy", "recall", group="entropy", title="mean recall, 95 % interval",
        head=("Recall of what a step needs, by the entropy of its token", f"20 % held, n = {n} texts, {steps} steps"),
        output=IMAGES / "real_entropy.svg", reference=0.2,
    )  # fmt: skip
    down = [key[0] for key in keys if (t := r[key].get("trend")) and t["ci_high"] is not None and t["ci_high"] < 0]
    counts = ", ".join(f"{row['count']} {row['outcome']}" for row in verdicts.to_dicts())
    confirmed = verdicts.filter(outcome="confirmed")["count"].sum()
    refused = verdicts.filter(outcome="not confirmed")["count"].sum()
    answer = (
        "No" if refused == verdicts["count"].sum() else "Yes" if confirmed == verdicts["count"].sum() else "In part"
    )
    lines = [
        "## Does entropy tell that a needed entry is missing?",
        "",
        f"{answer}: that recall is at least 0.8 at low entropy and below 0.5 at high is, over all policies and "
        f"budgets: {counts} (step, length and kind of prompt controlled). At 20 % held recall falls from one entropy "
        f"bin to the next, the interval of the trend below 0, for {len(down)} of {len(keys)} policies.",
        *picture("real_entropy", "mean recall by entropy bin and policy"),
        table(
            ["policy", "recall, low entropy", "medium", "high", "Pearson r", "verdict"],
            [[policy, *(_statistic(r[policy, b], part) for part in ("recall_low", "recall_medium", "recall_high",
                                                                    "pearson")),
              (r[policy, b].get("verdict_controlled") or {}).get("outcome") or "n/a"] for policy, b in keys],
        ),
        "",
        f"20 % held, n = {n} texts (questions and continuations of the same paragraphs are of one text), "
        f"{steps} steps; "
        "global sets, ideal memory (docs/observation.md).",
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
