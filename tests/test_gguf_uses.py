"""Test a tiny GGUF file in everything that accepts a model: results agree with its weights."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kv_transition.data import gguf
from kv_transition.settings import parse

pytest.importorskip("gguf", reason="the package gguf is not installed (pip install '.[gguf]')")

from gguf_files import END, tiny_llama, write_gguf

DATA = {
    "dataset": {"name": "ruler", "tasks": ["niah_single"], "lengths": [384], "n_per_length": 2},
    "binning": {"n_bins": 1, "n_per_bin": 2},
    "kv": {"policies": {"full": {}, "snapkv": {}}, "budgets": [0.5]},
}
PROMPTS = ["the one thing on the tin", "in the north", "<|im_start|>user\nthe other<|im_end|>\n"]


@pytest.fixture
def name(tmp_path, monkeypatch):
    monkeypatch.setenv(gguf.MODELS_VARIABLE, str(tmp_path / "models"))
    return write_gguf(tmp_path / "tiny.gguf")


def test_the_model_in_the_file_is_the_one_that_was_written(name):
    from kv_transition.engines.local import LocalEngine

    engine, plain = LocalEngine.from_pretrained(name, device="cpu"), tiny_llama()
    assert engine.tokenizer.eos_token == END
    assert engine.tokenizer.convert_tokens_to_ids(["<|im_start|>", "Ġthe"]) == [1, engine.tokenizer.vocab_size - 3]
    for prompt in PROMPTS:
        ids = engine.tokenizer(prompt)["input_ids"]
        assert engine.tokenizer.decode(ids) == prompt
        with torch.inference_mode():
            expected = plain(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(engine.extend(None, ids).logits.flatten(), expected, rtol=0, atol=1e-5)


def test_quantized_weights_are_computed_as_what_they_stand_for(tmp_path, monkeypatch):
    """Check that a Q8_0 model computes with its dequantized weights."""

    import gguf as library

    from kv_transition.engines.local import LocalEngine

    monkeypatch.setenv(gguf.MODELS_VARIABLE, str(tmp_path / "models"))
    engine = LocalEngine.from_pretrained(write_gguf(tmp_path / "q8.gguf", quantized=True), device="cpu")
    plain, kind = tiny_llama(), library.GGMLQuantizationType.Q8_0
    for name, weight in plain.named_parameters():
        if ".layers." in name and weight.ndim == 2:
            stored = library.quants.quantize(weight.detach().numpy(), kind)
            weight.data.copy_(torch.from_numpy(library.quants.dequantize(stored, kind)))
    ids = engine.tokenizer(PROMPTS[0])["input_ids"]
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(engine.extend(None, ids).logits.flatten(), expected, rtol=0, atol=1e-5)
    assert gguf.origin(str(tmp_path / "q8.gguf"))["quantization"] == "Q8_0 (21 tensors), F32 (8)"


def test_plan_and_doctor_read_the_file(name, tmp_path):
    from kv_transition.doctor import examine
    from kv_transition.plan.model_size import model_size

    settings = parse({"experiment": "tiny", "model": {"name": name, "device": "cpu"}} | DATA)
    size = model_size(settings.model)
    assert (size.layers, size.kv_heads) == (3, 2)
    # embeddings are shared; the size omits the norms: 2 per layer and the final one
    norms = 7 * 64
    assert size.parameters + norms == sum(p.numel() for p in tiny_llama().parameters())
    assert gguf.header(name)["parameters"] == size.parameters + norms
    found = {finding.what: finding for finding in examine(settings)}
    assert (found["model"].state, found["tokenizer"].state) == ("ok", "ok")
    assert "F32" in found["model"].found


def test_the_cache_commands_take_it(name, tmp_path):
    from kv_transition.run.cache_commands import app

    (tmp_path / "text.txt").write_text("the one thing on the tin " * 20, encoding="utf-8")
    file = str(tmp_path / "cache.safetensors")
    model = ["--model", name, "--device", "cpu"]
    options = ["--text", str(tmp_path / "text.txt"), "--policy", "snapkv", "--budget", "0.5", "--output", file]
    made = CliRunner().invoke(app, ["create", *model, *options])
    assert made.exit_code == 0, made.output
    said = CliRunner().invoke(app, ["continue", file, *model, "--prompt", "in the", "--max-tokens", "4"])
    assert said.exit_code == 0, said.output
    assert said.stdout.strip("\n")


def test_it_is_served(name, monkeypatch):
    from fastapi.testclient import TestClient

    from kv_transition.serve import command

    apps = []
    monkeypatch.setattr(command, "_run", lambda app, listening, queue: (apps.append(app), listening.close()))
    options = {"revision": None, "dtype": "float32", "threads": None, "chunk_tokens": None, "max_length": None}
    command.serve(
        name, host="127.0.0.1", port=0, name="tiny", device="cpu", prefill_gb=0.1, statistics="none",
        policy_files=(), api_key_env=None, max_body_mb=1.0, queue=4, batch=1, **options,
    )  # fmt: skip
    client, plain = TestClient(apps[0]), tiny_llama()
    answer = client.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "the tin"}], "temperature": 0, "max_tokens": 4},
    )
    assert answer.status_code == 200, answer.text
    from kv_transition.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(name)
    ids = tokenizer("<|im_start|>user\nthe tin<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    # greedy decoding with plain forward passes
    said = []
    with torch.inference_mode():
        for _ in range(4):
            said.append(int(plain(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    expected = tokenizer.decode(said[: said.index(2)] if 2 in said else said, skip_special_tokens=True)
    assert answer.json()["choices"][0]["message"]["content"].strip() == expected.strip()


def test_quickstart_holds_on_it(name, tmp_path, capsys, monkeypatch):
    from kv_transition import quickstart

    small = {"corpus": "synthetic", "context_tokens": [128], "stride": 16, "books": 2, "windows_per_book": 1}
    monkeypatch.setattr(quickstart, "EXPERIMENT", quickstart.EXPERIMENT | {"perplexity": small})
    assert quickstart.main(["--output", str(tmp_path), "--model", name]) == 0
    said = capsys.readouterr().out
    assert "All four checks passed" in said
    assert "test instrument" not in said


@pytest.mark.slow
def test_a_whole_experiment_runs_on_it(name, tmp_path):
    """Check answers, observations, perplexity and conversations, up to a report that names the source of the
    weights."""
    from project import Project

    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    project.folder.joinpath("book.txt").write_text("the one thing on the tin in the north " * 40)
    conversation = [{"id": "1", "turns": [{"role": "user", "content": "the tin"}, {"role": "user", "content": "one"}]}]
    project.folder.joinpath("turns.json").write_text(json.dumps(conversation))
    config = {
        "experiment": "small",
        "model": {"name": name, "max_length": 512, "device": "cpu"},
        "kv": {"modes": ["after_prompt"], "policies": {"full": {}, "snapkv": {}}, "budgets": [0.5]},
        "decoding": {"max_tokens": 4},
        "observe": {"enabled": True, "max_tokens": 4, "budgets": [0.5]},
        "perplexity": {"path": "book.txt", "context_tokens": [64], "stride": 16, "windows_per_book": 2},
        "chat": {"source": "turns", "path": "turns.json", "max_tokens": 4},
        "statistics": {"resamples": 200},
    }
    project.configure(DATA | config)
    project.run()
    written = yaml.safe_load((project.results / "config.yaml").read_text())
    assert written["provenance"]["weights_from"]["quantization"].startswith("F32")
    report = (project.results / "report.md").read_text()
    assert "Weights from" in report
    assert "These are results of one model of 110K parameters." in report
    assert "not findings about language models" not in report
    for table in ("scores", "entropy_recall", "perplexity", "retention"):
        assert pl.read_parquet(project.results / f"{table}.parquet").height
    assert project.planned() == {}
