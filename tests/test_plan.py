"""Test the plan: numbers of jobs, estimates of size and time, and finished jobs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from project import ROOT, SMALL

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.cache.state import WINDOW
from kv_transition.plan import model_size as model_size_module
from kv_transition.plan import speed, table, work
from kv_transition.plan.model_size import model_size, read_size
from kv_transition.sections import Model

TINY = str(ROOT / "resources/tiny-reader")


def parsed(tmp_path, **sections):
    config = copy.deepcopy(SMALL) | {"output": {"dir": str(tmp_path / "results")}} | sections
    config["model"] = config["model"] | {"name": TINY}
    return settings_module.parse({key: value for key, value in config.items() if value is not None})


def item(made: work.Work, name: str) -> work.Item:
    return next(found for found in made.items if found.name == name)


# ---- model size

QWEN2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
LLAMA3_1_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(("config", "billions"), [(QWEN2_5_7B, 7.62), (LLAMA3_1_8B, 8.03)])
def test_parameters_are_those_that_the_models_cards_state(config, billions):
    assert read_size(config).parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_cache_of_llama_3_1_8b_takes_128_kib_a_token_in_16_bit():
    assert read_size(LLAMA3_1_8B).cache_bytes(1, "bfloat16") == 128 * 1024


def test_the_embedded_models_weights_are_counted_right():
    with (Path(TINY) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    true = sum(int.__mul__(*shape) if len(shape) == 2 else shape[0] for shape in shapes)
    # norms and biases are not counted
    assert model_size(Model(name=TINY)).parameters == pytest.approx(true, rel=0.01)


def test_a_prefill_keeps_as_many_queries_as_the_plan_says():
    assert model_size_module.RECENT == WINDOW


def test_weights_in_4_bit_take_a_little_more_than_half_a_byte():
    quantized = Model.model_validate({"name": TINY, "quantization": {}})
    size = read_size(QWEN2_5_7B)
    assert size.weight_bytes(quantized) / size.parameters == pytest.approx(0.5, rel=0.15)


def test_a_model_that_is_not_here_has_no_size(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_size(Model(name="nobody/nothing-at-all")) is None
    assert read_size({"model_type": "mamba"}) is None


# ---- numbers of jobs


def test_every_job_of_the_grid_is_counted(tmp_path):
    made = work.work(parsed(tmp_path))
    # one task, one mode, full once and three policies at one budget below 1, two bins of three examples
    assert len(item(made, "prefills").jobs) == 2
    assert len(item(made, "cells").jobs) == (1 + 3) * 2
    assert sum(job.sequences for job in item(made, "cells").jobs) == (1 + 3) * 2 * 3
    assert len(made.documents) == 6
    assert not item(made, "cells").state["done"]


def test_lengths_come_from_the_bins_once_they_are_there_and_from_the_configuration_before(tmp_path):
    made = work.work(parsed(tmp_path))
    assert sorted(made.documents) == [128] * 3 + [256] * 3
    assert any("not prepared yet" in note for note in made.notes)


def test_adaptive_allocation_is_counted_at_most(tmp_path):
    plain = parsed(tmp_path)
    adaptive = parsed(tmp_path, adaptive={"enabled": True, "start": 1, "step": 1, "cap": 3})
    cells = item(work.work(adaptive), "cells")
    assert len(cells.jobs) == 3 * len(item(work.work(plain), "cells").jobs)
    # the same answers, in more files
    assert sum(job.sequences for job in cells.jobs) == sum(
        job.sequences for job in item(work.work(plain), "cells").jobs
    )
    assert any("this is the maximum" in note for note in work.work(adaptive).notes)


def test_an_endpoint_needs_no_prefill_and_no_hours_of_ours(tmp_path):
    engine = {"kind": "openai", "base_url": "http://127.0.0.1:8000/v1", "serves": "kv_transition"}
    settings = parsed(tmp_path, engine=engine)
    made = work.work(settings)
    plan = work.summary(made, speed.assumed(settings, model_size(settings.model)), model_size(settings.model))
    assert [found.name for found in made.items] == ["cells"]
    assert made.documents == ()
    assert plan["hours_left"] is None
    assert "that of the endpoint" in " ".join(table.lines(settings, plan))


def test_texts_and_conversations_are_counted(tmp_path):
    perplexity = {"corpus": "synthetic", "books": 3, "windows_per_book": 2, "context_tokens": [64, 128], "stride": 32}
    chat = {"source": "generated", "n": 5, "max_turns": 4, "max_tokens": 8}
    made = work.work(parsed(tmp_path, dataset=None, perplexity=perplexity, chat=chat))
    texts, talks = item(made, "perplexity"), item(made, "conversations")
    assert len(texts.jobs) == 4 * 2
    assert {job.sequences for job in texts.jobs} == {6}
    # the context is read once, and the stride is scored after it
    assert {job.read_tokens for job in texts.jobs} == {6 * (64 + 32), 6 * (128 + 32)}
    assert len(talks.jobs) == 4
    assert {job.answer_tokens for job in talks.jobs} == {5 * 4 * 8}


# ---- speed


def test_what_nobody_measured_is_called_assumed(tmp_path):
    settings = parsed(tmp_path, model=SMALL["model"] | {"device": "cuda"}, hardware={"gpu_model": "h100"})
    known = speed.speed(settings, read_size(LLAMA3_1_8B))
    assert not known.measured
    assert known.source.startswith("assumed, not measured")
    # 2 operations per parameter and token, at 40 % of 989 TFLOP/s
    assert known.read_s == pytest.approx(2 * 8.03e9 / (0.4 * 989e12), rel=0.01)


def test_nothing_is_invented_where_not_even_the_size_is_known(tmp_path):
    settings = parsed(tmp_path)
    plan = work.summary(work.work(settings), speed.speed(settings, None), None)
    assert plan["hours_left"] is None
    assert plan["items"]["cells"]["seconds_left"] is None
    assert "unknown" in " ".join(table.lines(settings, plan))


def test_a_job_takes_its_start_its_reading_and_its_answers(tmp_path):
    settings = parsed(tmp_path)
    known = speed.Speed(start_s=10, read_s=0.5, answer_s=2, source="here", measured=True)
    made = work.work(settings, {"reader_qa": 3})
    prefills, cells = item(made, "prefills"), item(made, "cells")
    assert prefills.seconds(list(prefills.jobs), known, loads=2) == 2 * 10 + 3 * (128 + 256) * 0.5
    assert cells.seconds(list(cells.jobs), known, loads=0) == 8 * 3 * 3 * 2


@pytest.mark.parametrize(("worker", "loads"), [("auto", 1), ("never", 2 + 8)])
def test_the_model_is_loaded_once_where_a_worker_holds_it(tmp_path, monkeypatch, worker, loads):
    """Check that the plan counts one load of the model with a worker, and one load per job without."""
    monkeypatch.setenv("KVT_WORKER", worker)
    settings = parsed(tmp_path)
    nothing_but_loading = speed.Speed(start_s=10, read_s=0, answer_s=0, source="here", measured=True)
    plan = work.summary(work.work(settings), nothing_but_loading, None)
    assert sum(item["seconds"] for item in plan["items"].values()) == 10 * loads


def test_a_trial_loads_the_model_and_times_it(tmp_path):
    known = speed.of_trial(parsed(tmp_path))
    assert known.measured
    assert 0 < known.read_s < known.answer_s < 1  # reading a token with others is cheaper than one alone
    assert known.start_s > 0


@pytest.mark.parametrize(("n", "text"), [(999, "999 B"), (2_048, "2.0 kB"), (350e6, "350 MB"), (4.2e12, "4.2 TB")])
def test_sizes_are_said_in_powers_of_a_thousand(n, text):
    assert table.size(n) == text


# ---- finished jobs


@pytest.fixture
def there(finished, tmp_path, monkeypatch):
    """Return a function that parses settings for a copy of the finished experiment's results."""
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    monkeypatch.chdir(finished.folder)
    config = copy.deepcopy(SMALL) | {"output": {"dir": str(tmp_path / "results")}}
    return lambda **sections: settings_module.parse(config | sections)


def test_a_finished_experiment_is_all_there(there):
    made = work.work(there())
    assert {found.name: len(found.left) for found in made.items} == {"prefills": 0, "cells": 0}
    assert work.outdated(there()) == []


def test_what_a_change_outdates_is_named_and_what_is_missing_is_left(there, tmp_path):
    policies = SMALL["kv"]["policies"] | {"snap": {"kind": "snapkv", "window": 8}}
    changed = there(kv=SMALL["kv"] | {"policies": policies})
    (tmp_path / "results/small/cells/reader_qa/before_question/h2o/r0.5/bin1.parquet").unlink()
    cells = item(work.work(changed), "cells")
    assert {name: len(jobs) for name, jobs in cells.state.items()} == {"done": 5, "outdated": 2, "missing": 1}
    assert all("/snap/" in path for path in work.outdated(changed))


def test_speed_is_that_of_the_answers_that_are_there(there, tmp_path):
    rows = [
        row for path in (tmp_path / "results/small/cells").rglob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    known = speed.of_results(there())
    assert known.measured
    assert known.read_s == pytest.approx(sum(r["prefill_s"] for r in rows) / sum(r["prompt_tokens"] for r in rows))
    tokens = [row["completion_tokens"] for row in rows]
    assert known.answer_tokens["reader_qa"] == pytest.approx(max(1, sum(tokens) / len(tokens)))
    assert speed.of_results(there(model=SMALL["model"] | {"device": "cuda"})) is None  # no measurement on GPUs


def test_the_store_takes_what_the_plan_says(there, tmp_path):
    # `auto` may have stored only some prefills if reading them back is slow
    stored = {path.stem: path.stat().st_size for path in (tmp_path / "results/prefill").rglob("*.safetensors")}
    settings = there()
    statistics, size = specs.statistics(settings), model_size(settings.model)
    bins = [
        pq.read_table(path).to_pylist() for path in (tmp_path / "results/small/data/reader_qa").glob("bin*.parquet")
    ]
    lengths = {row["prompt_sha256"]: row["prompt_len"] for rows in bins for row in rows}
    assert stored
    for name, true in stored.items():
        assert size.stored_bytes(lengths[name], "float32", statistics) == pytest.approx(true, rel=0.05)
    everything = sum(size.stored_bytes(tokens, "float32", statistics) for tokens in lengths.values())
    assert work.work(settings).store_bytes(size) == everything


def test_a_cache_takes_what_the_plan_says(there, tmp_path):
    row = pq.read_table(tmp_path / "results/small/cells/reader_qa/before_question/full/r1/bin1.parquet").to_pylist()[0]
    tokens = row["prompt_tokens"] + row["completion_tokens"]
    assert model_size(there().model).cache_bytes(tokens, "float32") == pytest.approx(row["full_bytes"], rel=0.02)


def test_the_command_prints_a_screen_or_json(finished):
    environment = os.environ | {"PYTHONPATH": str(finished.folder / "src"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "kv_transition", "plan", "-c", "small.yaml"]
    options = {"cwd": finished.folder, "env": environment, "capture_output": True, "text": True, "check": True}
    screen = subprocess.run(command, **options).stdout
    assert "cells" in screen
    assert "measured: 24 answers" in screen
    plan = json.loads(subprocess.run([*command, "--json"], **options).stdout)
    assert plan["items"]["cells"] == plan["items"]["cells"] | {"jobs": 8, "done": 8, "outdated": 0, "units": 24}
    assert plan["hours_left"] == 0


def test_every_experiment_of_the_project_can_be_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("config").rglob("*.yaml")):
        if yaml.safe_load(path.read_text()).get("kv") is None:
            continue
        settings = settings_module.load(path)
        try:
            specs.check(settings)
        except Exception:  # its data or its model are not available
            continue
        assert work.summary(work.work(settings), None, None)["items"]
