"""Our pipeline against kvpress' evaluation flow, on the same grid of policies and budgets.

    python benchmarks/grid.py [--quick] [--output FILE.json]

Both sides answer the same questions about the same documents with the same models, greedily and with one thread. Ours
is the whole workflow: Snakemake, every job's start, the full cache as reference, statistics and report. kvpress' is a
process per press and ratio with a prefill per example (benchmarks/peers/evaluate.py). Cost is CPU time of all
processes.
"""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import PEER, ROOT, SIZES, Cost, Size, run, snakemake, write_documents, write_experiment, write_figures

from kv_transition.budget import Budget
from kv_transition.paths import Paths

POLICIES: dict[str, dict[str, Any]] = {
    "random": {},
    "streaming_llm": {},
    "snapkv": {"window": 64, "kernel": 5, "pooling": "mean"},  # as kvpress has it
    "tova": {},
    "knorm": {},
}
PRESSES = {
    "random": "RandomPress",
    "streaming_llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
}
ACT_EACH_STEP = ("streaming_llm", "tova")
"""ours also hold the budget while decoding, which presses do not: answers may differ after the first tokens"""


@dataclass(frozen=True)
class Grid:
    sizes: tuple[Size, ...] = SIZES
    lengths: tuple[int, ...] = (2048, 4096)
    examples: int = 10
    budgets: tuple[float, ...] = (0.5, 0.2, 0.1)
    max_new_tokens: int = 32


QUICK = Grid(sizes=SIZES[:1], lengths=(512,), examples=2, budgets=(0.5, 0.2), max_new_tokens=4)

Answers = dict[tuple[str, str], list[str]]
"""(policy, budget): an answer for each document"""


def ours(folder: Path, experiment: Path, data: Path, grid: Grid) -> tuple[Cost, Answers]:
    import pyarrow.parquet as pq

    cost = snakemake(folder, experiment)
    files = Paths(str(folder / "results"), "bench")
    answers = {}
    for policy in POLICIES:
        for budget in map(str, map(Budget.of_fraction, grid.budgets)):
            table = pq.read_table(files.cell(data.stem, "before_question", policy, budget, 0))
            rows = sorted(table.select(["example_id", "text"]).to_pylist(), key=lambda row: int(row["example_id"]))
            answers[policy, budget] = [row["text"] for row in rows]
    return cost, answers


def theirs(folder: Path, model: Path, data: Path, grid: Grid, length: int) -> tuple[Cost, Answers]:
    cost, answers = Cost(0, 0), {}
    for policy, press in PRESSES.items():
        for budget in map(Budget.of_fraction, grid.budgets):
            output = folder / f"{policy}-{budget}.csv"
            # half an entry more than K, so that its rounding down of n * (1 - ratio) gives K
            ratio = 1 - (budget.kept(length) + 0.5) / length
            command = [PEER, ROOT / "benchmarks" / "peers" / "evaluate.py", "--model", model, "--data", data]
            options = ["--press", press, "--ratio", ratio, "--max-new-tokens", grid.max_new_tokens, "--output", output]
            cost += run([*command, *options], folder)
            with output.open(newline="") as file:
                rows = sorted(csv.DictReader(file), key=lambda row: int(row["id"]))
            answers[policy, str(budget)] = [row["predicted_answer"] for row in rows]
    return cost, answers


def agreement(a: Answers, b: Answers) -> dict[str, str]:
    """By policy, how many answers are the same to the last token."""
    found = {}
    for policy in POLICIES:
        pairs = [pair for key in a if key[0] == policy for pair in zip(a[key], b[key], strict=True)]
        found[policy] = f"{sum(x == y for x, y in pairs)}/{len(pairs)}"
    return found


def compare(grid: Grid) -> list[dict[str, Any]]:
    """A row for each model and length."""
    rows = []
    for size in grid.sizes:
        for length in grid.lengths:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                model = size.save(folder / "model")
                data = write_documents(folder / "documents.jsonl", length, grid.examples)
                experiment = write_experiment(
                    folder,
                    model,
                    data,
                    max_new_tokens=grid.max_new_tokens,
                    n=grid.examples,
                    policies={"full": {}} | POLICIES,
                    budgets=list(grid.budgets),
                )
                # both once before, so that neither pays for files that were never read
                snakemake(folder, experiment, "--dry-run")
                run([PEER, "-c", "import kvpress, pandas"], folder)
                our_cost, our_answers = ours(folder, experiment, data, grid)
                their_cost, their_answers = theirs(folder, model, data, grid, length)
            rows.append(
                {
                    "model": size.name,
                    "length": length,
                    "examples": grid.examples,
                    "cells": len(POLICIES) * len(grid.budgets),
                    "ours_cpu_s": round(our_cost.cpu_s, 2),
                    "kvpress_cpu_s": round(their_cost.cpu_s, 2),
                    "ratio": round(their_cost.cpu_s / our_cost.cpu_s, 2),
                    "ours_wall_s": round(our_cost.wall_s, 2),
                    "kvpress_wall_s": round(their_cost.wall_s, 2),
                    "same_answers": agreement(our_answers, their_answers),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(quick: bool) -> dict[str, Any] | None:
    """None where kvpress is not installed."""
    if not PEER.exists():
        print("kvpress is not installed beside us; run `make bench-peers`")
        return None
    return {"rows": compare(QUICK if quick else Grid()), "act_each_step": ACT_EACH_STEP}


if __name__ == "__main__":
    write_figures(__doc__, measure)
