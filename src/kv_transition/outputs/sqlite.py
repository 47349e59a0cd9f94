"""Write kv_transition.sqlite: the whole experiment in one SQL database.

Tables and their first columns are those of the project's blueprint; columns after ``--`` in the schema are additions. A
run is a task, mode, policy and budget. docs/report.md explains the tables and shows queries.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs

from kv_transition.errors import UserError
from kv_transition.outputs.experiment import read_config
from kv_transition.parsing import read_json
from kv_transition.provenance import atomic_path, read_metadata
from kv_transition.stats import frames
from kv_transition.stats.examples import FULL

VERSION = 1
SCHEMA = """
CREATE TABLE experiments (
  exp_group_id TEXT PRIMARY KEY, created_at TEXT, config_yaml TEXT NOT NULL, git_hash TEXT, notes TEXT
);
CREATE TABLE datasets (dataset_id TEXT PRIMARY KEY, name TEXT NOT NULL, task TEXT NOT NULL, created_at TEXT);
CREATE TABLE examples (
  example_id TEXT NOT NULL, dataset_id TEXT NOT NULL REFERENCES datasets, question TEXT, context TEXT,
  answers_json TEXT, meta_json TEXT, token_len INTEGER, PRIMARY KEY (dataset_id, example_id)
);
CREATE TABLE bins (
  bin_id INTEGER PRIMARY KEY, dataset_id TEXT NOT NULL REFERENCES datasets, bin_idx INTEGER NOT NULL,
  token_min INTEGER, token_max INTEGER, n_examples INTEGER, UNIQUE (dataset_id, bin_idx)
);
CREATE TABLE prompts (prompt_sha256 TEXT PRIMARY KEY, context_text TEXT, question_text TEXT);
CREATE TABLE manifest_entries (
  entry_id INTEGER PRIMARY KEY, dataset_id TEXT NOT NULL, example_id TEXT NOT NULL, bin_idx INTEGER NOT NULL,
  -- additions
  prompt_sha256 TEXT REFERENCES prompts,
  FOREIGN KEY (dataset_id, example_id) REFERENCES examples, UNIQUE (dataset_id, example_id)
);
CREATE TABLE runs (
  run_id INTEGER PRIMARY KEY, exp_group_id TEXT NOT NULL REFERENCES experiments, kv_policy TEXT NOT NULL,
  kv_budget REAL, engine_name TEXT, base_url TEXT, model_name TEXT, created_at TEXT,
  -- additions: tokens kept if the budget is a number of tokens; the run whose answers this alias uses
  kv_budget_tokens INTEGER, budget TEXT NOT NULL, mode TEXT NOT NULL,
  dataset_id TEXT NOT NULL REFERENCES datasets, alias_of INTEGER REFERENCES runs,
  UNIQUE (dataset_id, mode, kv_policy, budget)
);
CREATE TABLE requests (
  request_id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES runs,
  entry_id INTEGER NOT NULL REFERENCES manifest_entries, prompt_json TEXT, prompt_tokens INTEGER, max_tokens INTEGER,
  temperature REAL,
  -- additions
  repeat INTEGER NOT NULL, cell_hash TEXT
);
CREATE TABLE responses (
  response_id INTEGER PRIMARY KEY, request_id INTEGER NOT NULL UNIQUE REFERENCES requests, text TEXT,
  finish_reason TEXT, completion_tokens INTEGER, raw_json TEXT
);
CREATE TABLE telemetry (
  request_id INTEGER PRIMARY KEY REFERENCES requests, latency_s REAL, ttfb_s REAL, prefill_s REAL, decode_s REAL,
  peak_mem_mb REAL, notes_json TEXT,
  -- additions
  compress_s REAL, cache_bytes INTEGER, full_bytes INTEGER, kept_final REAL
);
CREATE TABLE scores (
  request_id INTEGER PRIMARY KEY REFERENCES requests, em REAL, f1 REAL, pred_norm TEXT, gold_norm TEXT,
  -- additions: the task's own metric, and its name
  score REAL, metric TEXT, contains REAL
);
CREATE TABLE failures (
  request_id INTEGER PRIMARY KEY REFERENCES requests, failure_type TEXT NOT NULL, message TEXT
);
CREATE TABLE bin_stats (
  run_id INTEGER NOT NULL REFERENCES runs, bin_idx INTEGER NOT NULL, n INTEGER, acc_mean REAL, acc_ci_low REAL,
  acc_ci_high REAL, acc_std REAL, fail_rate REAL, lat_p50 REAL, lat_p95 REAL, mem_p95 REAL,
  PRIMARY KEY (run_id, bin_idx)
);
CREATE TABLE transition_summary (
  run_id INTEGER NOT NULL REFERENCES runs, transition_bin_start INTEGER, transition_bin_end INTEGER,
  rationale_json TEXT,
  -- additions
  detector TEXT NOT NULL, outcome TEXT, reason TEXT, PRIMARY KEY (run_id, detector)
);
CREATE INDEX requests_of_runs ON requests (run_id, entry_id);
CREATE VIEW answers AS
SELECT runs.dataset_id, runs.mode, runs.kv_policy, runs.budget, manifest_entries.bin_idx, examples.example_id,
       requests.repeat, examples.question, examples.answers_json, responses.text, scores.score, failures.failure_type,
       telemetry.latency_s, requests.request_id
FROM requests JOIN runs USING (run_id) JOIN manifest_entries USING (entry_id)
JOIN examples ON (examples.dataset_id, examples.example_id) = (manifest_entries.dataset_id, manifest_entries.example_id)
JOIN responses USING (request_id) JOIN scores USING (request_id) JOIN telemetry USING (request_id)
LEFT JOIN failures USING (request_id);
"""
RUN = ("task", "mode", "policy", "budget")


def write_sqlite(
    *,
    output: str,
    config: str,
    scores: str | None = None,
    bin_stats: str | None = None,
    transition: str | None = None,
    manifests: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write the database of one experiment; arguments are paths, ``extra`` further Parquet tables by name.

    Without tasks there are no scores, and the blueprint's tables except ``experiments`` stay empty. The
    ``examples.parquet`` and bin files of a task are in the folder of its manifest. ``extra`` tables are copied column
    by column under their own names. Raises UserError if the manifests and the scores do not match.
    """
    settings, metadata = read_config(config), read_metadata(scores) if scores else {}
    created = metadata.get("timestamp")
    with atomic_path(output) as temporary, closing(sqlite3.connect(temporary)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute(f"PRAGMA user_version = {VERSION}")
        with db:
            db.executescript(SCHEMA)
            group = settings.get("experiment", "experiment")
            notes = json.dumps(metadata, sort_keys=True)
            commit = (settings.get("provenance") or {}).get("git_commit")
            config_text = Path(config).read_text(encoding="utf-8")
            _insert(db, "experiments", [(group, created, config_text, commit, notes)])
            entries = {}
            for path in manifests:
                entries |= _data(db, Path(path), created)
            if scores:
                answers = frames.read_parquet(scores).with_columns(cs.float().fill_nan(None))
                runs = _runs(db, answers, settings, group, created)
                _answers(db, answers.filter(~pl.col("alias")), runs, entries, settings)
                _bin_stats(db, frames.read_parquet(bin_stats), answers, runs)
                _transitions(db, frames.read_parquet(transition), runs)
            for name, path in (extra or {}).items():
                if Path(path).is_file():
                    _copy(db, name, frames.read_parquet(path))
        db.execute("VACUUM")


def _insert(db: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]) -> None:
    rows = list(rows)
    if rows:
        db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)


def _data(db: sqlite3.Connection, manifest_path: Path, created: str | None) -> dict[tuple[str, str], tuple[int, int]]:
    """Insert all data of one task's examples; return entry_id and max_tokens by (task, example_id)."""
    try:
        manifest = read_json(manifest_path, "manifest")
        task, bins = manifest["task"], manifest["bins"]
        examples = frames.read_parquet(manifest_path.parent / "examples.parquet")
        chosen = [frames.read_parquet(manifest_path.parent / f"bin{b['bin']}.parquet") for b in bins]
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{manifest_path}: the task's examples cannot be read ({error}); run the prepare step again"
        ) from None
    _insert(db, "datasets", [(task, manifest.get("dataset", "unknown"), task, created)])
    _insert(db, "examples", (
        (r["example_id"], task, r["question"], r["context"], json.dumps(r["answers"], ensure_ascii=False), r["meta"],
         r["token_len"])
        for r in examples.unique("example_id", keep="first", maintain_order=True).iter_rows(named=True)
    ))  # fmt: skip
    _insert(db, "bins", (
        (None, task, b["bin"], b["token_min"], b["token_max"], b["n"]) for b in bins
    ))  # fmt: skip
    entries = {}
    for b, rows in zip(bins, chosen, strict=True):
        for r in rows.iter_rows(named=True):
            prompt = (r["prompt_sha256"], r["context_text"], r["question_text"])
            db.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)", prompt)
            entry = db.execute(
                "INSERT INTO manifest_entries VALUES (NULL, ?, ?, ?, ?)",
                (task, r["example_id"], b["bin"], r["prompt_sha256"]),
            )
            entries[task, r["example_id"]] = (entry.lastrowid, r["max_new_tokens"])
    return entries


def _runs(
    db: sqlite3.Connection, answers: pl.DataFrame, settings: Mapping[str, Any], group: str, created: str | None
) -> dict[tuple[str, ...], int]:
    """Insert the runs, originals before aliases; return run_id by (task, mode, policy, budget)."""
    frame = answers.group_by(RUN, maintain_order=True).agg(pl.first("engine", "base_url"), pl.col("alias").all())
    model, ids = (settings.get("model") or {}).get("name"), {}
    for row in frame.sort("alias", maintain_order=True).iter_rows(named=True):
        share = float(row["budget"][1:]) if row["budget"].startswith("r") else None
        tokens = int(row["budget"][1:]) if row["budget"].startswith("t") else None
        original = ids.get((row["task"], row["mode"], *FULL.values())) if row["alias"] else None
        added = db.execute(
            f"INSERT INTO runs VALUES (NULL{', ?' * 12})",
            (group, row["policy"], share, row["engine"], row["base_url"], model, created, tokens, row["budget"],
             row["mode"], row["task"], original),
        )  # fmt: skip
        ids[tuple(row[k] for k in RUN)] = added.lastrowid
    return ids


_NOTES = ("load_s", "kept_mean", "budget_entries", "protected", "batch_size", "co_running")


def _answers(
    db: sqlite3.Connection, answers: pl.DataFrame, runs: Mapping, entries: Mapping, settings: Mapping[str, Any]
) -> None:
    temperature = (settings.get("decoding") or {}).get("temperature")
    tables: dict[str, list[tuple]] = {t: [] for t in ("requests", "responses", "telemetry", "scores", "failures")}
    for number, r in enumerate(answers.iter_rows(named=True), start=1):
        entry = entries.get((r["task"], r["example_id"]))
        if entry is None:
            raise UserError(f"scores: example {r['example_id']} of {r['task']} is not in any manifest; score again")
        prompt = json.dumps({"prompt_sha256": r["prompt_sha256"]})
        tables["requests"].append(
            (number, runs[tuple(r[k] for k in RUN)], entry[0], prompt, r["prompt_tokens"], entry[1], temperature,
             r["repeat"], r["cell_hash"])
        )  # fmt: skip
        tables["responses"].append((number, number, r["text"], r["finish_reason"], r["completion_tokens"], r["raw"]))
        notes = json.dumps({name: r[name] for name in _NOTES})
        tables["telemetry"].append(
            (number, r["latency_s"], r["ttft_s"], r["prefill_s"], r["decode_s"], r["peak_mem_mb"], notes,
             r["compress_s"], r["cache_bytes"], r["full_bytes"], r["kept_final"])
        )  # fmt: skip
        tables["scores"].append(
            (number, r["em"], r["f1"], r["pred_norm"], r["gold_norm"], r["score"], r["metric"], r["contains"])
        )
        if r["failure"] is not None:
            tables["failures"].append((number, r["failure"], r["error"]))
    for table, rows in tables.items():
        _insert(db, table, rows)


_STATISTICS = ("score_mean", "score_std", "failure_rate", "latency_p50", "latency_p95")


def _bin_stats(db: sqlite3.Connection, stats: pl.DataFrame, answers: pl.DataFrame, runs: Mapping) -> None:
    """Insert the long table of statistics in the blueprint's wide form; mem_p95 covers answers timed alone."""
    alone = answers.filter((pl.col("batch_size") == 1) & ~pl.col("co_running"))
    memory = alone.group_by(*RUN, "bin").agg(p95=pl.col("peak_mem_mb").quantile(0.95, "linear"))
    mem_p95 = {row[:5]: row[5] for row in memory.iter_rows()}
    cells: dict[tuple, dict[str, dict]] = {}
    wanted = stats.drop_nulls("bin").filter(pl.col("statistic").is_in(_STATISTICS))
    for row in wanted.with_columns(cs.float().fill_nan(None)).iter_rows(named=True):
        cells.setdefault(tuple(row[k] for k in (*RUN, "bin")), {})[row["statistic"]] = row
    rows = []
    for (*run, bin), found in cells.items():
        mean = found["score_mean"]
        rest = (found[name]["estimate"] for name in _STATISTICS[1:])
        rows.append((runs[tuple(run)], bin, mean["n"], mean["estimate"], mean["ci_low"], mean["ci_high"], *rest,
                     mem_p95.get((*run, bin))))  # fmt: skip
    _insert(db, "bin_stats", rows)


def _transitions(db: sqlite3.Connection, transition: pl.DataFrame, runs: Mapping) -> None:
    rows = []
    for r in transition.iter_rows(named=True):
        key = tuple(r[k] for k in RUN)
        details = json.loads(r["details"] or "{}")
        # a zone is [onset, collapse); without a collapse it has no end
        end = r["collapse_bin"] - 1 if r["onset_bin"] is not None and r["collapse_bin"] is not None else None
        if "zone" in details:
            end = details["zone"][1]
        rationale = {k: v for k, v in r.items() if k not in (*RUN, "details")} | {"details": details}
        if key in runs:
            rows.append((runs[key], r["onset_bin"], end, json.dumps(rationale, sort_keys=True), r["detector"],
                         r["outcome"], r["reason"]))  # fmt: skip
    _insert(db, "transition_summary", rows)


_TYPES = {pl.Int64: "INTEGER", pl.Float64: "REAL", pl.Boolean: "INTEGER"}


def _copy(db: sqlite3.Connection, name: str, frame: pl.DataFrame) -> None:
    """Copy a Parquet table into the database; lists become JSON."""
    columns = ", ".join(f'"{column}" {_TYPES.get(kind.base_type(), "TEXT")}' for column, kind in frame.schema.items())
    db.execute(f'CREATE TABLE "{name}" ({columns})')
    _insert(db, f'"{name}"', (
        tuple(json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row) for row in frame.iter_rows()
    ))  # fmt: skip
