"""Test the exports: the SQLite database, the CSV tables, the summary and the card."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from simulated_scores import POLICIES, demo

from kv_transition.errors import UserError
from kv_transition.outputs.exports import write_exports
from kv_transition.outputs.sqlite import write_sqlite
from kv_transition.studies.grid.analysis.aggregate import write_aggregates
from kv_transition.studies.grid.analysis.transition import write_transition
from kv_transition.tables import BIN, EXAMPLES

STATISTICS = {"confidence": 0.95, "resamples": 200, "seed": 0}
NAMES = ("scores", "bin_stats", "comparisons", "transition")
# The blueprint's section db/, table by table.
BLUEPRINT = """
experiments(exp_group_id, created_at, config_yaml, git_hash, notes)
datasets(dataset_id, name, task, created_at)
examples(example_id, dataset_id, question, context, answers_json, meta_json, token_len)
bins(bin_id, dataset_id, bin_idx, token_min, token_max, n_examples)
manifest_entries(entry_id, dataset_id, example_id, bin_idx)
runs(run_id, exp_group_id, kv_policy, kv_budget, engine_name, base_url, model_name, created_at)
requests(request_id, run_id, entry_id, prompt_json, prompt_tokens, max_tokens, temperature)
responses(response_id, request_id, text, finish_reason, completion_tokens, raw_json)
telemetry(request_id, latency_s, ttfb_s, prefill_s, decode_s, peak_mem_mb, notes_json)
scores(request_id, em, f1, pred_norm, gold_norm)
failures(request_id, failure_type, message)
bin_stats(run_id, bin_idx, n, acc_mean, acc_ci_low, acc_ci_high, acc_std, fail_rate, lat_p50, lat_p95, mem_p95)
transition_summary(run_id, transition_bin_start, transition_bin_end, rationale_json)
"""


def rows_as_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=demo(n=1).schema)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Return a folder with all files from scores to the database, and the rows of the scores."""
    folder = tmp_path_factory.mktemp("exported")
    rows = [r | {"text": f"answer {i}", "prompt_sha256": r["example_id"]} for i, r in enumerate(demo(n=4).to_pylist())]
    rows += [r | {"policy": "tova", "alias": True} for r in rows if r["policy"] == "full"]
    paths = {name: str(folder / f"{name}.parquet") for name in NAMES}
    pq.write_table(rows_as_table(rows), paths["scores"])
    write_aggregates(paths["scores"], paths["bin_stats"], paths["comparisons"], STATISTICS)
    write_transition(paths["scores"], paths["transition"], STATISTICS)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "experiment": "demo", "model": {"name": "resources/tiny-reader", "device": "cpu"},
        "provenance": {"git_commit": "0123456789ab"}, "statistics": STATISTICS, "decoding": {"temperature": 0.0},
    }))  # fmt: skip
    _data(folder / "data/reader_qa", rows)
    write_exports(tables=paths, config=str(folder / "config.yaml"), csv_dir=str(folder / "tables"),
                  summary_json=str(folder / "summary.json"), card_json=str(folder / "card.json"))  # fmt: skip
    database(folder)
    return folder, rows


def database(folder: Path) -> None:
    write_sqlite(
        output=str(folder / "kv.sqlite"), config=str(folder / "config.yaml"),
        **{name: str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "transition")},
        manifests=[str(folder / "data/reader_qa/manifest.json")],
        extra={"comparisons": str(folder / "comparisons.parquet"), "absent": str(folder / "absent.parquet")},
    )  # fmt: skip


def _data(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    examples = {r["example_id"]: r for r in rows}
    common = {
        i: {"task": "reader_qa", "example_id": i, "question": r["question"], "answers": r["answers"], "all_classes": [],
            "meta": r["meta"], "token_len": r["token_len"], "prompt_len": r["token_len"], "bin": r["bin"]}
        for i, r in examples.items()
    }  # fmt: skip
    whole = [{k: v for k, v in c.items() if k != "bin"} | {"context": "A long story."} for c in common.values()]
    pq.write_table(pa.Table.from_pylist(whole, schema=EXAMPLES), folder / "examples.parquet")
    bins = []
    for b in range(5):
        chosen = [
            c | {"prompt_sha256": i, "context_text": "A long story.", "question_text": "?", "context_ids": [1],
                 "question_ids": [2], "max_new_tokens": 16}
            for i, c in common.items() if c["bin"] == b
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(chosen, schema=BIN), folder / f"bin{b}.parquet")
        lengths = [c["token_len"] for c in chosen]
        bins.append({"bin": b, "n": len(chosen), "token_min": min(lengths), "token_max": max(lengths)})
    (folder / "manifest.json").write_text(json.dumps({"task": "reader_qa", "dataset": "synthetic", "bins": bins}))


@pytest.fixture
def db(exported):
    connection = sqlite3.connect(exported[0] / "kv.sqlite")
    yield connection
    connection.close()


@pytest.mark.parametrize("line", BLUEPRINT.split("\n")[1:-1], ids=lambda line: line.partition("(")[0])
def test_tables_begin_with_the_blueprints_columns(db, line):
    table, columns = re.fullmatch(r"(\w+)\((.*)\)", line).groups()
    found = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    assert found[: len(columns.split(", "))] == columns.split(", ")


def test_references_hold_and_nothing_is_lost(db, exported):
    _, rows = exported
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    own = [r for r in rows if not r["alias"]]
    for table in ("requests", "responses", "telemetry", "scores"):
        assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (len(own),)
    failed = sum(r["failure"] is not None for r in own)
    assert db.execute("SELECT count(*) FROM failures").fetchone() == (failed,)
    assert db.execute("SELECT count(*) FROM runs WHERE alias_of IS NULL").fetchone() == (2 * (1 + 2 * len(POLICIES)),)


def test_a_query_gives_what_the_answers_say(db, exported):
    _, rows = exported
    query = """
        SELECT bin_idx, avg(score), count(failure_type), count(*) FROM answers
        WHERE mode = ? AND kv_policy = ? AND budget = ? GROUP BY bin_idx ORDER BY bin_idx"""
    for policy in POLICIES:
        found = db.execute(query, ("after_prompt", policy, "r0.2")).fetchall()
        for b, mean, failures, n in found:
            own = [
                r
                for r in rows
                if (r["mode"], r["policy"], r["budget"], r["bin"]) == ("after_prompt", policy, "r0.2", b)
            ]
            assert n == len(own) == 4
            assert mean == pytest.approx(sum(r["score"] for r in own) / n)
            assert failures == sum(r["failure"] is not None for r in own)
    texts = dict(db.execute("SELECT text, example_id FROM answers"))
    assert texts == {r["text"]: r["example_id"] for r in rows if not r["alias"]}


def test_statistics_and_zones_are_those_of_the_tables(db, exported):
    folder, rows = exported
    found = db.execute("""
        SELECT n, acc_mean, fail_rate, mem_p95 FROM bin_stats JOIN runs USING (run_id)
        WHERE mode = 'after_prompt' AND kv_policy = 'h2o' AND kv_budget = 0.2 AND bin_idx = 3""").fetchone()
    own = [r for r in rows if (r["mode"], r["policy"], r["budget"], r["bin"]) == ("after_prompt", "h2o", "r0.2", 3)]
    assert found[0] == 4
    assert found[1] == pytest.approx(sum(r["score"] for r in own) / 4)
    assert found[2] == pytest.approx(sum(r["failure"] is not None for r in own) / 4)
    assert min(r["peak_mem_mb"] for r in own) <= found[3] <= max(r["peak_mem_mb"] for r in own)
    kept = pl.read_parquet(folder / "transition.parquet").height
    in_runs = db.execute("SELECT count(*) FROM transition_summary").fetchone()[0]
    assert in_runs == kept
    alias = db.execute("SELECT count(*) FROM runs r JOIN runs f ON r.alias_of = f.run_id WHERE f.kv_policy = 'full'")
    assert alias.fetchone() == (2,)


def test_writing_twice_gives_the_same_content(exported, tmp_path):
    folder, _ = exported
    before = list(sqlite3.connect(folder / "kv.sqlite").iterdump())
    database(folder)
    assert list(sqlite3.connect(folder / "kv.sqlite").iterdump()) == before


def test_csv_tables_hold_every_row(exported):
    folder, rows = exported
    scores = pl.read_csv(folder / "tables/scores.csv")
    assert scores.height == len(rows)
    assert "raw" not in scores.columns
    assert scores["answers"][0] == "Org Name"
    assert {f.stem for f in (folder / "tables").glob("*.csv")} == set(NAMES)


def test_the_summary_is_the_verdict_by_definition(exported):
    folder, rows = exported
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["results"]) == 2 * 2 * len(POLICIES)
    entry = next(
        r for r in summary["results"] if (r["mode"], r["policy"], r["budget"]) == ("after_prompt", "tova", "r0.2")
    )
    own, full = (
        [r["score"] for r in rows if (r["mode"], r["policy"], r["budget"]) == ("after_prompt", *key)]
        for key in (("tova", "r0.2"), ("full", "r1"))
    )
    assert entry["score_kept"]["estimate"] == pytest.approx(sum(own) / sum(full))
    assert entry["score_kept"]["n"] == 20
    shares = [r["cache_bytes"] / r["full_bytes"] for r in rows if (r["policy"], r["budget"]) == ("tova", "r0.2")]
    assert entry["bytes_kept"]["estimate"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)


def test_the_card_has_the_ladders_rungs_that_were_run(exported):
    folder, _ = exported
    card = json.loads((folder / "card.json").read_text())
    assert card["ladder"] == [0.5, 0.25, 0.125, 0.0625]
    assert card["not_run"] == [0.25, 0.125, 0.0625]
    assert {row["budget"] for row in card["rows"]} == {1.0, 0.5}
    for row in card["rows"]:
        assert {"kv_bytes", "tokens_per_s", "ttft_s", "peak_mem_mb"} <= row.keys()
        assert row["kv_bytes"]["n"] == 4
    assert card["hardware"] == {"device": "cpu", "gpu": None}


def test_scores_without_their_examples_are_refused(exported, tmp_path):
    folder, rows = exported
    pq.write_table(rows_as_table([r | {"example_id": "nobody"} for r in rows]), tmp_path / "scores.parquet")
    arguments = {name: str(folder / f"{name}.parquet") for name in ("bin_stats", "transition")}
    with pytest.raises(UserError, match="example nobody of reader_qa is not in any manifest"):
        write_sqlite(
            output=str(tmp_path / "x.sqlite"), scores=str(tmp_path / "scores.parquet"), **arguments,
            config=str(folder / "config.yaml"), manifests=[str(folder / "data/reader_qa/manifest.json")],
        )  # fmt: skip
    assert not list(tmp_path.glob("*.sqlite"))
