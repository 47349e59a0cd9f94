"""Test StreamingLLM: the kept entries, and positions in the cache as in the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import engine, sliding_model, tokens
from policy_states import FREQUENCIES, D, positions_of, random_state, rotated

from kv_transition.cache.rotary import Rotary
from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create

N = 75


@pytest.mark.parametrize(
    ("options", "k", "expected"),
    [
        ({}, 10, [0, 1, 2, 3, *range(N - 6, N)]),
        ({}, 4, [0, 1, N - 2, N - 1]),  # sinks take at most half of the budget
        ({}, 1, [N - 1]),
        ({"n_sink": 0}, 3, [N - 3, N - 2, N - 1]),
        ({"n_sink": 2, "recent": 5}, 30, [0, 1, *range(N - 5, N)]),
        ({"n_sink": 20, "recent": 5}, 30, [*range(20), *range(N - 5, N)]),  # the counts as requested
        ({"n_sink": 20, "recent": 20}, 30, [*range(15), *range(N - 15, N)]),  # the budget is too small for both
    ],
)
@pytest.mark.parametrize("positions", ["original", "cache"])
def test_sinks_and_the_end_are_kept(options, k, expected, positions):
    state, _ = random_state(N)
    compressed = create("streaming_llm", options | {"positions": positions}).compress(state, k)
    assert positions_of(compressed) == [[expected] * 2] * 3


def stream(n: int, k: int, steps: int, dtype: torch.dtype, **options):
    """Yield, after each step, the state and the logits of the new query by our policy and by the paper's method.

    The paper stores un-rotated keys. At each step it rotates them to their places in the cache, and the new token's
    query and key to the place after them. The stream has one layer of random tokens.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, D, generator=generator)

    policy = create("streaming_llm", {"positions": "cache", **options})
    sinks = policy.protected(k)
    rotary = Rotary(FREQUENCIES)
    plain = draw(1, n)
    keys = rotated(plain, range(n)).to(dtype)
    layer = LayerCache(keys, keys, torch.arange(n)[None], scale=1.0, rotary=rotary)
    # the un-rotated keys are known up to the rounding of the stored keys
    kept = list(rotated(keys.double(), [-p for p in range(n)])[0])
    state = policy.compress(CacheState((layer,), length=n), k)
    kept = kept[:sinks] + kept[len(kept) - (k - sinks) :]
    for _ in range(steps):
        query, key = draw(1, 1), draw(1, 1)
        place = state.length - state.shift
        at = torch.tensor([[place]])
        new = rotated(key, [place]).to(dtype)
        kept.append(rotated(new.double(), [-place])[0, 0])
        angles = None if state.shift == 0 and state.layers[0].angles is None else at.float()
        layer = state.layers[0].append(new, new, torch.tensor([[state.length]]), angles, 0)
        ours = (rotated(query, [place]) @ layer.keys.double().mT)[0, 0]
        there = rotated(torch.stack(kept)[None], range(k + 1))
        theirs = (rotated(query, [k]) @ there.mT)[0, 0]
        yield state, ours, theirs
        state = policy.compress(replace(state, layers=(layer,), length=state.length + 1), k)
        kept = kept[:sinks] + kept[len(kept) - (k - sinks) :]


@pytest.mark.parametrize(("n", "k", "n_sink"), [(300, 40, 4), (50, 40, 4), (41, 40, 0), (60, 2, 4), (60, 1, 0)])
def test_attention_is_that_of_places_in_the_cache(n, k, n_sink):
    """Compare logits in fp32 over 350 steps with those of keys rotated to 0 ... K - 1 and a query at K."""
    for state, ours, theirs in stream(n, k, 350, torch.float32, n_sink=n_sink):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert k <= state.length - state.shift < max(2 * k, k + 1)


def test_turning_again_and_again_adds_up_no_error():
    """Check that in bf16 the error after 1500 steps is not larger than after the first steps."""
    errors = [float((ours - theirs).abs().max()) for _, ours, theirs in stream(300, 40, 1500, torch.bfloat16)]
    first, last = max(errors[:200]), max(errors[-200:])
    # keys of 8 channels, rounded at most three times, with an error of 2^-9 of each product each time
    assert first < 0.1
    assert last < 1.5 * first


def test_the_next_token_comes_right_behind_the_cache():
    state, _ = random_state(N)
    compressed = create("streaming_llm", {"positions": "cache"}).compress(state, 20)
    assert compressed.length - compressed.shift == 20
    for layer in compressed.layers:
        assert layer.angles.tolist() == [[float(i) for i in range(20)]] * 2
    # without an eviction, no key is rotated
    untouched = create("streaming_llm", {"positions": "cache"}).compress(state, N)
    assert untouched.shift == 0
    assert untouched.layers == state.layers


def test_a_sliding_window_is_turned_back_with_the_others():
    state, truths = random_state(N)
    sliding = replace(state.layers[1], window=30).cut(N - 31, N)
    state = replace(state, layers=(state.layers[0], sliding, state.layers[2]))
    compressed = create("streaming_llm", {"positions": "cache"}).compress(state, 20)
    after = compressed.layers[1]
    assert after.positions.tolist() == sliding.positions.tolist()
    expected = rotated(truths[1].keys, [p - compressed.shift for p in range(N)])[:, N - 31 :]
    torch.testing.assert_close(after.keys.double(), expected, rtol=0, atol=1e-4)


def test_a_larger_budget_later_finds_no_sinks_that_were_evicted():
    state, truths = random_state(N, layers=1)
    policy = create("streaming_llm", {"positions": "cache"})
    state = policy.compress(state, 4)
    rotary = state.layers[0].rotary
    plain = {p: truths[0].keys[:, p] for p in range(N)}
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        new = torch.randn(2, 1, D, generator=generator)
        plain[state.length] = new[:, 0].double()
        place = torch.full((2, 1), float(state.length - state.shift))
        layer = state.layers[0].append(rotary.turn(new, place), new, torch.full((2, 1), state.length), place, 0)
        state = policy.compress(replace(state, layers=(layer,), length=state.length + 1), 10)
    layer = state.layers[0]
    assert layer.positions[0].tolist() == [0, 1, *range(state.length - 8, state.length)]
    held = torch.stack([plain[p] for p in layer.positions[0].tolist()], 1)
    torch.testing.assert_close(layer.keys.double(), rotated(held, layer.angles[0]), rtol=0, atol=1e-3)


def test_a_model_decodes_the_same_with_both_positions_while_nothing_is_missing():
    """Check that without a gap both positions give equal logits, because attention ignores a common shift."""
    state = engine("qwen2").extend(None, tokens(60))
    logits = []
    for positions in ("original", "cache"):
        policy = create("streaming_llm", {"n_sink": 0, "positions": positions})
        now = state
        for token in tokens(30, seed=2):
            now = engine("qwen2").extend(policy.compress(now, 20), [token], policy.statistics)
        assert (now.shift > 0) == (positions == "cache")
        logits.append(now.logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)


def test_an_unknown_rotation_is_refused():
    state, _ = random_state(N)
    unknown = replace(state, layers=tuple(replace(layer, rotary=None) for layer in state.layers))
    with pytest.raises(UserError, match="use positions: original"):
        create("streaming_llm", {"positions": "cache"}).compress(unknown, 20)
    assert create("streaming_llm", {}).compress(unknown, 20).entries == 20


def test_a_model_with_sliding_windows_decodes_the_same_with_both_positions():
    reader, _ = sliding_model()
    state = reader.extend(None, tokens(60))
    logits = []
    for positions in ("original", "cache"):
        policy = create("streaming_llm", {"n_sink": 0, "positions": positions})
        now = state
        for token in tokens(30, seed=2):
            now = reader.extend(policy.compress(now, 20), [token], policy.statistics)
        assert (now.shift > 0) == (positions == "cache")
        logits.append(now.logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)
