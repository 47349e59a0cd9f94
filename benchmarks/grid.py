"""This project's pipeline compared with the evaluation of kvpress, on the same grid of policies and budgets.

    python benchmarks/grid.py [--quick] [--only 8x512/4096] [--without-kvpress] [--output FILE.json]

Both sides answer the same questions about the same documents with the same models, greedily and with one thread. This
project's side is the whole workflow: Snakemake, the start of every job, the full cache as reference, statistics and
report. It runs twice, from the documents on: with answers decoded one at a time, as kvpress decodes them, and with all
answers of a cell decoded together (``decoding.batch``), which the evaluation of kvpress cannot do. The side of kvpress
is a process per press and ratio with a prefill per example (benchmarks/peers/evaluate.py). Cost is the CPU time of all
processes, including the workers of this project's jobs. The floor is one process that does only the unavoidable work,
in both ways of decoding (benchmarks/floor.py); ``spent`` lists the costs of this project by kind.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import PEER, ROOT, SIZES, Cost, Size, run, snakemake, write_documents, write_experiment

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


def ours(folder: Path, model: Path, data: Path, grid: Grid, batch: int) -> tuple[Cost, Answers, dict[str, float]]:
    """Return the cost of the workflow in a new folder, its answers, and its cost by kind."""
    import pyarrow.parquet as pq

    folder.mkdir()
    experiment = write_experiment(
        folder,
        model,
        data,
        max_new_tokens=grid.max_new_tokens,
        n=grid.examples,
        batch=batch,
        policies={"full": {}} | POLICIES,
        budgets=list(grid.budgets),
    )
    # once before, so that it does not pay for files that were never read
    snakemake(folder, experiment, "--dry-run")

    cost = snakemake(folder, experiment)
    files = Paths(str(folder / "results"), "bench")
    spent = spending(Path(files.file("logs")), cost)
    answers = {}
    for policy in POLICIES:
        for budget in map(str, map(Budget.of_fraction, grid.budgets)):
            table = pq.read_table(files.cell(data.stem, "before_question", policy, budget, 0))
            rows = sorted(table.select(["example_id", "text"]).to_pylist(), key=lambda row: int(row["example_id"]))
            answers[policy, budget] = [row["text"] for row in rows]
    return cost, answers, spent


def spending(logs: Path, cost: Cost) -> dict[str, float]:
    """CPU seconds of our jobs in their workers, as their logs say; ``other``: Snakemake, what starts jobs, loading."""
    spent = dict.fromkeys(("prefill", "cell", "analysis"), 0.0)
    for log in logs.rglob("*.log"):
        rule = log.relative_to(logs).parts[0]
        for seconds in re.findall(r"^worker \d+: ([\d.]+) s", log.read_text(encoding="utf-8"), flags=re.MULTILINE):
            spent[rule if rule in spent else "analysis"] += float(seconds)
    return {name: round(value, 2) for name, value in (spent | {"other": cost.cpu_s - sum(spent.values())}).items()}


def floor(folder: Path, model: Path, data: Path, grid: Grid, batch: int) -> tuple[Cost, dict[str, float]]:
    """Return the cost of one process that reads each document once and decodes plainly with as many entries as each
    cell, and its cost by kind.
    """
    figures = folder / "floor.json"
    options = ["--model", model, "--data", data, "--policies", len(POLICIES), "--max-new-tokens", grid.max_new_tokens]
    options += ["--batch", batch, "--output", figures, "--budgets", *grid.budgets]
    cost = run([sys.executable, ROOT / "benchmarks" / "floor.py", *options], folder)
    return cost, json.loads(figures.read_text(encoding="utf-8"))


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
    """Return by policy how many answers are the same up to the last token."""
    found = {}
    for policy in POLICIES:
        pairs = [pair for key in a if key[0] == policy for pair in zip(a[key], b[key], strict=True)]
        found[policy] = f"{sum(x == y for x, y in pairs)}/{len(pairs)}"
    return found


def compare(grid: Grid, only: str | None, beside: bool) -> list[dict[str, Any]]:
    """Return two rows for each model and length, or of ``only`` one (``8x512/4096``): answers one at a time and
    together.

    beside: kvpress runs as well.
    """
    rows = []
    for size in grid.sizes:
        for length in grid.lengths:
            if only in (None, f"{size.name}/{length}"):
                with tempfile.TemporaryDirectory() as name:
                    rows += measured(Path(name), size, length, grid, beside)
    return rows


def measured(folder: Path, size: Size, length: int, grid: Grid, beside: bool) -> list[dict[str, Any]]:
    """Return the rows of one model and length."""
    model = size.save(folder / "model")
    data = write_documents(folder / "documents.jsonl", length, grid.examples)
    their_cost, their_answers = Cost(0, 0), None
    if beside:
        # once before, so that it does not pay for files that were never read
        run([PEER, "-c", "import kvpress, pandas"], folder)
        their_cost, their_answers = theirs(folder, model, data, grid, length)
    rows: list[dict[str, Any]] = []
    alone: Answers = {}
    for batch in (1, grid.examples):
        cost, answers, spent = ours(folder / f"batch{batch}", model, data, grid, batch)
        least, least_spent = floor(folder, model, data, grid, batch)
        alone = alone or answers
        row = {
            "model": size.name,
            "length": length,
            "examples": grid.examples,
            "cells": len(POLICIES) * len(grid.budgets),
            "batch": batch,
            "ours_cpu_s": round(cost.cpu_s, 2),
            "floor_cpu_s": round(least.cpu_s, 2),
            "over_floor": round(cost.cpu_s / least.cpu_s, 2),
            "spent": spent,
            "floor_spent": least_spent,
            "ours_wall_s": round(cost.wall_s, 2),
            "same_as_alone": agreement(answers, alone),
        }
        if their_answers is not None:
            row |= {
                "kvpress_cpu_s": round(their_cost.cpu_s, 2),
                "ratio": round(their_cost.cpu_s / cost.cpu_s, 2),
                "kvpress_wall_s": round(their_cost.wall_s, 2),
                "same_answers": agreement(answers, their_answers),
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--only", help="one model and length, as 8x512/4096")
    parser.add_argument("--without-kvpress", action="store_true", help="ours and the floor alone")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    beside = not arguments.without_kvpress
    figures = None
    if beside and not PEER.exists():
        print("kvpress is not installed beside us; run `make bench-peers`")
    else:
        rows = compare(QUICK if arguments.quick else Grid(), arguments.only, beside)
        figures = {"rows": rows, "act_each_step": ACT_EACH_STEP}
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
