"""Copy the small tables of a finished experiment into the repository, so that docs/findings.md can be written from
them.

    python benchmarks/keep_real.py RESULTS/EXPERIMENT[/partial] [NAME]

Copies the tables of estimates with their metadata to benchmarks/results/real/NAME (default: the experiment's name), and
the columns of single answers and windows from which the estimates are computed. run.json has the commit, the versions
and weights, the processor time in the jobs' logs, and whether the tables are those of a partial report, made before all
jobs had run. A partial report has no such facts, so the experiment's own config.yaml must exist
(`snakemake RESULTS/EXPERIMENT/config.yaml`).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

KEPT = Path(__file__).parent / "results" / "real"
TABLES = ("bin_stats", "transition", "entropy_recall", "perplexity", "perplexity_pairs", "retention")
SCORES = ["task", "mode", "policy", "budget", "bin", "example_id", "score", "failure", "alias"]
RECALLS = ("steps", "triggers")
WINDOWS = ["corpus", "policy", "budget", "bin", "book_id", "window", "context_tokens", "nll_sum", "n_tokens",
           "bytes_before", "bytes_after", "kept_mean", "cache_bytes", "full_bytes", *RECALLS]  # fmt: skip
VERDICTS = ["conversation_id", "turn", "policy", "budget", "check_id", "asks", "standing", "since", "age", "rule",
            "chance", "chat_set"]  # fmt: skip
TURNS = ["chat_set", "conversation_id", "turn", "policy", "budget", "completion_tokens", "entries_after", "repetition",
         "answer_nll"]  # fmt: skip
OBSERVED = ["example_id", "prompt_kind", "policy", "budget", "granularity", "memory", "step", "entropy", "n", "recall",
            "entropy_gap", "entropy_gap_gold"]  # fmt: skip
PROCESSOR_TIME = re.compile(r": ([\d.]+) s of processor time")


def placeless(table: pa.Table) -> pa.Table:
    """Return the table with a local corpus or data set named by its last part: the path is of one machine."""
    metadata = dict(table.schema.metadata or {})
    if metadata.get(b"source", b"").startswith(b"/"):
        metadata[b"source"] = metadata[b"source"].rpartition(b"/")[2]
    return table.replace_schema_metadata(metadata)


def reduced(files: list[Path], columns: list[str]) -> pa.Table:
    """Return the rows of all files with those of ``columns`` that they have, and the first file's metadata."""
    parts = [with_recalls(pq.read_table(file)) for file in files]
    there = [column for column in columns if column in parts[0].column_names]
    metadata = parts[0].schema.metadata
    return pa.concat_tables([part.select(there).replace_schema_metadata(metadata) for part in parts])


def with_recalls(table: pa.Table) -> pa.Table:
    """Return the table with the numbers of steps and recalls that a policy recorded, null if it recorded none."""
    if "raw" not in table.column_names:
        return table
    said = [json.loads(raw or "{}") for raw in table["raw"].to_pylist()]
    for name in RECALLS:
        table = table.append_column(name, pa.array([one.get(name) for one in said], pa.int64()))
    return table


def processor_seconds(results: Path) -> float:
    """Return the sum of the seconds in the jobs' logs."""
    logs = sorted(results.joinpath("logs").rglob("*.log"))
    return sum(float(s) for log in logs for s in PROCESSOR_TIME.findall(log.read_text(encoding="utf-8")))


def keep(results: Path, name: str) -> None:
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if (results / f"{table}.parquet").is_file():
            pq.write_table(placeless(pq.read_table(results / f"{table}.parquet")), folder / f"{table}.parquet")
    rows = {
        "answers": ([results / "scores.parquet"], SCORES),
        "windows": (sorted(results.glob("perplexity/*/*/*/bin*.parquet")), WINDOWS),
        "verdicts": ([results / "chat_verdicts.parquet"], VERDICTS),
        "turns": (sorted(results.glob("chat/*/*/*.parquet")), TURNS),
        "observations": (sorted(results.glob("observations/*/bin*.parquet")), OBSERVED),
    }
    for table, (files, columns) in rows.items():
        files = [file for file in files if file.is_file() and not file.name.endswith(".layers.parquet")]
        if files:
            pq.write_table(placeless(reduced(files, columns)), folder / f"{table}.parquet", compression="zstd")
    whole = results.parent if results.name == "partial" else results
    resolved = yaml.safe_load((whole / "config.yaml").read_text(encoding="utf-8"))
    facts = resolved.pop("provenance") | {
        "experiment": resolved["experiment"],
        "processor_s": round(processor_seconds(whole)),
        "partial": whole != results,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("name", nargs="?")
    given = parser.parse_args()
    keep(given.results, given.name or given.results.name)
