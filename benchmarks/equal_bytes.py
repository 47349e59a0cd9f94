"""Rankings of policies at equal budgets and at equal bytes, on the embedded model.

    python benchmarks/equal_bytes.py --bins results/demo/data/reader_qa [--longest 2200] [--write docs/statistics.md]

Every policy at 50 and 20 % of the cache, compressed before the question: as it is (`kv.match: none`), the same answers
interpolated to equal bytes, and answers at equal bytes (`kv.match: mean`). The rows go to
benchmarks/results/equal_bytes.json, the table to the page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from document import put, table

from kv_transition.cache.store import PrefillStore
from kv_transition.data.tasks import get_task
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.catalog import hyper_parameters
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid import equal_bytes
from kv_transition.studies.grid import run as cell
from kv_transition.studies.grid.analysis.aggregate import bin_stats
from kv_transition.studies.grid.analysis.comparisons import comparisons
from kv_transition.studies.grid.results import Results
from kv_transition.studies.grid.score import grade
from kv_transition.studies.grid.tables import SCORES

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "equal_bytes.json"
POLICIES = ("h2o", "random", "snapkv", "streaming_llm", "tova")
BUDGETS = ("r0.5", "r0.2")
MODE = "before_question"


def answered(engine: LocalEngine, examples: list[dict], store: PrefillStore, match: str) -> list[dict]:
    """Return the scored rows of every policy and budget."""
    rows, task = [], get_task("synthetic", "reader_qa")
    for policy, budget in [("full", "r1"), *((p, b) for p in POLICIES for b in BUDGETS)]:
        spec = {
            "mode": MODE, "policy": policy, "kind": policy, "hyper_parameters": hyper_parameters(policy),
            "budget": budget, "match": match, "first_token": "compressed",
            "decoding": {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0},
        }  # fmt: skip
        by_id = {example["example_id"]: example for example in examples}
        for row in cell.rows(engine, examples, spec, store):
            own = by_id[row["example_id"]]
            worth = grade(row.get("text"), row.get("finish_reason"), row.get("error"), own, task)
            rows.append(row | worth | {"token_len": own["token_len"], "alias": False})
        print(match, policy, budget, flush=True)
    return rows


def results_of(rows: list[dict]) -> Results:
    scores = pa.Table.from_pylist([{name: row.get(name) for name in SCORES.names} for row in rows], schema=SCORES)
    stats, compared = (of(scores, Statistics()) for of in (bin_stats, comparisons))
    return Results(*(pl.from_arrow(part) for part in (scores, stats, compared)), pl.DataFrame())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bins", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--longest", type=int, default=10**9, help="tokens of the longest prompt")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    examples = [row for path in sorted(arguments.bins.glob("bin*.parquet"))
                for row in pq.read_table(path, partitioning=None).to_pylist()[: arguments.examples]
                if row["prompt_len"] <= arguments.longest]  # fmt: skip
    engine, found = LocalEngine.from_pretrained(str(ROOT / "resources/tiny-reader"), dtype="float32", device="cpu"), {}
    with TemporaryDirectory() as folder:
        for match in ("none", "mean"):
            rows = answered(engine, examples, PrefillStore(Path(folder)), match)
            found[match] = list(equal_bytes.rankings(results_of(rows), "reader_qa", MODE))
    lengths = [min(e["prompt_len"] for e in examples), max(e["prompt_len"] for e in examples)]
    facts = {"model": "resources/tiny-reader", "mode": MODE, "examples": len(examples), "prompt_tokens": lengths}
    OUTPUT.write_text(json.dumps(facts | {"rankings": found}, indent=1) + "\n", encoding="utf-8")
    text = page(found, facts)
    print(text)
    if arguments.write:
        put(arguments.write, "equal bytes", text)


def page(found: dict[str, list[dict]], facts: dict) -> str:
    """Return the table: a row for each policy and budget, in the order at equal bytes."""
    run = {(row["policy"], row["budget"]): row for row in found["mean"]}
    lines = []
    for row in found["none"]:
        own = run[row["policy"], row["budget"]]
        lines.append([
            row["policy"], f"{100 * float(row['budget'][1:]):g} %", f"{100 * row['share']:.1f} %",
            f"{row['rank']}: {told(row, 'kept')}", f"{row.get('rank_matched', '–')}: {told(row, 'matched')} at "
            f"{100 * row['at']:.1f} %", f"{100 * own['share']:.1f} %", f"{own['rank']}: {told(own, 'kept')}",
        ])  # fmt: skip
    head = [
        *("policy", "budget", "bytes held", "rank: score kept", "interpolated to equal bytes"),
        *("bytes held, match: mean", "rank: score kept, match: mean"),
    ]
    low, high = facts["prompt_tokens"]
    return f"{table(head, lines)}\n\nn = {facts['examples']}, prompts of {low} to {high} tokens."


def told(row: dict, name: str) -> str:
    if row[name] is None:
        return "–"
    ends = ("…" if row[name + end] is None else f"{100 * row[name + end]:.0f}" for end in ("_low", "_high"))
    return f"{100 * row[name]:.0f} % [{', '.join(ends)}]"


if __name__ == "__main__":
    main()
