"""What the sections of docs/findings.md share: the kept tables, how a number is written, and how a section ends.

A section is written from the tables that were kept of experiments on a real language model. Every number is read from
benchmarks/results/real; every answer is chosen by what the intervals carry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kv_transition.stats.quotients import Quotient, quotient

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "real"
IMAGES = ROOT / "docs" / "images"
BOOKS, RECORDS, CONVERSATIONS = "perplexity.path=BOOKS", "dataset.path=DATA", "chat.path=DATA"
SETS = {
    "one_hop": RECORDS,
    "longbench": RECORDS,
    "entropy": RECORDS,
    "entropy_heads": RECORDS,
    "recall": BOOKS,
    "merging": BOOKS,
    "merging_long": BOOKS,
    "ablation": BOOKS,
    "sinks": BOOKS,
    "sinks_long": f"experiment=real_sinks_long perplexity.context_tokens=[4096,7000] perplexity.stride=128 {BOOKS}",
    "rules": CONVERSATIONS,
    "memory": CONVERSATIONS,
    "chat": CONVERSATIONS,
    "chat_refinement": "experiment=real_chat_refinement chat.source=mt_eval chat.max_turns=4 chat.n=16 "
    f"chat.max_tokens=48 {CONVERSATIONS}",
}
"""what a kept run's command sets: the place of the data, and what its experiment file does not say"""
FILES = {"chat_refinement": "real_chat", "sinks_long": "real_sinks"}
"""experiment file of a kept run that has another name than its experiment"""
Row = dict[str, Any]


def kept(name: str, what: str) -> pl.DataFrame:
    return pl.read_parquet(KEPT / name / f"{what}.parquet")


def run(name: str) -> Row:
    return json.loads((KEPT / name / "run.json").read_text(encoding="utf-8"))


def interval(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ending(not_shown: str, *names: str) -> list[str]:
    """What the study does not show and, for each of its runs, the command, what it took and its commit.

    A run is partial if its tables were made before all jobs of its experiment had run.
    """
    lines = ["", f"What it does not show: {not_shown}"]
    for name in names:
        facts = run(name)
        file = FILES.get(name, facts["experiment"])
        assignment = f" --config set='{SETS[name]}'" if name in SETS else ""
        lines += [
            "",
            f"Command: `snakemake --cores 1 --configfile config/experiments/{file}.yaml{assignment}`; "
            f"{facts['processor_s'] / 60:.0f} minutes of processor time{', a part of its jobs' * facts['partial']}. "
            f"{computed_by(facts)}",
        ]
    return lines


def computed_by(facts: Row) -> str:
    """Return the commit and the versions of a run."""
    versions = facts["package_versions"]
    return f"Commit {facts['git_commit']}, torch {versions['torch']}, transformers {versions['transformers']}."


def mean(values: pl.Series, clusters: pl.Series) -> Quotient:
    """Return the mean of the values and its 95 % interval over clusters."""
    return quotient(values.cast(float).to_numpy(), np.ones(len(values)), clusters.to_numpy(), 0.95)


def there(*names: str) -> list[str]:
    """Return those of the names of which a run is kept."""
    return [name for name in names if (KEPT / name).is_dir()]


def listed(items: list[str]) -> str:
    """Return items as ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def picture(name: str, text: str) -> list[str]:
    return ["", f"![{text}](images/{name}.svg)", ""]
