"""Prefills on disk: what comes back is what was stored, whole or not at all."""

from __future__ import annotations

import pytest
import torch
from models import engine, tokens

from kv_transition.cache.state import same
from kv_transition.cache.store import PrefillStore
from kv_transition.errors import UserError
from kv_transition.run.prefill import read_once


@pytest.fixture
def prefill():
    return engine("qwen2").prefill(tokens(70), tokens(9, seed=1))


@pytest.fixture
def store(tmp_path):
    return PrefillStore(tmp_path / "model", mode="always")


def test_what_comes_back_is_what_was_stored(store, prefill):
    assert store.save("abc", prefill)
    assert "abc" in store
    back = store.load("abc")
    assert same(back.context, prefill.context)
    assert same(back.prompt, prefill.prompt)
    assert (back.context_s, back.question_s) == (prefill.context_s, prefill.question_s)
    assert back.prompt.layers[0].scale == prefill.prompt.layers[0].scale
    # and it can be gone on from
    assert same(engine("qwen2").extend(back.context, [3, 4]), engine("qwen2").extend(prefill.context, [3, 4]))


def test_half_precision_survives(store, prefill):
    layers = [layer.keys.half() for layer in prefill.prompt.layers]
    from dataclasses import replace

    def halved(state):
        new = tuple(
            replace(layer, keys=keys[:, : layer.n], values=layer.values.half())
            for layer, keys in zip(state.layers, layers, strict=True)
        )
        return replace(state, layers=new)

    store.save("half", replace(prefill, context=halved(prefill.context), prompt=halved(prefill.prompt)))
    back = store.load("half")
    assert back.prompt.layers[0].keys.dtype == torch.float16
    assert torch.equal(back.prompt.layers[1].keys, layers[1])


def test_what_is_not_there_is_none(store):
    assert store.load("nothing") is None
    assert "nothing" not in store


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_is_named(store, prefill, damage):
    store.save("abc", prefill)
    file = store.path("abc")
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UserError) as error:
        store.load("abc")
    assert str(file) in str(error.value)
    assert "delete it" in str(error.value)


def test_a_file_of_something_else_is_named(store, tmp_path):
    from safetensors.torch import save_file

    store.root.mkdir()
    save_file({"weights": torch.zeros(3)}, store.path("abc"))
    with pytest.raises(UserError, match="not a whole prefill"):
        store.load("abc")


def test_never_stores_nothing(tmp_path, prefill):
    store = PrefillStore(tmp_path / "model", mode="never")
    assert not store.save("abc", prefill)
    assert not (tmp_path / "model").exists()


def test_auto_stops_at_max_gb(tmp_path, prefill):
    big = PrefillStore(tmp_path / "model", mode="always")
    big.save("one", prefill)
    size = big.path("one").stat().st_size / 1e9
    store = PrefillStore(tmp_path / "model", mode="auto", max_gb=2.5 * size)
    assert store.save("two", prefill)
    assert not store.save("three", prefill)
    assert sorted(file.stem for file in store.root.iterdir()) == ["one", "two"]


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(store, prefill, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kv_transition.cache.store.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        store.save("abc", prefill)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("mode", ["always", "never"])
def test_storing_changes_no_result(tmp_path, mode):
    example = {"prompt_sha256": "abc", "context_ids": tokens(50), "question_ids": tokens(5, seed=1)}
    store = PrefillStore(tmp_path / "model", mode=mode)
    first, _ = read_once(engine("llama"), store, example)
    second, _ = read_once(engine("llama"), store, example)
    assert same(first.prompt, second.prompt)
    assert ("abc" in store) == (mode == "always")
