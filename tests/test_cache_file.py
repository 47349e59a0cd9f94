"""Test a state on disk: loaded bit for bit, refused if foreign or damaged, never held twice in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from states import KINDS, identical, random_state

from kv_transition.cache import file
from kv_transition.cache.state import STATISTICS
from kv_transition.errors import UserError

FACTS = {"dtype": "float32", "tokenizer": "abc", "model": "def"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of files, none of which is needed after the test


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    group=st.integers(1, 2),
    n=st.integers(0, 12),
    d=st.sampled_from([2, 4, 8, 66]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    statistics=st.frozensets(st.sampled_from(sorted(STATISTICS))),
    shift=st.sampled_from([0, 17]),
    seed=st.integers(0, 1000),
)
def test_any_state_comes_back_bit_for_bit(tmp_path, kinds, shift, seed, **shape):
    state = random_state(kinds, shift=shift, seed=seed, **shape)
    file.save(state, tmp_path / "cache", FACTS)
    assert identical(file.load(tmp_path / "cache"), state)


def test_a_batch_comes_back(tmp_path):
    state = random_state(["plain", "packed", "window"], batch=(3,))
    state = replace(
        state, length=torch.tensor([4, 5, 6]).view(-1, 1, 1), shift=torch.tensor([0, 1, 2]).view(-1, 1, 1), logits=None
    )
    file.save(state, tmp_path / "cache", FACTS)
    assert identical(file.load(tmp_path / "cache"), state)


def test_safetensors_itself_reads_the_file(tmp_path):
    state = random_state(["room", "merged", "gaps"], dtype=torch.bfloat16, n=5)
    file.save(state, tmp_path / "cache", FACTS)
    tensors = load_file(tmp_path / "cache")
    assert torch.equal(tensors["layers.0.keys"], state.layers[0].keys)
    assert torch.equal(tensors["layers.1.bias"], state.layers[1].bias)
    assert torch.equal(tensors["layers.2.positions"], state.layers[2].positions)
    assert "layers.0.positions" not in tensors, "positions in a row need no tensor"


def test_keys_are_aligned_as_torch_aligns_them(tmp_path):
    """Check alignment, because results of kernels may depend on it in the last bit."""
    # the size of the statistics of 6 entries is not a multiple of the alignment
    file.save(random_state(["plain", "gaps", "packed"], n=6, d=64), tmp_path / "cache", FACTS)
    layers = file.load(tmp_path / "cache").layers
    assert all(layer.keys.data_ptr() % 64 == 0 and layer.values.data_ptr() % 64 == 0 for layer in layers[:2])
    assert all(layer.attn_sum.data_ptr() % 4 == 0 for layer in layers)


def test_layers_may_go_to_devices_of_their_own(tmp_path):
    state = random_state(["plain", "packed"])
    file.save(state, tmp_path / "cache", FACTS)
    back = file.load(tmp_path / "cache", ["cpu", "meta"])
    assert identical(back.layers[0], state.layers[0])
    assert back.layers[1].keys.codes.device.type == "meta"
    with pytest.raises(UserError, match="the cache has 2 layers, not 1"):
        file.load(tmp_path / "cache", ["cpu"])


def test_a_loaded_state_can_be_changed_without_changing_the_file(tmp_path):
    state = random_state(["plain"])
    file.save(state, tmp_path / "cache", FACTS)
    file.load(tmp_path / "cache").layers[0].keys.zero_()
    assert identical(file.load(tmp_path / "cache"), state)


def test_facts_are_told_without_reading_the_state(tmp_path):
    file.save(random_state(["plain"]), tmp_path / "cache", FACTS | {"policy": "snapkv"})
    assert file.read_facts(tmp_path / "cache") == FACTS | {"policy": "snapkv"}


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_cache_of_something_else_is_refused(tmp_path, name):
    file.save(random_state(["plain"]), tmp_path / "cache", FACTS)
    with pytest.raises(UserError) as error:
        file.load(tmp_path / "cache", expect=FACTS | {name: "other"})
    assert f"{tmp_path / 'cache'} was computed with another {name} ({FACTS[name]}, not other); create" in str(
        error.value
    )


def test_another_kind_of_file_is_refused(tmp_path):
    save_file({"weights": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a complete file of the kind 'kv_transition cache 1' but 'something else'"):
        file.load(tmp_path / "model.safetensors")
    later = file.lay_out("kv_transition cache 2", *file.flatten(random_state(["plain"])), FACTS)
    file.write(tmp_path / "later", *later)
    with pytest.raises(UserError, match="but 'kv_transition cache 2'; create the cache again"):
        file.load(tmp_path / "later")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "longer", "header", "description", "tensor", "folder"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "cache"
    file.save(random_state(["plain", "split"]), path, FACTS)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as stored:
        header = stored.metadata()
    tensors = load_file(path)
    if damage == "tensor":
        save_file({k: t.clone() for k, t in tensors.items() if k != "layers.0.values"}, path, header)
    elif damage == "description":
        plain = json.loads(header["state"])
        del plain["description"]["layers"]
        save_file({k: t.clone() for k, t in tensors.items()}, path, header | {"state": json.dumps(plain)})
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        damaged = {
            "empty": b"",
            "text": b"not tensors at all",
            "cut": whole[:-10],
            "longer": whole + b"more",
            "header": whole[:40] + b"\xff\xff" + whole[42:],
        }
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="create the cache again") as error:
        file.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    for read in (file.load, file.read_facts):
        with pytest.raises(UserError, match="there is no file"):
            read(tmp_path / "nothing")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    state = random_state(["plain"])
    file.save(state, path, FACTS)
    # Every write to this device fails with the system's error for a full disk.
    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: open("/dev/full", mode))  # noqa: SIM115
    with pytest.raises(UserError, match=r"writing the cache failed \(No space left on device\)"):
        file.save(random_state(["plain"], seed=1), path, FACTS)
    monkeypatch.undo()
    assert identical(file.load(path), state)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_outlives_its_last_user(tmp_path):
    """Check that tensors are freed by reference counting, because tensors that wait for garbage collection fill a
    GPU."""
    gc.disable()
    try:
        state = random_state(["plain", "split", "packed"])
        saved = weakref.ref(state.layers[0].keys)
        file.save(state, tmp_path / "cache", FACTS)
        del state
        assert saved() is None
        state = file.load(tmp_path / "cache")
        loaded = weakref.ref(state.layers[0].keys)
        assert loaded() is not None
        del state
        assert loaded() is None
    finally:
        gc.enable()


MEMORY = """
import resource, sys, torch
from kv_transition.cache import file
from kv_transition.cache.state import CacheState, LayerCache

def peak():  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def layer():  # 32 MiB of keys and values, views of storage with room for more
    keys, values = (torch.ones(4, 16500, 64)[:, :16384] for _ in range(2))
    return LayerCache(keys, values, torch.arange(16384).expand(4, -1), 1.0)

if sys.argv[1] == "save":
    state = CacheState(tuple(layer() for _ in range(8)), 16384)
    before = peak()
    file.save(state, sys.argv[2], {})
    print(peak() - before)
else:
    before = peak()
    state = file.load(sys.argv[2])
    print(peak() - before)
    assert float(state.layers[3].values.sum()) == 4 * 16384 * 64
    print(peak() - before)
"""


def test_nothing_is_held_twice(tmp_path):
    def run(what: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, what, str(tmp_path / "cache")], capture_output=True, text=True, check=True
        )
        return [float(line) for line in done.stdout.split()]

    # 256 MiB in 8 layers
    (extra,) = run("save")
    assert extra < 12, "saving takes less than one tensor of 16 MiB beyond the state"
    loaded, touched = run("load")
    assert loaded < 8, "nothing is read before it is used"
    assert touched < 8 + 32, "and then only what is used"
