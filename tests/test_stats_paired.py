"""Test the inference for pairs: the interval excludes a value exactly if the test rejects it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_scores import cell_rows, table

from kv_transition.stats import multiplicity, paired
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import comparisons as c
from kv_transition.studies.grid.analysis import noninferiority as ni

SCORE = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, allow_nan=False).map(lambda v: round(v, 3)))
PAIRS = st.lists(st.tuples(SCORE, SCORE, st.integers(0, 6)), min_size=1, max_size=60)
LEVEL = st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5])


def arrays(pairs, clustered):
    policy, full, codes = (np.array([column], dtype=float) for column in zip(*pairs, strict=True))
    return policy, full, np.unique(codes, return_inverse=True)[1].reshape(1, -1).astype(float) if clustered else None


def excludes(found, value):
    return bool(found.low[0] > value or found.high[0] < value)


@given(PAIRS, LEVEL, st.booleans())
def test_a_difference_excludes_0_exactly_where_p_is_below_the_level(pairs, alpha, clustered):
    policy, full, codes = arrays(pairs, clustered)
    for values in (policy - full, np.sign(policy - full)):
        tested = paired.difference(values, codes)
        assume(abs(tested.p[0] - alpha) > 1e-9)
        assert excludes(tested.interval(1 - alpha), 0) == (tested.p[0] < alpha)


@given(PAIRS, LEVEL, st.booleans())
def test_a_ratio_excludes_1_exactly_where_the_difference_excludes_0(pairs, alpha, clustered):
    policy, full, codes = arrays(pairs, clustered)
    assume(full.any())
    tested = paired.difference(policy - full, codes)
    assume(abs(tested.p[0] - alpha) > 1e-9)
    assert excludes(paired.ratio(policy, full, 1 - alpha, codes), 1) == (tested.p[0] < alpha)


@given(PAIRS, LEVEL, st.booleans())
def test_non_inferior_is_what_keeps_both_intervals_above_the_margin(pairs, alpha, clustered):
    """Check that the lower bounds of difference and ratio exclude the margin exactly if p is below the level."""
    policy, full, codes = arrays(pairs, clustered)
    assume(full.any())
    tested = ni.margin(policy - ni.KEPT * full, ni.KEPT, codes)
    found, p = tested.interval(1 - alpha), tested.p_above
    assume(abs(p[0] - alpha / 2) > 1e-9)
    assert (found.low[0] > 0) == (p[0] < alpha / 2)
    assert (paired.ratio(policy, full, 1 - alpha, codes).low[0] > ni.KEPT) == (p[0] < alpha / 2)


def test_the_test_is_students_with_one_more_pair():
    values = np.random.default_rng(0).normal(-0.1, 0.3, 30).clip(-1, 1)
    tested = paired.difference(values[None])
    lost, gained = (stats.ttest_1samp(np.append(values, end), 0) for end in (-1, 1))
    one_sided = stats.ttest_1samp(np.append(values, 1), 0, alternative="less").pvalue
    assert tested.p[0] == pytest.approx(2 * one_sided)
    found = tested.interval(0.95)
    assert found.low[0] == pytest.approx(lost.confidence_interval(0.95).low)
    assert found.high[0] == pytest.approx(gained.confidence_interval(0.95).high)


def test_equal_pairs_do_not_prove_equality():
    found = paired.difference(np.zeros((1, 20))).interval(0.95)
    # the rule of three: with 0 differing pairs of 20, up to 3 / 20 may differ
    assert (-found.low[0], found.high[0]) == pytest.approx((3 / 20, 3 / 20), abs=0.02)
    ratio = paired.ratio(np.ones((1, 20)), np.ones((1, 20)), 0.95)
    assert ratio.estimate[0] == 1
    assert 0.8 < ratio.low[0] < 0.95


def test_no_pairs_no_bounds():
    nothing = np.full((1, 3), np.nan)
    tested = paired.difference(nothing)
    assert np.isnan([tested.p[0], tested.interval(0.95).low[0]]).all()
    found = paired.ratio(np.array([[0.0, 0, 1], [0, 0, 0]]), np.zeros((2, 3)), 0.95)
    assert found.row(0)["estimate"] is None
    assert found.row(1)["ci_low"] is None


def test_the_bounds_of_a_ratio_are_where_students_test_changes_its_mind():
    rng = np.random.default_rng(0)
    y = (rng.random(60) < 0.8).astype(float)
    x = y * (rng.random(60) < 0.7)
    found = paired.ratio(x[None], y[None], 0.95)
    for rho, (more_x, more_y), sign in ((found.low[0], (0, 1), 1), (found.high[0], (1, 0), -1)):
        t = stats.ttest_1samp(np.append(x, more_x) - rho * np.append(y, more_y), 0).statistic
        assert t == pytest.approx(sign * stats.t.ppf(0.975, 60))


def test_copies_of_examples_tell_nothing_new():
    rng = np.random.default_rng(8)
    values = rng.uniform(-1, 1, (1, 12))
    once = paired.difference(values)
    copies = paired.difference(np.repeat(values, 4, axis=1), np.repeat(np.arange(12.0), 4)[None])
    assert (copies.n[0], copies.clusters[0]) == (48, 12)
    assert copies.p[0] == pytest.approx(once.p[0])
    assert "clusters" in copies.method[0]


@pytest.mark.parametrize("n", [5, 20, 100])
def test_false_alarms_are_rare(n):
    """Check pairs without a mean difference: coins, rare coins, rare large losses against frequent small gains."""
    rng, draws = np.random.default_rng(n), 4000
    u = rng.random((draws, n))
    for values in (
        np.where(u < 0.5, 1.0, -1.0),
        np.where(u < 0.05, 1.0, np.where(u < 0.1, -1.0, 0.0)),
        np.where(u < 0.05, -0.9, 0.9 * 0.05 / 0.95),
    ):
        # 5 % plus 3 standard errors of the simulation
        assert np.mean(paired.difference(values).p < 0.05) <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12), LEVEL)
def test_levels_agree_with_holm_and_are_never_below_bonferroni(p, alpha):
    p = np.array(p)
    assume(np.abs(np.outer(p, np.arange(1, 13)) - alpha).min() > 1e-9)
    levels = multiplicity.levels(p, alpha)
    adjusted = multiplicity.holm(p[None], np.array([len(p)]))[0]
    assert ((p < levels) == (adjusted < alpha)).all()
    assert (levels >= alpha / len(p) - 1e-12).all()
    assert (levels <= alpha + 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_in_the_table_each_interval_agrees_with_the_p_beside_it(seed):
    rng, rows, none = np.random.default_rng(seed), [], np.zeros((24, 1), bool)
    for bin in range(3):
        full = (rng.random((24, 1)) < 0.95).astype(float)
        rows += cell_rows(full, none, bin=bin)
        for i, lost in enumerate((0.0, 0.15, 0.3, 0.5)):
            score = np.where(rng.random((24, 1)) < lost, rng.choice([0, 0.5, 0.8], (24, 1)), full)
            rows += cell_rows(score, rng.random((24, 1)) < lost / 2, policy=f"p{i}", budget="r0.5", bin=bin)
    for found in (c.comparisons(table(rows), Statistics()), c.pairs(table(rows), Statistics())):
        frame = pl.from_arrow(found).drop_nulls("p_value")
        for low, high, p in (("ci_low", "ci_high", "p_value"), ("effect_low", "effect_high", "effect_p"),
                             ("holm_low", "holm_high", "p_holm")):  # fmt: skip
            apart = (frame[low] > 0) | (frame[high] < 0)
            assert (apart == (frame[p] < 0.05)).all()
            assert 0 < apart.sum() < frame.height


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(30, 120), confidence=st.sampled_from([0.8, 0.95]))
def test_the_smallest_budget_is_down_to_where_the_ratio_lies_above_the_margin(seed, n, confidence):
    """Compare with the intervals in the table, before Holm's adjustment, for each policy in each bin and over all
    bins."""
    rng, rows, none = np.random.default_rng(seed), [], np.zeros((n, 1), bool)
    shares = ("r0.8", "r0.5", "r0.2", "r0.1")
    for bin in range(2):
        full = (rng.random((n, 1)) < 0.95).astype(float)
        rows += cell_rows(full, none, bin=bin)
        for policy, lost in (("good", 0.005), ("fair", 0.03)):
            for steps, budget in enumerate(shares):
                score = np.where(rng.random((n, 1)) < lost * steps, rng.choice([0, 0.9], (n, 1)), full)
                rows += cell_rows(score, none, policy=policy, budget=budget, bin=bin)
    how = Statistics(confidence)
    tested = ni.noninferiority(table(rows), how)
    ratios = {(r["policy"], r["bin"], r["budget"]): r["ratio_low"] for r in tested.to_pylist()}
    for row in ni.smallest_budgets(tested, how).to_pylist():
        above = [ratios[row["policy"], row["bin"], budget] > ni.KEPT for budget in shares]
        passed = shares[: above.index(False)] if False in above else shares
        assert row["budget_unadjusted"] == (passed[-1] if passed else None)
