"""A tiny GGUF file through everything that takes a model: what comes out is what its weights say."""

from __future__ import annotations

import json

import polars as pl
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kv_transition import specs
from kv_transition.data import gguf
from kv_transition.settings import parse

pytest.importorskip("gguf", reason="the package gguf is not installed (pip install '.[gguf]')")

from gguf_files import END, tiny_llama, write_gguf  # noqa: E402

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
