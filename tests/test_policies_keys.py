"""Compare policies that use keys, queries, values or nothing with loops over numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from policy_states import FREQUENCIES, GROUP, HKV, D, best, layer_of, positions_of, random_state, rotated, written

from kv_transition.errors import UserError
from kv_transition.policies.catalog import create

N = 60


@pytest.fixture(scope="module")
def world():
    return random_state(N)


def dot(a, b) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def norm(a) -> float:
    return math.sqrt(dot(a, a))


@pytest.mark.parametrize("k", [1, 9, 40])
def test_knorm_keeps_the_smallest_keys(world, k):
    state, truths = world
    for truth, got in zip(truths, positions_of(create("knorm", {}).compress(state, k)), strict=True):
        for head in range(HKV):
            assert got[head] == best([-norm(truth.keys[head, j]) for j in range(N)], k)


@pytest.mark.parametrize("k", [1, 9, 40])
def test_keydiff_keeps_the_keys_least_like_the_mean_direction(world, k):
    state, truths = world
    for truth, got in zip(truths, positions_of(create("keydiff", {}).compress(state, k)), strict=True):
        for head in range(HKV):
            keys = rotated(truth.keys, range(N))[head]
            units = [[float(x) / norm(key) for x in key] for key in keys]
            anchor = [sum(unit[c] for unit in units) / N for c in range(D)]
            assert got[head] == best([-dot(unit, anchor) / norm(anchor) for unit in units], k)


@pytest.mark.parametrize("k", [1, 6, 9, 40])
@pytest.mark.parametrize(("n_sink", "n_future"), [(4, 512), (0, 1), (2, 30)])
def test_expected_attention_is_the_formula(world, k, n_sink, n_future):
    """Compare with the formula entry by entry: mean and covariance of un-rotated queries, mean rotation as a matrix."""
    state, truths = world
    policy = create("expected_attention", {"n_sink": n_sink, "n_future": n_future})
    ahead = range(N, N + n_future)
    turn = torch.zeros(D, D, dtype=torch.float64)
    for channel, frequency in enumerate(FREQUENCIES):
        c = sum(math.cos(p * frequency) for p in ahead) / n_future
        s = sum(math.sin(p * frequency) for p in ahead) / n_future
        other = channel + len(FREQUENCIES)
        turn[channel, channel] = turn[other, other] = c
        turn[channel, other], turn[other, channel] = -s, s
    sinks = min(n_sink, k // 2)
    for truth, got in zip(truths, positions_of(policy.compress(state, k)), strict=True):
        keys = rotated(truth.keys, range(N))
        for head in range(HKV):
            expected = [0.0] * N
            for g in range(GROUP):
                queries = truth.queries[head * GROUP + g, 4:]
                mean = queries.mean(0)
                cov = sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)
                m, c = turn @ mean, turn @ cov @ turn.T
                logits = [
                    float(m @ key) * truth.scale + float(key @ c @ key) * truth.scale**2 / 2 for key in keys[head]
                ]
                most = max(logits[sinks:])
                total = sum(math.exp(x - most) for x in logits[sinks:])
                for j in range(sinks, N):
                    expected[j] += math.exp(logits[j] - most) / total / GROUP
            scores = [e * norm(v) for e, v in zip(expected, truth.values[head], strict=True)]
            scores[:sinks] = [math.inf] * sinks
            assert got[head] == best(scores, k)


def test_expected_attention_is_what_normal_queries_pay_on_average():
    """Compare the closed form with a Monte Carlo mean of exp of the logits of random queries."""
    # small queries, because the mean of exp of large logits needs too many draws
    layer = layer_of(written(30, seed=4, peaked=1.0))
    policy = create("expected_attention", {"n_sink": 0, "n_future": 1})
    score = policy.score(layer, 0, 10, 30, 0)
    generator = torch.Generator().manual_seed(0)
    for head in range(HKV):
        paid = torch.zeros(30, dtype=torch.float64)
        for g in range(GROUP):
            own = head * GROUP + g
            root = torch.linalg.cholesky(layer.query_cov[own].double() + 1e-9 * torch.eye(D))
            drawn = torch.randn(200_000, D, generator=generator, dtype=torch.float64) @ root.T
            queries = layer.rotary.turn((drawn + layer.query_mean[own]).float(), torch.full((200_000,), 30)).double()
            mean = (queries @ layer.keys[head].double().T * layer.scale).exp().mean(0)
            paid += mean / mean.sum() / GROUP
        expected = paid * layer.values[head].double().norm(dim=-1)
        # tolerance for means of log-normal draws
        torch.testing.assert_close(score[head].double(), expected, rtol=0.03, atol=1e-4)


def test_expected_attention_needs_to_know_the_rotation(world):
    state, _ = world
    unknown = replace(state, layers=tuple(replace(layer, rotary=None) for layer in state.layers))
    with pytest.raises(UserError, match=r"expected_attention rotates queries .* choose another policy"):
        create("expected_attention", {}).compress(unknown, 10)


def draw(state, k: int, seed: int, **options) -> list[list[list[int]]]:
    return positions_of(create("random", options).compress(state, k, seed=seed))


def test_random_differs_between_layers_heads_and_seeds_and_repeats_itself(world):
    state, _ = world
    first = draw(state, 20, 1)
    sets = [tuple(head) for layer in first for head in layer]
    assert len(set(sets)) == len(sets)
    assert first == draw(state, 20, 1)
    assert first != draw(state, 20, 2)


def test_random_for_all_heads_draws_one_set(world):
    sets = {tuple(head) for layer in draw(world[0], 20, 0, per_head=False) for head in layer}
    assert len(sets) == 1


def test_random_keeps_every_entry_equally_often(world):
    """Check 600 draws of 12 of 60 entries: each entry is kept with p = 0.2, within five standard errors."""
    kept = torch.zeros(N)
    for seed in range(100):
        for layer in draw(world[0], 12, seed):
            for head in layer:
                kept[head] += 1
    error = math.sqrt(600 * 0.2 * 0.8)
    assert (kept - 120).abs().max() < 5 * error
