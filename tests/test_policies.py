"""Test properties of every policy."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_states import best, grown, positions_of, random_state

from kv_transition.cache.batch import row, stack
from kv_transition.cache.quantize import Packed
from kv_transition.cache.state import same
from kv_transition.errors import UserError
from kv_transition.policies.base import top
from kv_transition.policies.catalog import create, kinds, statistics

MERGING = {"entropy_merge"}
KEEPING_ALL = {"full", "quantized"}
BY_LAYER = {"pyramidkv", "cake", "kvzip", "global"}
EVICTING = [kind for kind in kinds() if kind not in KEEPING_ALL]
VARIANTS = [
    *((kind, {}) for kind in EVICTING),
    ("streaming_llm", {"positions": "cache"}),
    ("streaming_llm", {"n_sink": 20, "recent": 5}),
    ("random", {"per_head": False}),
    ("snapkv", {"pooling": "mean", "window": 5}),
    ("adakv", {"floor": 1.0}),
    ("lagkv", {"lag": 3}),
    ("chunkkv", {"chunk": 3, "window": 5}),
    ("r_kv", {"horizon": None, "every": 1}),
    ("cake", {"window": 5, "tau1": 2.0, "gamma": 0.0}),
    ("knorm", {"window": 4, "n_sink": 3, "kernel": 5, "pooling": "mean"}),
    ("keydiff", {"allocation": "adaptive", "kernel": 3, "weighting": "projected_values"}),
    ("snapkv", {"allocation": "global", "weighting": "projected_values"}),
    ("kvzip", {"allocation": "uniform"}),
    ("expected_attention", {"allocation": "adaptive", "window": 6}),
    ("entropy_merge", {"count_bias": True, "max_span": 3, "recent": 2}),
]
NAMES = [f"{kind}-{options}" if options else kind for kind, options in VARIANTS]


@settings(max_examples=150, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    n=st.integers(1, 60),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**40),
    keep_last=st.booleans(),
)
def test_a_budget_is_kept_to(variant, n, k, seed, keep_last):
    """Check min(K, n) entries in rising order without duplicates, the last one if requested, repeatability, and no side
    effect."""
    kind, options = variant
    state, _ = random_state(n, seed=n)
    policy = create(kind, options)
    k_kept = policy.keep(k)
    compressed = policy.compress(state, k, seed=seed, keep_last=keep_last)
    assert same(state, random_state(n, seed=n)[0])
    assert compressed.entries == min(k_kept, n)
    assert compressed.length == n
    for layer in compressed.layers:
        if kind not in BY_LAYER and options.get("allocation") not in BY_LAYER:
            assert layer.n == min(k_kept, n)
        for part in layer.parts:
            assert part.n >= 1
            assert (part.positions.diff(dim=-1) > 0).all()
            assert part.positions.min() >= 0
            assert part.positions.max() < n
            assert part.keys.shape[-2] == part.values.shape[-2] == part.attn_sum.shape[-1] == part.n
            if keep_last:
                assert (part.positions[:, -1] == n - 1).all()
    again = policy.compress(state, k, seed=seed, keep_last=keep_last)
    assert same(compressed, again)
    if k_kept >= n:
        assert same(compressed, state)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 40, 64])
@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_survivors_keep_all_they_had(kind, options, k):
    state, _ = random_state(70)
    compressed = create(kind, options).compress(state, k)
    for before, after in zip(state.layers, compressed.layers, strict=True):
        first = 0
        for part in after.parts:
            heads = part.positions.shape[0]
            for own in range(heads):
                for entry, position in enumerate(part.positions[own].tolist()):
                    merged = part.angles is not None and float(part.angles[own, entry]) != position
                    if kind in MERGING and (
                        merged or float(part.attn_sum[own, entry]) != float(before.attn_sum[first + own, position])
                    ):
                        continue
                    for name in ("values", "attn_sum", "query_entropy"):
                        old, new = getattr(before, name)[first + own, position], getattr(part, name)[own, entry]
                        assert torch.equal(old, new)
                    if not merged:
                        old, new = before.keys[first + own, position], part.keys[own, entry]
                        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
            first += heads


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_protected_entries_take_at_most_half(kind, options):
    policy = create(kind, options)
    for k in range(1, 200):
        half = policy.keep(k) - policy.recent if options.get("recent") and kind == "streaming_llm" else 0
        assert 0 <= policy.protected(k) <= max(k // 2, half)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_a_conversation_is_compressed_again_and_again(kind, options):
    """Check that after each turn the budget holds, and that evicted entries never return."""
    state, _ = random_state(50)
    policy = create(kind, options)
    gone: list[list[set[int]]] = [[set() for _ in range(2)] for _ in range(3)]
    for turn, k in enumerate([25, 30, 31, 12]):
        before = positions_of(state)
        state = policy.compress(state, k, seed=turn)
        assert state.entries <= policy.keep(k)
        if kind not in BY_LAYER:
            assert state.entries == policy.keep(k)
        after = positions_of(state)
        for layer in range(3):
            for head in range(2):
                now = set(after[layer][head])
                assert len(now) == len(after[layer][head])
                if kind not in MERGING:
                    assert now <= set(before[layer][head])
                    gone[layer][head] |= set(before[layer][head]) - now
                    assert not now & gone[layer][head]
        state = grown(state, 17, seed=turn)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_the_last_token_can_be_taken_back_and_read_again(kind, options, k):
    state, _ = random_state(60)
    compressed = create(kind, options).compress(state, k, keep_last=True)
    shorter = compressed.without_last()
    assert shorter.length == 59
    assert shorter.entries == compressed.entries - 1


@pytest.mark.parametrize("kind", EVICTING)
def test_only_declared_statistics_are_read(kind):
    """Check that undeclared statistics do not change the choice; a missing declared statistic gives one sentence."""
    state, _ = random_state(60)
    policy = create(kind, {})
    every = {"output_norm", "reconstruction", "attn_sum", "query_entropy", "recent_queries", "query_mean", "query_cov"}
    needed = statistics(kind)
    bare = replace(state, layers=tuple(layer.without(frozenset(every - needed)) for layer in state.layers))
    assert positions_of(policy.compress(bare, 20)) == positions_of(policy.compress(state, 20))
    for name in needed:
        poor = replace(state, layers=tuple(layer.without(frozenset({name})) for layer in state.layers))
        with pytest.raises(UserError, match=f"{kind} reads {name}"):
            policy.compress(poor, 20)


@pytest.mark.parametrize(("kind", "options"), [*VARIANTS, ("quantized", {})], ids=[*NAMES, "quantized"])
def test_layers_with_a_sliding_window_are_left_alone(kind, options):
    state, _ = random_state(40)
    sliding = replace(state.layers[1], window=40)
    state = replace(state, layers=(state.layers[0], sliding, state.layers[2]))
    compressed = create(kind, options).compress(state, 10)
    after = compressed.layers[1]
    assert torch.equal(after.positions, sliding.positions)
    assert torch.equal(after.values, sliding.values)
    if compressed.shift == 0:
        assert after is sliding


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("streaming_llm", {}),
        ("streaming_llm", {"positions": "cache"}),
        ("h2o", {}),
        ("h2o_heavy", {}),
        ("tova", {}),
        ("r_kv", {}),
        ("r_kv", {"window": 3, "kernel": 1, "horizon": 7}),
        ("quantized", {}),
    ],
)
def test_a_batch_is_treated_as_its_sequences_one_by_one(kind, options):
    """Check policies that evict at each decode step, on sequences of different lengths that hold equal numbers of
    entries."""
    policy = create(kind, options)
    singles = []
    for n, seed in ((30, 1), (52, 2), (90, 3)):
        singles.append(grown(policy.compress(random_state(n, seed=seed)[0], 20), 1, seed=seed))
    if kind == "quantized":
        singles = [grown(policy.compress(random_state(30, seed=s)[0], 1), 1, seed=s) for s in range(3)]
    every = frozenset({"attn_sum", "recent_queries"})
    batch = policy.compress(stack([replace(s, logits=torch.zeros(5)) for s in singles], every), 20)
    for number, single in enumerate(singles):
        alone, together = policy.compress(single, 20), row(batch, number)
        assert positions_of(alone) == positions_of(together)
        assert alone.shift == together.shift
        for a, b in zip(alone.layers, together.layers, strict=True):
            x, y = (t.keys.dense() if isinstance(t.keys, Packed) else t.keys for t in (a, b))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_top_breaks_ties_towards_the_lower_index(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert top(torch.tensor([scores], dtype=torch.float32), k)[0].tolist() == best(scores, k)


def test_full_keeps_everything():
    state, _ = random_state(20)
    assert create("full", {}).compress(state, 3) is state


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_packs_everything_whatever_the_budget(bits, dtype):
    state, _ = random_state(30, dtype=dtype)
    policy = create("quantized", {"bits": bits})
    packed = policy.compress(state, 5)
    assert packed.entries == 30
    # 8 channels in one group: codes, scale and zero point
    pair = 8 if dtype == torch.float32 else 4
    assert packed.nbytes == 3 * 2 * 2 * 30 * (bits + pair)
    for before, after in zip(state.layers, packed.layers, strict=True):
        assert torch.equal(after.keys.dense(), Packed.pack(before.keys, bits).dense())
        assert torch.equal(after.values.dense(), Packed.pack(before.values, bits).dense())
    assert policy.compress(packed, 5).layers == packed.layers
    # new tokens are quantized when they are appended, and the last one can be removed
    longer = grown(packed, 2)
    assert longer.layers[0].keys.shape[-2] == 32
    shorter = longer.without_last()
    assert shorter.layers[0].n == 31
    assert torch.equal(shorter.layers[0].keys.dense()[:, :30], packed.layers[0].keys.dense())


def test_the_catalog_reads_from_the_source_what_the_classes_say():
    from kv_transition.policies import catalog

    for kind in kinds():
        policy = create(kind, {})
        declared = {field.name: field.default for field in dataclasses.fields(policy)}
        assert declared == catalog.hyper_parameters(kind)
        assert policy.statistics == catalog.statistics(kind)
        assert policy.acts_each_step == catalog.acts_each_step(kind)
        ignores = policy.ignores_budget
        if isinstance(ignores, tuple):
            name, value = ignores
            assert catalog.ignores_budget(kind, declared | {name: value})
            ignores = declared[name] == value
        assert ignores == catalog.ignores_budget(kind, declared)
