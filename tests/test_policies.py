"""Every policy's choice against its definition written out as loops over explicit attention matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, engine, reference, tokens

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.policies.base import top
from kv_transition.policies.catalog import create, hyper_parameters, kinds

N = 75


@pytest.fixture(scope="module")
def prompt():
    """A prompt read by the engine, and its attention written out: weights [H, N, N], q, k, v of each layer."""
    # no token twice: rotation keeps norms, so equal tokens would be exact ties up to rounding
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(11))[:N].tolist()
    return engine("qwen2").extend(None, ids), reference("qwen2", ids)[1]


def best(scores: list[float], k: int) -> list[int]:
    """Indices of the k highest scores, the lower index first among equals."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


def chosen(kind: str, state, k: int, seed: int = 0, **options) -> list[list[list[int]]]:
    compressed = create(kind, hyper_parameters(kind) | options).compress(state, k, seed=seed)
    return [layer.positions.tolist() for layer in compressed.layers]


def group_mean(weights: torch.Tensor, head: int, rows, column: int) -> float:
    """Attention to an entry, summed over queries, averaged over the two query heads of a KV head."""
    return sum(float(weights[2 * head + g, i, column]) for i in rows for g in range(2)) / 2


@pytest.mark.parametrize("k", [1, 2, 9, 40])
@pytest.mark.parametrize(("kind", "share"), [("h2o", 0.5), ("h2o_heavy", 0.0)])
def test_h2o_keeps_the_most_attended_and_the_recent(prompt, k, kind, share):
    state, layers = prompt
    for (weights, *_), got in zip(layers, chosen(kind, state, k), strict=True):
        for head in range(2):
            scores = [group_mean(weights, head, range(N), j) for j in range(N)]
            for j in range(N - int(k * share), N):
                scores[j] = math.inf
            assert got[head] == best(scores, k)


@pytest.mark.parametrize("k", [2, 9, 40, 70])
@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("window", "kernel"), [(32, 7), (8, 5), (16, 1)])
def test_snapkv_pools_what_the_window_attends_to(prompt, k, pooling, window, kernel):
    state, layers = prompt
    got = chosen("snapkv", state, k, window=window, kernel=kernel, pooling=pooling)
    for (weights, *_), got_layer in zip(layers, got, strict=True):
        for head in range(2):
            w = min(window, k // 2)
            prefix = [group_mean(weights, head, range(N - w, N), j) for j in range(N - w)]
            padded = [0.0] * (kernel // 2) + prefix + [0.0] * (kernel // 2)
            spans = [padded[j : j + kernel] for j in range(N - w)]
            pooled = [max(span) if pooling == "max" else sum(span) / kernel for span in spans]
            expected = best(pooled, k - w) + list(range(N - w, N))
            # max pooling gives exact ties; sums in another order may only swap near-ties of the mean
            if pooling == "mean":
                assert len(set(got_layer[head]) ^ set(expected)) <= 2
            else:
                assert got_layer[head] == expected


@pytest.mark.parametrize("k", [2, 9, 40])
def test_tova_keeps_one_set_a_layer_by_the_last_query(prompt, k):
    state, layers = prompt
    for (weights, *_), got in zip(layers, chosen("tova", state, k), strict=True):
        scores = [float(weights[:, N - 1, j].mean()) for j in range(N)]
        scores[N - 1] = math.inf
        assert got == [best(scores, k)] * 2


@pytest.mark.parametrize("k", [1, 9, 40])
def test_knorm_keeps_the_smallest_keys(prompt, k):
    state, layers = prompt
    for (_, _, keys, _), got in zip(layers, chosen("knorm", state, k), strict=True):
        for head in range(2):
            norms = [-math.sqrt(sum(float(x) ** 2 for x in keys[head, j])) for j in range(N)]
            assert got[head] == best(norms, k)


@pytest.mark.parametrize(
    ("options", "k", "expected"),
    [
        ({}, 10, [0, 1, 2, 3, *range(N - 6, N)]),
        ({}, 4, [0, 1, N - 2, N - 1]),  # sinks take at most half
        ({"n_sink": 0}, 3, [N - 3, N - 2, N - 1]),
        ({"n_sink": 2, "recent": 5}, 30, [0, 1, *range(N - 5, N)]),
    ],
)
def test_streaming_llm_keeps_sinks_and_the_end(prompt, options, k, expected):
    assert chosen("streaming_llm", prompt[0], k, **options) == [[expected] * 2] * 3


def test_random_differs_between_layers_heads_and_seeds_and_repeats_itself(prompt):
    state, _ = prompt
    first = chosen("random", state, 20, seed=1)
    sets = [tuple(head) for layer in first for head in layer]
    assert len(set(sets)) == len(sets)
    assert first == chosen("random", state, 20, seed=1)
    assert first != chosen("random", state, 20, seed=2)


def test_random_for_all_heads_draws_one_set(prompt):
    sets = {tuple(head) for layer in chosen("random", prompt[0], 20, per_head=False) for head in layer}
    assert len(sets) == 1


def test_random_keeps_every_entry_equally_often(prompt):
    """600 draws of 15 of 75: each entry is kept with p = 0.2, within five standard errors."""
    state, _ = prompt
    kept = torch.zeros(N)
    for seed in range(100):
        for layer in chosen("random", state, 15, seed=seed):
            for head in layer:
                kept[head] += 1
    error = math.sqrt(600 * 0.2 * 0.8)
    assert (kept - 120).abs().max() < 5 * error


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([k for k in kinds() if k != "full"]),
    n=st.integers(1, 60),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**40),
    keep_last=st.booleans(),
)
def test_what_holds_for_every_policy(kind, n, k, seed, keep_last):
    """K entries or all, rising, no position twice, the last one kept if asked, survivors untouched, input unchanged."""
    state = engine("llama").extend(None, tokens(n, seed=n))
    policy = create(kind, hyper_parameters(kind))
    assert policy.protected(k) <= max(1, k // 2)
    compressed = policy.compress(state, k, seed=seed, keep_last=keep_last)
    for before, after in zip(state.layers, compressed.layers, strict=True):
        assert before.n == n
        assert after.n == min(k, n)
        assert (after.positions.diff(dim=1) > 0).all()
        if keep_last:
            assert (after.positions[:, -1] == n - 1).all()
        for head in range(2):
            at = after.positions[head]
            for name in ("keys", "values", "attn_sum"):
                assert torch.equal(getattr(after, name)[head], getattr(before, name)[head, at])
    again = policy.compress(state, k, seed=seed, keep_last=keep_last)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(compressed.layers, again.layers, strict=True))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_top_breaks_ties_towards_the_lower_index(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert top(torch.tensor([scores], dtype=torch.float32), k)[0].tolist() == best(scores, k)


def test_the_catalog_reads_from_the_source_what_the_classes_say():
    import dataclasses

    for kind in kinds():
        policy = create(kind, {})
        declared = {field.name: field.default for field in dataclasses.fields(policy)}
        assert declared == hyper_parameters(kind)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("snapkw", {}, ["snapkw", "snapkv", "h2o"]),
        ("mine", {"kind": "nothing"}, ["mine", "nothing", "streaming_llm"]),
        ("snapkv", {"windows": 3}, ["kv.policies.snapkv.windows", "window", "kernel", "pooling"]),
        ("snapkv", {"window": "wide"}, ["kv.policies.snapkv.window", "'wide'", "32"]),
        ("random", {"per_head": 1}, ["kv.policies.random.per_head", "True"]),
        ("streaming_llm", {"recent": "many"}, ["kv.policies.streaming_llm.recent", "many"]),
    ],
)
def test_a_wrong_policy_is_named_with_what_would_be_right(name, options, words):
    with pytest.raises(UserError) as error:
        catalog.resolve(name, options)
    assert all(word in str(error.value) for word in words)


def test_a_variant_inherits_defaults_and_keeps_its_name():
    assert catalog.resolve("snapkv_w16", {"kind": "snapkv", "window": 16}) == (
        "snapkv",
        {"window": 16, "kernel": 7, "pooling": "max"},
    )
    assert catalog.resolve("streaming_llm", {"recent": 100})[1] == {"n_sink": 4, "recent": 100}
