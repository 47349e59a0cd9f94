"""Test bins: no example is lost or duplicated, no bin is empty unnecessarily; the choice is nested and proportional."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transition.data.binning import bin_of, choose, quantile_edges

lengths_and_bins = st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=120), st.integers(1, 8))


@given(lengths_and_bins)
def test_every_length_has_one_bin_by_the_written_rule(drawn):
    lengths, n_bins = drawn
    edges = quantile_edges(lengths, n_bins)
    assert len(edges) == n_bins + 1
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (min(lengths), max(lengths))
    for length in lengths:
        half_open = [b for b in range(n_bins - 1) if edges[b] <= length < edges[b + 1]]
        closed = [n_bins - 1] if edges[-2] <= length <= edges[-1] else []
        assert [bin_of(length, edges)] == half_open + closed


@given(lengths_and_bins)
def test_no_bin_is_empty_when_there_are_enough_different_lengths(drawn):
    lengths, n_bins = drawn
    edges = quantile_edges(lengths, n_bins)
    filled = {bin_of(length, edges) for length in lengths}
    assert len(filled) == min(n_bins, len(set(lengths)))


@given(st.sets(st.integers(1, 10_000), min_size=1, max_size=200), st.integers(1, 8))
def test_different_lengths_are_divided_evenly(lengths, n_bins):
    if len(lengths) < n_bins:
        return
    edges = quantile_edges(sorted(lengths), n_bins)
    sizes = Counter(bin_of(length, edges) for length in lengths)
    assert all(abs(sizes[b] - len(lengths) / n_bins) <= 1 for b in range(n_bins))


def test_clusters_of_equal_lengths_become_bins():
    lengths = [256] * 20 + [512] * 20 + [1024] * 20 + [2048] * 20 + [4096] * 20
    assert quantile_edges(lengths, 5) == [256, 512, 1024, 2048, 4096, 4096]


def test_clusters_of_nearly_equal_lengths_become_bins():
    lengths = [size - d for size in (256, 512, 1024) for d in (0, 1, 2, 3) * 5]
    edges = quantile_edges(lengths, 3)
    assert edges == [253, 509, 1021, 1024]


def test_one_large_cluster_leaves_no_bin_empty():
    lengths = [10] * 96 + [20, 30, 40, 50]
    assert quantile_edges(lengths, 5) == [10, 20, 30, 40, 50, 50]


@pytest.mark.parametrize(
    ("length", "expected"), [(99, None), (100, 0), (199, 0), (200, 1), (399, 1), (400, 2), (800, 2), (801, None)]
)
def test_given_edges_are_half_open_and_the_last_is_closed(length, expected):
    assert bin_of(length, [100, 200, 400, 800]) == expected


kinds_strategy = st.lists(st.sampled_from("abc"), min_size=1, max_size=60)


@given(kinds_strategy, st.integers(0, 70), st.integers(0, 70), st.integers(0, 5))
def test_a_larger_choice_contains_the_smaller(kinds, n, m, seed):
    ids = [f"id{i}" for i in range(len(kinds))]
    n, m = sorted((n, m))
    larger = choose(ids, kinds, m, seed)
    assert choose(ids, kinds, n, seed) == larger[:n]
    assert len(set(larger)) == len(larger) == min(m, len(ids))


@given(kinds_strategy, st.integers(0, 60), st.integers(0, 5))
def test_each_kind_is_chosen_in_proportion(kinds, n, seed):
    ids = [f"id{i}" for i in range(len(kinds))]
    chosen = Counter(kinds[i] for i in choose(ids, kinds, n, seed))
    n = min(n, len(ids))
    totals = Counter(kinds)
    for kind, total in totals.items():
        # Each kind is rounded by at most one half at a common point of the order; the points add up over the kinds.
        share = total / len(ids)
        assert abs(chosen[kind] - share * n) <= 0.5 + share * len(totals) / 2 + 1e-9


@given(st.permutations(range(30)), st.integers(0, 5))
def test_the_order_of_the_input_does_not_matter(order, seed):
    kinds = {i: "ab"[i % 2] for i in range(30)}
    shuffled = choose([f"id{i}" for i in order], [kinds[i] for i in order], 12, seed)
    in_order = choose([f"id{i}" for i in range(30)], [kinds[i] for i in range(30)], 12, seed)
    assert [order[i] for i in shuffled] == in_order


def test_seeds_choose_differently_and_every_example_has_its_chance():
    ids = [f"id{i}" for i in range(10)]
    picks = Counter(choose(ids, [""] * 10, 1, seed)[0] for seed in range(400))
    # binomial(400, 1/10): expected value 40, standard deviation 6; five standard deviations either way
    assert all(10 < picks[i] < 70 for i in range(10))
