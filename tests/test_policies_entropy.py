"""Compare entropy_merge and entropy_drop with loops over their definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import engine, tokens
from policy_states import GROUP, HKV, D, Written, grown, layer_of, positions_of, random_state, rotated, written

from kv_transition.cache.merge import merge
from kv_transition.cache.state import CacheState, same
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create

N = 90


def diffuse(n: int, seed: int) -> Written:
    """Return attention between flat and peaked, so that entropies spread over [0, 1]."""
    return written(n, seed, peaked=1.5)


@pytest.fixture(scope="module")
def world():
    truths = [diffuse(N, seed) for seed in range(3)]
    return CacheState(tuple(map(layer_of, truths)), length=N, logits=torch.zeros(5)), truths


def normalised(truth: Written) -> list[float]:
    """Return the normalized entropy h of every token, from the rows of attention."""
    heads, n, _ = truth.weights.shape
    found = [0.0]
    for i in range(1, n):
        entropies = [
            -sum(p * math.log(p) for p in truth.weights[head, i].tolist() if p > 0) / math.log(i + 1)
            for head in range(heads)
        ]
        found.append(sum(entropies) / heads)
    return found


def spans_by_budget(h: list[float], k: int, max_span: int, n_sink: int, recent: int) -> tuple[list, int]:
    n = len(h)
    sinks = min(n_sink, k // 2)
    last = min(recent, k // 2 - sinks)
    middle = list(range(sinks, n - last))
    width = max_span
    while math.ceil(len(middle) / width) + sinks + last > k:
        width += 1
    blocks = [middle[i : i + width] for i in range(0, len(middle), width)]
    blocks.sort(key=lambda block: (-sum(h[i] for i in block) / len(block), block[0]))
    merged, left = [], n
    for block in blocks:
        while len(block) > 1 and left - (len(block) - 1) < k:
            block = block[:-1]
        if len(block) > 1 and left > k:
            merged.append((block[0], block[-1] + 1))
            left -= len(block) - 1
    assert left == k
    return sorted(merged), width


def spans_by_threshold(h: list[float], threshold: float, max_span: int, n_sink: int, recent: int) -> list:
    n = len(h)
    sinks = min(n_sink, n // 2)
    middle = list(range(sinks, n - min(recent, n // 2 - sinks)))
    blocks = [middle[i : i + max_span] for i in range(0, len(middle), max_span)]
    return [(b[0], b[-1] + 1) for b in blocks if len(b) > 1 and all(h[i] >= threshold for i in b)]


def sums_of(truth: Written) -> torch.Tensor:
    return truth.weights.sum(1).view(HKV, GROUP, -1).mean(1)


def merged_by_hand(truth: Written, spans: list, head: int) -> list[dict]:
    """Return the entries of a head after merging."""
    n = truth.keys.shape[1]
    sums = sums_of(truth)[head].tolist()
    entries, i = [], 0
    starts = dict(spans)
    while i < n:
        stop = starts.get(i, i + 1)
        members = range(i, stop)
        total = sum(sums[j] for j in members)
        at = sum(sums[j] * j for j in members) / total
        key = sum(sums[j] / total * truth.keys[head, j] for j in members)
        entries.append(
            {
                "position": round(at),
                "key": rotated(key[None], [at])[0],
                "value": sum(sums[j] / total * truth.values[head, j] for j in members),
                "attn_sum": total,
                "count": len(members),
                "single": len(members) == 1,
                "members": list(members),
            }
        )
        i = stop
    return entries


@pytest.mark.parametrize("count_bias", [False, True])
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (80, {}),
        (45, {"recent": 10}),
        (30, {"recent": 10, "n_sink": 2}),
        (12, {}),  # spans must be longer than max_span
        (5, {"max_span": 2}),
        (2, {}),
        (1, {}),
    ],
)
def test_merging_to_a_budget(world, k, options, count_bias):
    state, truths = world
    policy = create("entropy_merge", {"count_bias": count_bias, **options})
    compressed = policy.compress(state, k)
    widths = set()
    for truth, layer in zip(truths, compressed.layers, strict=True):
        defaults = {"max_span": 8, "n_sink": 4, "recent": 32} | options
        spans, width = spans_by_budget(normalised(truth), k, **defaults)
        widths.add(width)
        assert layer.n == k
        for head in range(HKV):
            expected = merged_by_hand(truth, spans, head)
            assert layer.positions[head].tolist() == [e["position"] for e in expected]
            for j, entry in enumerate(expected):
                torch.testing.assert_close(layer.keys[head, j].double(), entry["key"], rtol=0, atol=2e-5)
                torch.testing.assert_close(layer.values[head, j].double(), entry["value"], rtol=0, atol=1e-5)
                assert float(layer.attn_sum[head, j]) == pytest.approx(entry["attn_sum"], rel=1e-5)
                if count_bias:
                    assert float(layer.bias[head, j]) == pytest.approx(math.log(entry["count"]), abs=1e-6)
        assert (layer.bias is not None) == count_bias
    record = policy.record(state, k)
    assert record["max_span"] == max(widths)
    assert record["spans"] == sum(len(spans_by_budget(normalised(t), k, **defaults)[0]) for t in truths)


@pytest.mark.parametrize("kind", ["entropy_merge", "entropy_drop"])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("max_span", [2, 8])
def test_a_threshold_decides_whatever_the_budget(world, kind, threshold, max_span):
    state, truths = world
    options = {"target": "threshold", "threshold": threshold, "max_span": max_span, "recent": 10}
    policy = create(kind, options)
    compressed = policy.compress(state, N)
    assert same(policy.compress(state, 7), compressed)
    for truth, before, layer in zip(truths, state.layers, compressed.layers, strict=True):
        h = normalised(truth)
        spans = spans_by_threshold(h, threshold, max_span, 4, 10)
        assert layer.n == N - sum(stop - start - 1 for start, stop in spans)
        plan = policy.plan(before, N)
        assert list(plan.spans) == spans
        assert plan.max_span == max_span
        if spans:
            assert plan.lowest == pytest.approx(min(h[i] for start, stop in spans for i in range(start, stop)))
    if threshold == 0.7 and max_span == 2:
        assert 10 < compressed.entries < N  # some spans were merged and some were not


@pytest.mark.parametrize("k", [60, 20, 3])
def test_dropping_keeps_the_most_attended_of_the_same_spans(world, k):
    state, truths = world
    compressed = create("entropy_drop", {}).compress(state, k)
    for truth, got in zip(truths, positions_of(compressed), strict=True):
        spans, _ = spans_by_budget(normalised(truth), k, 8, 4, 32)
        sums = sums_of(truth)
        for head in range(HKV):
            expected = []
            for entry in merged_by_hand(truth, spans, head):
                expected.append(max(entry["members"], key=lambda j: float(sums[head, j])))
            assert got[head] == expected


def test_both_have_the_same_footprint(world):
    state, _ = world
    for options, k in (({}, 40), ({"target": "threshold", "threshold": 0.75}, N)):
        merged, dropped = (create(kind, options).compress(state, k) for kind in ("entropy_merge", "entropy_drop"))
        assert merged.nbytes == dropped.nbytes < state.nbytes
        assert merged.entries == dropped.entries


@pytest.mark.parametrize("average", ["keys", "values"])
@pytest.mark.parametrize("k", [60, 20])
def test_merging_keys_or_values_alone(world, average, k):
    """Check that one part is that of merging and the other that of dropping; positions belong to the keys."""
    state, _ = world
    half = create("entropy_merge", {"average": average}).compress(state, k)
    merged, dropped = (create(kind, {}).compress(state, k) for kind in ("entropy_merge", "entropy_drop"))
    of_keys, of_values = (merged, dropped) if average == "keys" else (dropped, merged)
    for own, keyed, valued in zip(half.layers, of_keys.layers, of_values.layers, strict=True):
        torch.testing.assert_close(own.keys, keyed.keys, rtol=0, atol=1e-6)
        assert torch.equal(own.positions, keyed.positions)
        torch.testing.assert_close(own.values, valued.values, rtol=0, atol=1e-6)


def test_merging_in_some_layers(world):
    state, _ = world
    merged, dropped = (create(kind, {}).compress(state, 40) for kind in ("entropy_merge", "entropy_drop"))
    some = create("entropy_merge", {"first_layer": 1, "last_layer": 1}).compress(state, 40)
    assert len(state.layers) > 1
    for index, layer in enumerate(some.layers):
        truth = merged if index == 1 else dropped
        assert torch.equal(layer.keys, truth.layers[index].keys)
        assert torch.equal(layer.values, truth.layers[index].values)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(2, 60),
    cuts=st.lists(st.integers(0, 60), max_size=12, unique=True),
    seed=st.integers(0, 50),
)
def test_merging_keeps_sums_and_order(n, cuts, seed):
    """Check for any spans that attention sums are preserved, counts add up to n, and positions rise."""
    layer = layer_of(diffuse(n, seed))
    ends = sorted(c for c in cuts if c <= n)
    spans = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False) if b - a > 1]
    merged = merge(layer, spans, count_bias=True)
    assert merged.n == n - sum(b - a - 1 for a, b in spans)
    torch.testing.assert_close(merged.attn_sum.sum(-1), layer.attn_sum.sum(-1), rtol=1e-5, atol=1e-4)
    counts = torch.zeros(HKV, merged.n) if merged.bias is None else merged.bias
    torch.testing.assert_close(counts.exp().sum(-1), torch.full((HKV,), float(n)), rtol=1e-5, atol=1e-4)
    assert (merged.positions.diff(dim=-1) > 0).all()
    inside = {i for a, b in spans for i in range(a, b)}
    for head in range(HKV):
        for j, position in enumerate(merged.positions[head].tolist()):
            if position not in inside:
                assert torch.equal(merged.keys[head, j], layer.keys[head, position])
                assert torch.equal(merged.values[head, j], layer.values[head, position])


def test_merging_equals_leaves_attention_as_it_was():
    """Check that merging equal entries at one position leaves attention unchanged if the count is a bias."""
    truth = diffuse(20, 0)
    truth.keys[:, 6:10] = truth.keys[:, 6:7]
    truth.values[:, 6:10] = truth.values[:, 6:7]
    layer = layer_of(truth)
    at_one_place = layer.angles if layer.angles is not None else layer.positions.float()
    angles = at_one_place.clone()
    angles[:, 6:10] = 7.5
    keys = layer.keys.clone()
    keys[:, 6:10] = rotated(truth.keys[:, 6:10], [7.5] * 4).float()
    layer = replace(layer, keys=keys, angles=angles)
    merged = merge(layer, [(6, 10)], count_bias=True)
    query = torch.randn(HKV, 1, D, generator=torch.Generator().manual_seed(2))

    def attend(part) -> torch.Tensor:
        bias = 0 if part.bias is None else part.bias[:, None]
        return ((query @ part.keys.mT) * part.scale + bias).softmax(-1) @ part.values

    torch.testing.assert_close(attend(merged), attend(layer), rtol=0, atol=1e-5)
    without = merge(layer, [(6, 10)], count_bias=False)
    assert not torch.allclose(attend(without), attend(layer), atol=1e-3)


def test_entries_without_any_attention_are_averaged_evenly():
    layer = layer_of(diffuse(12, 0))
    sums = layer.attn_sum.clone()
    sums[:, 4:7] = 0
    merged = merge(replace(layer, attn_sum=sums), [(4, 7)], count_bias=False)
    torch.testing.assert_close(merged.values[:, 4], layer.values[:, 4:7].mean(1))
    assert merged.positions[:, 4].tolist() == [5, 5]
    assert float(merged.attn_sum[0, 4]) == 0


def test_merged_entries_are_merged_again_with_their_counts(world):
    state, _ = world
    policy = create("entropy_merge", {"count_bias": True, "recent": 8})
    once = grown(policy.compress(state, 40), 30)
    twice = policy.compress(once, 25)
    assert twice.entries == 25
    for layer in twice.layers:
        # every token that was read is counted once
        torch.testing.assert_close(layer.bias.exp().sum(-1), torch.full((HKV,), N + 30.0), rtol=1e-4, atol=1e-3)
        assert (layer.positions.diff(dim=-1) > 0).all()
        assert (layer.angles.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("count_bias", [False, True])
def test_a_model_goes_on_from_merged_entries(count_bias):
    """Check that reading three tokens at once or one by one gives the same; without merging, the full cache's
    logits."""
    reader = engine("llama")
    state = reader.extend(None, tokens(80))
    policy = create("entropy_merge", {"count_bias": count_bias, "recent": 8})
    merged = policy.compress(state, 30)
    together = reader.extend(merged, tokens(3, seed=4))
    one_by_one = merged
    for token in tokens(3, seed=4):
        one_by_one = reader.extend(one_by_one, [token])
    torch.testing.assert_close(together.logits, one_by_one.logits, rtol=0, atol=1e-4)
    assert together.entries == 33
    full = reader.extend(state, tokens(3, seed=4))
    untouched = reader.extend(policy.compress(state, 80), tokens(3, seed=4))
    assert torch.equal(full.logits, untouched.logits)
    assert not torch.allclose(full.logits, together.logits, atol=1e-3)


def test_merging_needs_to_know_the_rotation_and_dropping_does_not(world):
    state, _ = world
    unknown = replace(state, layers=tuple(replace(layer, rotary=None) for layer in state.layers))
    with pytest.raises(UserError, match="use entropy_drop"):
        create("entropy_merge", {}).compress(unknown, 30)
    assert create("entropy_drop", {}).compress(unknown, 30).entries == 30


def test_what_is_recorded_of_a_threshold(world):
    state, _ = world
    record = create("entropy_drop", {"target": "threshold", "threshold": 0.75}).record(state, N)
    assert record["max_span"] == 8
    assert record["lowest_entropy"] is None or record["lowest_entropy"] >= 0.75
    nothing = create("entropy_drop", {"target": "threshold", "threshold": 1.0}).record(state, N)
    assert nothing == {"max_span": 8, "spans": 0, "lowest_entropy": None}
    assert create("entropy_merge", {}).record(random_state(20)[0], 20)["spans"] == 0
