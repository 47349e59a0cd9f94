"""Test the whole pipeline from the data to the report."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from project import SMALL, Project

from kv_transition.provenance import read_metadata

# columns and statistics that depend on the clock
TIMES = {"load_s", "prefill_s", "compress_s", "ttft_s", "decode_s", "latency_s"}
TIMED_STATISTICS = ("latency", "ttft", "tokens_per_s", "speedup")


def without_times(project, name: str) -> list[dict]:
    rows = pq.read_table(project.results / f"{name}.parquet").to_pylist()
    rows = [row for row in rows if not str(row.get("statistic", "")).startswith(TIMED_STATISTICS)]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_the_report_and_its_figures_are_there(finished):
    html = (finished.results / "report.html").read_text()
    assert "<html" in html
    assert (finished.results / "report.md").stat().st_size > 500
    for figure in ("acc_vs_len", "std_vs_len", "failrate_vs_len", "broken_vs_len", "latency_vs_len", "failures"):
        assert (finished.results / "plots" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (finished.results / "plots" / f"{figure}.svg").read_text()[:300]


def test_every_answer_of_the_grid_is_scored_once(finished):
    rows = pq.read_table(finished.results / "scores.parquet").to_pylist()
    keys = [(r["policy"], r["budget"], r["bin"], r["example_id"], r["repeat"]) for r in rows]
    assert len(set(keys)) == len(keys)
    # four policies: the full cache once, the others at half, and again as its aliases at a budget of one
    assert len(rows) == (1 + 3 + 3) * 2 * 3
    assert {r["budget"] for r in rows if r["alias"]} == {"r1"}


def test_cells_say_where_they_come_from(finished):
    facts = read_metadata(finished.results / "cells/reader_qa/before_question/snap/r0.5/bin0.parquet")
    expected = {
        "model", "model_revision", "dataset", "revision", "split", "max_length", "dtype", "attention",
        "attention_statistics", "package_versions", "git_commit", "config_hash", "timestamp", "hyper_parameters",
    }  # fmt: skip
    assert expected <= set(facts)
    assert facts["dataset"] == "synthetic"
    assert json.loads(facts["hyper_parameters"]).items() >= {"window": 16, "kernel": 7, "pooling": "max"}.items()
    assert json.loads(facts["package_versions"])["torch"].startswith("2.")
    row = pq.read_table(finished.results / "cells/reader_qa/before_question/snap/r0.5/bin0.parquet").to_pylist()[0]
    context = len(pq.read_table(finished.results / "data/reader_qa/bin0.parquet")["context_ids"][0])
    assert row["budget_entries"] == (context + 1) // 2
    assert 0 < row["cache_bytes"] < row["full_bytes"]


def test_a_second_run_from_nothing_gives_the_same_tables(finished, tmp_path):
    again = Project(tmp_path)
    again.run()
    for name in ("scores", "bin_stats", "comparisons", "transition"):
        assert without_times(again, name) == without_times(finished, name), name
    for name in ("examples", "bin0", "bin1"):
        path = f"data/reader_qa/{name}.parquet"
        assert pq.read_table(again.results / path) == pq.read_table(finished.results / path)
    index = "prefill/reader_qa/bin0.json"
    assert (again.results / index).read_bytes() == (finished.results / index).read_bytes()


def test_an_experiment_file_is_whole(finished):
    """Check that policies and keys of the default configuration do not leak into an experiment."""
    resolved = yaml.safe_load((finished.results / "config.yaml").read_text())
    assert set(resolved["kv"]["policies"]) == set(SMALL["kv"]["policies"])
    assert resolved["dataset"]["lengths"] == [128, 256]
    assert resolved["report"]["title"] is None


def test_keys_can_be_set_without_editing_a_file(finished):
    done = finished.snakemake("--dry-run", "--config", "set=experiment=other binning.n_per_bin=2 model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "results/other/cells/reader_qa/before_question/full/r1/bin0.parquet" in done.stdout
    assert '"dtype": "bfloat16"' not in (finished.folder / "small.yaml").read_text()


def test_the_default_target_needs_no_flag(finished):
    done = finished.snakemake("--dry-run", "--quiet", "rules", configfile=None)
    assert done.returncode == 0, done.stderr
    assert "cell" in done.stdout


def test_on_a_gpu_each_cell_asks_for_one_of_the_model_named(finished):
    asked = ["--dry-run", "--config", "set=experiment=other model.device=cuda hardware.gpu_model=h100"]
    done = finished.snakemake(*asked)
    assert done.returncode == 0, done.stderr
    resources = [line for line in done.stdout.splitlines() if line.strip().startswith("resources:")]
    gpu_jobs = [line for line in resources if "gpu=1" in line]
    assert len(gpu_jobs) == 2 + 8  # prefills and cells
    assert all("gpu_model=h100" in line and "mem_mb=48000" in line and "runtime=60" in line for line in gpu_jobs)


def test_on_a_cpu_cells_ask_for_no_gpu(finished):
    done = finished.snakemake("--dry-run", "--config", "set=experiment=other")
    assert "gpu=0" in done.stdout
    assert "gpu=1" not in done.stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv": {"policies": {"snapkw": {}}}}, "kv.policies.snapkw: there is no policy 'snapkw'; choose one of"),
        ({"kv": {"budgets": [0]}}, "kv.budgets: 0.0 lies outside (0, 1]"),
        ({"model": {"name": "./nowhere"}}, "model.name: there is no folder ./nowhere"),
    ],
)
def test_a_bad_configuration_stops_before_any_job_with_one_sentence(finished, tmp_path, change, sentence):
    config = copy.deepcopy(SMALL)
    for section, values in change.items():
        config[section] |= values
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    done = finished.snakemake(configfile=str(tmp_path / "bad.yaml"))
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr
    assert "Execute" not in done.stdout + done.stderr
    # the command line prints only the sentence
    command = [sys.executable, "-m", "kv_transition", "all", "-c", str(tmp_path / "bad.yaml")]
    environment = os.environ | {"PYTHONPATH": str(finished.folder / "src")}
    cli = subprocess.run(command, cwd=finished.folder, env=environment, capture_output=True, text=True)
    assert cli.returncode == 2
    assert cli.stderr.startswith(sentence)
    assert len(cli.stderr.splitlines()) == 1


def test_the_command_line_runs_the_workflow(finished):
    command = [sys.executable, "-m", "kv_transition", "run", "-c", "small.yaml", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(finished.folder / "src")}
    done = subprocess.run(command, cwd=finished.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" in done.stdout + done.stderr


def test_real_longbench_records_through_a_real_pretrained_model(kvt_data, tmp_path):
    """Check the pipeline on real questions with a real (small) pretrained model, whose answers are poor."""
    project = Project(tmp_path)
    config = yaml.safe_load((project.folder / "config/experiments/longbench_smoke.yaml").read_text())
    config["dataset"]["path"] = str(kvt_data / "longbench")
    config["model"]["name"] = str(kvt_data / "stories260K-hf")
    config["experiment"] = "small"
    config["binning"] |= {"n_bins": 1, "n_per_bin": 4}
    config["kv"] |= {"modes": ["before_question"], "budgets": [1.0, 0.2]}
    project.configure(config)
    project.run()
    rows = pq.read_table(project.results / "scores.parquet").to_pylist()
    assert {row["task"] for row in rows} == {"hotpotqa", "musique"}
    assert all(row["error"] is None and row["prompt_tokens"] <= 512 for row in rows)
    full = {(r["task"], r["mode"], r["example_id"]): r for r in rows if r["policy"] == "full"}
    assert any(r["text"] != full[r["task"], r["mode"], r["example_id"]]["text"] for r in rows if r["policy"] != "full")
    manifest = json.loads((project.results / "data/hotpotqa/manifest.json").read_text())
    assert manifest["template"]["source"].endswith("dataset2prompt.json")
    assert "hotpotqa" in (project.results / "report.md").read_text()
