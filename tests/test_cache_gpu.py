"""Test that states on a GPU are saved and loaded bit for bit."""

from __future__ import annotations

import pytest
import torch
from states import identical, random_prefill, random_state

from kv_transition.cache import file
from kv_transition.cache.state import CacheState, tensors_of
from kv_transition.cache.store import PrefillStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def on(state: CacheState) -> set[str]:
    return {tensor.device.type for layer in state.layers for tensor in tensors_of(layer).values()}


def test_a_state_goes_to_the_gpu_and_back(tmp_path):
    state = random_state(["plain", "room", "window", "split", "packed", "merged"], dtype=torch.bfloat16)
    file.save(state, tmp_path / "first", {})
    there = file.load(tmp_path / "first", "cuda")
    assert on(there) == {"cuda"}
    file.save(there, tmp_path / "second", {})
    assert identical(file.load(tmp_path / "second"), state)


def test_a_prefill_is_on_the_gpu_once(tmp_path):
    store = PrefillStore(tmp_path / "model", "always")
    prefill = random_prefill(["plain"] * 4, 100_000, 1000, statistics=frozenset(), d=64)
    store.save("abc", prefill)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    back = store.load("abc", "cuda")
    assert on(back.context) == on(back.prompt) == {"cuda"}
    positions = 4 * 2 * 101_000 * 8
    assert torch.cuda.memory_allocated() - before < prefill.prompt.nbytes + 2 * positions
    assert back.context.layers[0].keys.data_ptr() == back.prompt.layers[0].keys.data_ptr()
    assert torch.equal(back.prompt.layers[3].values.cpu(), prefill.prompt.layers[3].values)
