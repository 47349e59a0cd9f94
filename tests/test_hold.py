"""Test a state held at its budget in place: bit for bit equal to copying, and without effect on other states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import engine, sliding_model, tokens

from kv_transition.cache.batch import stack
from kv_transition.cache.room import SLACK
from kv_transition.cache.state import CacheState, LayerCache, same, tensors_of
from kv_transition.policies.catalog import create, hyper_parameters, kinds

K = 24
STEPS = SLACK + 20
"""enough steps to use up the storage and to allocate it again"""


def policies() -> list:
    found = [(kind, create(kind, hyper_parameters(kind))) for kind in kinds()]
    found = [(kind, policy) for kind, policy in found if policy.acts_each_step and kind != "r_kv"]
    found += [(f"r_kv_{every}", create("r_kv", {"every": every})) for every in (1, 5)]
    found.append(("streaming_cache", create("streaming_llm", {"positions": "cache"})))
    return [pytest.param(policy, id=name) for name, policy in found]


def equal(a: CacheState, b: CacheState) -> bool:
    """Return whether the tensors of two states are bit-identical, for batches as well."""
    pairs = [(tensors_of(x), tensors_of(y)) for x, y in zip(a.layers, b.layers, strict=True)]
    return torch.equal(a.logits, b.logits) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs
    )


@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("rows", [0, 3], ids=["alone", "batch"])
def test_holding_in_place_is_compressing(policy, rows):
    """Compare every tensor of the state and the logits at each step; rows of a batch lose different entries.

    A policy with ``every`` compresses each time that this many entries were added.
    """
    if rows and policy.one_at_a_time:
        pytest.skip("goes one by one")
    reader = engine("qwen2")
    states = [policy.compress(reader.extend(None, tokens(60, seed=i)), K) for i in range(max(rows, 1))]
    copied = held = stack(states, policy.statistics) if rows else states[0]
    every = getattr(policy, "every", 1)
    for step in range(STEPS):
        said = [[token] for token in tokens(rows, seed=100 + step)] if rows else tokens(1, seed=100 + step)
        copied = reader.extend(copied, said, policy.statistics)
        if (step + 1) % every == 0:
            copied = policy.compress(copied, K)
        held = policy.hold(reader.extend(held, said, policy.statistics), K)
        assert equal(copied, held)


@pytest.mark.parametrize("policy", policies())
def test_what_was_there_before_stays_as_it_was(policy):
    """Check the prompt's own state, whose storage has spare room, and a settled state that is extended further."""
    reader = engine("llama")
    prompt, untouched = (reader.extend(None, tokens(30), room=STEPS) for _ in range(2))
    state = prompt
    for token in tokens(20, seed=1):
        state = policy.hold(reader.extend(state, [token], policy.statistics), 40)
    kept = state.settled()
    copy = CacheState(
        tuple(layer.with_parts([part.cut(0, part.n) for part in layer.parts]) for layer in kept.layers), 0
    )
    bits = [{name: tensor.clone() for name, tensor in tensors_of(layer).items()} for layer in copy.layers]
    later = kept
    for token in tokens(10, seed=2):
        later = policy.hold(reader.extend(later, [token], policy.statistics), 40)
    assert same(prompt, untouched)
    for layer, before in zip(kept.layers, bits, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(layer).items())


def test_sliding_windows_beside_it_forget_by_themselves():
    policy, (reader, _) = create("h2o", hyper_parameters("h2o")), sliding_model()
    copied = held = policy.compress(reader.extend(None, tokens(60)), K)
    for token in tokens(20, seed=3):
        copied = policy.compress(reader.extend(copied, [token], policy.statistics), K)
        held = policy.hold(reader.extend(held, [token], policy.statistics), K)
        assert equal(copied, held)


@given(st.data(), st.integers(1, 4), st.integers(2, 12))
def test_any_entry_of_any_head(data, heads, n):
    """Compare with lists of numbers: one entry is removed and one is added, repeatedly."""
    numbers = torch.arange(heads * n, dtype=torch.float32).view(heads, n)
    lists = numbers.tolist()
    layer = LayerCache(numbers[..., None], -numbers[..., None], numbers.long(), scale=1.0)
    for step in range(SLACK + 3):
        gone = data.draw(st.lists(st.integers(0, n - 1), min_size=heads, max_size=heads)) if step < 4 else [0] * heads
        layer = layer.drop(torch.tensor(gone)[:, None])
        new = torch.full((heads, 1), 1000.0 + step)
        layer = layer.append(new[..., None], -new[..., None], new.long(), None, 0)
        lists = [[*row[:g], *row[g + 1 :], 1000.0 + step] for row, g in zip(lists, gone, strict=True)]
        assert layer.keys[..., 0].tolist() == lists
        assert (-layer.values[..., 0]).tolist() == lists
        assert layer.positions.tolist() == lists
