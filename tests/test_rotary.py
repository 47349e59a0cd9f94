"""Compare the rotation of keys with complex numbers and with transformers, and test its invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import FREQUENCIES, D, rotated

from kv_transition.cache.rotary import Rotary

ROTARY = Rotary(FREQUENCIES)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_turning_is_multiplication_of_pairs_as_complex_numbers():
    x = vectors(2, 5, D)
    by = [0.0, 1.0, -3.25, 100.5, 777.0]
    turned = ROTARY.turn(x, torch.tensor(by).expand(2, 5))
    torch.testing.assert_close(turned.double(), rotated(x, by), rtol=0, atol=2e-4)


def test_turning_is_what_transformers_does():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2))
    x, at = vectors(1, 2, 6, 8), torch.tensor([[0, 1, 2, 50, 400, 1000]])
    theirs, _ = apply_rotary_pos_emb(x, x, *embedding(x, at))
    ours = Rotary(tuple(embedding.inv_freq.tolist())).turn(x[0], at.expand(2, 6))
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.floats(-500, 500), st.floats(-500, 500), st.integers(0, 1000))
def test_there_and_back_and_in_two_steps(a, b, seed):
    x = vectors(3, D, seed=seed)
    by = torch.tensor([a, b, 0.0])
    torch.testing.assert_close(ROTARY.turn(ROTARY.turn(x, by), -by), x, rtol=0, atol=1e-4)
    once = ROTARY.turn(x, by + by.flip(0))
    torch.testing.assert_close(ROTARY.turn(ROTARY.turn(x, by), by.flip(0)), once, rtol=0, atol=1e-3)
    torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(ROTARY.turn(x, torch.zeros(3)), x)


def test_products_depend_on_differences_only():
    q, k = vectors(1, D), vectors(1, D, seed=1)
    products = [
        float((ROTARY.turn(q, torch.tensor([17.0 + s])) * ROTARY.turn(k, torch.tensor([5.0 + s]))).sum())
        for s in (0, 3, 250, -17)
    ]
    assert products == pytest.approx([products[0]] * 4, abs=1e-4)


def test_channels_beyond_the_rotated_ones_stay():
    x = vectors(4, D + 6)
    turned = ROTARY.turn(x, torch.arange(4) * 10)
    assert torch.equal(turned[:, D:], x[:, D:])
    torch.testing.assert_close(turned[:, :D], ROTARY.turn(x[:, :D], torch.arange(4) * 10))


def test_the_mean_turn_is_the_mean_of_the_turns():
    x, by = vectors(3, 4, D), torch.arange(60, 90)
    one_by_one = torch.stack([ROTARY.turn(x, p.expand(3, 4)) for p in by]).mean(0)
    torch.testing.assert_close(ROTARY.mean_turn(x, by), one_by_one, rtol=0, atol=1e-5)


def test_the_dtype_stays():
    assert ROTARY.turn(vectors(2, D).bfloat16(), torch.ones(2)).dtype == torch.bfloat16
