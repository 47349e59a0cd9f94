"""Test decoding.compile: the compiled decoder gives the plain loop's answers, and falls back if unsupported."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import engine, tokens

from kv_transition.budget import Budget
from kv_transition.engines import compiled
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.run import decode
from kv_transition.run.decode import Answer, Setting, answer_all

QUESTION = tokens(4, seed=3)


def setting(kind: str, mode: str, **options) -> Setting:
    budget = Budget.parse("r1" if kind == "full" else "r0.4")
    return Setting(create(kind, hyper_parameters(kind)), budget, mode, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["full", "snapkv", "pyramidkv", "adakv"])
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_compiled_answers_are_those_of_the_plain_loop(monkeypatch, kind, mode, temperature):
    torch._dynamo.reset()
    local = engine("qwen2")
    decoder = compiled.CompiledDecoder(local, backend="eager")
    monkeypatch.setattr(decode, "decoder_of", lambda _: decoder)
    prefills = [local.prefill(tokens(n, seed=n), QUESTION) for n in (50, 33, 71)]
    got = []
    for compile in (False, True):
        chosen = setting(kind, mode, temperature=temperature, compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            answers = [Answer(seed, longest) for seed, longest in ((1, 9), (2, 4), (3, 7))]
            got.append(answer_all(local, prefills, [QUESTION] * 3, chosen, answers))
    for plain, fast in zip(*got, strict=True):
        for name in ("tokens", "kept", "cache_bytes", "total_bytes", "full_bytes"):
            assert getattr(plain, name) == getattr(fast, name), name


def test_what_cannot_be_compiled_falls_back_and_says_so_once():
    local = engine("qwen2")
    prefills = [local.prefill(tokens(50), QUESTION)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            answer_all(local, prefills, [QUESTION], setting("h2o", "before_question", compile=True), [Answer(1, 3)])
    assert len([w for w in seen if "decoding.compile" in str(w.message)]) == 1
