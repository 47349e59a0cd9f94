"""Test confidence intervals of means, medians, spreads and rates: closed forms, peers, and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.api import OLS

from kv_transition.stats import intervals, paired

Z = 1.959963984540054
SCORES = st.lists(st.floats(0, 1).map(lambda v: round(v, 3)), min_size=1, max_size=25)


def one(values, **kwargs):
    return intervals.bounded_mean(np.array([values], dtype=float), 0.95, **kwargs)


def wilson(p: float, n: int) -> tuple[float, float]:
    middle, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


@pytest.mark.parametrize(("right", "n"), [(18, 20), (1, 5), (3, 7), (50, 100)])
def test_coin_data_have_wilsons_interval(right, n):
    found = one([1] * right + [0] * (n - right))
    assert (found.low[0], found.high[0]) == pytest.approx(wilson(right / n, n))
    assert found.method[0] == intervals.WILSON


@given(SCORES)
def test_bounds_enclose_the_mean_and_stay_in_range(values):
    found = one(values)
    assert 0 <= found.low[0] <= found.estimate[0] + 1e-12
    assert found.estimate[0] - 1e-12 <= found.high[0] <= 1
    assert found.high[0] > found.low[0], "no finite sample pins a mean down"


@given(SCORES)
def test_mirrored_scores_have_the_mirrored_interval(values):
    found, mirrored = one(values), one([1 - v for v in values])
    assert found.low[0] == pytest.approx(1 - mirrored.high[0], abs=1e-9)


@given(st.lists(SCORES, min_size=1, max_size=5))
def test_cells_do_not_touch_each_other_and_padding_does_not_count(cells):
    width = max(map(len, cells)) + 2
    padded = np.array([cell + [np.nan] * (width - len(cell)) for cell in cells])
    for function in (intervals.bounded_mean, intervals.bounded_std, intervals.mean):
        together = function(padded, 0.95)
        for i, cell in enumerate(cells):
            alone = function(np.array([cell]), 0.95)
            for field in ("estimate", "low", "high", "n"):
                assert getattr(together, field)[i] == pytest.approx(getattr(alone, field)[0], nan_ok=True)


def test_graded_scores_need_fewer_examples_than_coins():
    graded, coins = one([0.45, 0.5, 0.55, 0.5] * 5), one([0, 1, 0, 1] * 5)
    assert graded.high[0] - graded.low[0] < 0.5 * (coins.high[0] - coins.low[0])
    assert graded.method[0] == intervals.WILSON_EFFECTIVE


def test_degenerate_cells_are_wide_or_null():
    cells = np.array([[np.nan] * 20, [1.0] + [np.nan] * 19, [1.0] * 20, [0.0] * 20, [0.4] * 20])
    found = intervals.bounded_mean(cells, 0.95)
    assert found.row(0) == {
        "estimate": None,
        "ci_low": None,
        "ci_high": None,
        "n": 0,
        "clusters": 0,
        "method": intervals.WILSON,
    }
    assert found.high[1] - found.low[1] > 0.7
    assert found.high[2] == 1
    assert found.low[2] == pytest.approx(wilson(1, 20)[0])
    assert found.low[3] == 0
    assert 0.05 < found.high[4] - found.low[4] < 0.3
    spread = intervals.bounded_std(cells, 0.95)
    assert np.isnan(spread.low[:2]).all()
    assert spread.estimate[4] == pytest.approx(0)
    assert spread.high[2] == pytest.approx((wilson(1, 20)[0] * (1 - wilson(1, 20)[0])) ** 0.5)


def test_a_value_out_of_bounds_is_refused():
    with pytest.raises(ValueError, match="outside"):
        one([0.5, 1.2])


def test_median_has_the_textbook_order_statistics():
    values = np.arange(1.0, 21)[None]
    found = intervals.percentile(values, 0.5, 0.95)
    assert (found.estimate[0], found.low[0], found.high[0]) == (10.5, 6, 15)


def test_percentiles_leave_open_what_few_examples_cannot_bound():
    """Check that a bound of a percentile is null if the sample is too small to bound it."""
    found = intervals.percentile(np.array([[1.0, 2, 3, 4, 5]]), 0.5, 0.95).row(0)
    assert (found["ci_low"], found["ci_high"]) == (None, None)
    upper = intervals.percentile(np.arange(1.0, 21)[None], 0.95, 0.95).row(0)
    assert upper["ci_low"] is not None
    assert upper["ci_high"] is None
    assert "too small" in upper["method"]


def test_student_mean_agrees_with_scipy_and_has_no_bounds_from_one_value():
    values = np.array([[3.0, 5, 4, 8, 6], [7, np.nan, np.nan, np.nan, np.nan]])
    found = intervals.mean(values, 0.95)
    expected = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high))
    assert found.row(1)["ci_low"] is None


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(5)
    covered = []
    for n in (5, 20):
        for zero, one_, mean_of_rest in ((0.9, 0.1, 0.5), (0.05, 0.95, 0.5), (0.1, 0.6, 0.5), (0.0, 0.0, 0.5)):
            u, rest = rng.random((2000, n)), rng.beta(2, 2, (2000, n))
            values = np.where(u < zero, 0, np.where(u < zero + one_, 1, rest))
            truth = one_ + (1 - zero - one_) * mean_of_rest
            found = intervals.bounded_mean(values, 0.95)
            covered.append(np.mean((found.low <= truth) & (truth <= found.high)))
    assert np.mean(covered) >= 0.94
    assert min(covered) >= 0.90


def test_the_spread_is_covered_where_its_rare_zero_is_not_in_the_sample():
    """Check the coverage of the standard deviation if rare zeros are often absent from the sample."""
    rng, n, covered = np.random.default_rng(6), 20, []
    for zero, a, b in ((0.02, 8, 2), (0.05, 8, 2), (0.0, 5, 1), (0.0, 2, 5)):
        values = np.where(rng.random((800, n)) < zero, 0, rng.beta(a, b, (800, n)))
        mean = (1 - zero) * a / (a + b)
        square = (1 - zero) * a * (a + 1) / ((a + b) * (a + b + 1))
        found = intervals.bounded_std(values, 0.95)
        truth = (square - mean**2) ** 0.5
        covered.append(np.mean((found.low <= truth) & (truth <= found.high)))
    assert np.mean(covered) >= 0.94
    assert min(covered) >= 0.90


# ----------------------------------------------------------------------------------------------------
# Clusters


def functions():
    return {
        "rate": lambda v, c: intervals.bounded_mean(v, 0.95, clusters=c),
        "std": lambda v, c: intervals.bounded_std(v, 0.95, c),
        "mean": lambda v, c: intervals.mean(v, 0.95, c),
        "median": lambda v, c: intervals.percentile(v, 0.5, 0.95, c),
        "ratio": lambda v, c: paired.ratio(v, np.clip(v + 0.1, 0, 1), 0.95, c),
    }


@pytest.mark.parametrize("name", functions())
@given(SCORES)
def test_one_example_a_cluster_is_no_cluster_at_all(name, values):
    """Check that clusters of one example each give the same interval as no clusters."""
    function, row = functions()[name], np.array([values])
    alone, singles = function(row, None), function(row, np.arange(len(values))[None].astype(float))
    for field in ("estimate", "low", "high", "n"):
        assert getattr(singles, field)[0] == pytest.approx(getattr(alone, field)[0], nan_ok=True, abs=1e-9)
    assert singles.method[0] == alone.method[0]


@pytest.mark.parametrize("name", functions())
def test_copies_of_examples_tell_nothing_new(name):
    rng = np.random.default_rng(8)
    values = rng.beta(2, 2, (1, 12))
    copies, codes = np.repeat(values, 4, axis=1), np.repeat(np.arange(12.0), 4)[None]
    once, fourfold = functions()[name](values, None), functions()[name](copies, codes)
    assert (fourfold.n[0], fourfold.clusters[0]) == (48, 12)
    assert fourfold.high[0] - fourfold.low[0] >= 0.9 * (once.high[0] - once.low[0])
    if name in ("rate", "mean", "median", "ratio"):
        assert (fourfold.low[0], fourfold.high[0]) == pytest.approx((once.low[0], once.high[0]), abs=1e-9)
    assert "clusters" in fourfold.method[0]


def test_cluster_robust_mean_agrees_with_statsmodels():
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 7, 40)
    values = rng.normal(3, 1, 7)[codes] + rng.normal(0, 1, 40)
    found = intervals.mean(values[None], 0.95, codes[None].astype(float))
    fit = OLS(values, np.ones(40)).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    assert (found.low[0], found.high[0]) == pytest.approx(tuple(fit.conf_int()[0]), abs=1e-6)


def test_a_rate_over_clusters_by_hand():
    # three documents of two answers, with 2, 1 and 0 right answers: m = 1/2, cluster residuals 1, 0 and -1
    values, codes = np.array([[1.0, 1, 1, 0, 0, 0]]), np.array([[0.0, 0, 1, 1, 2, 2]])
    phi = min((2 / 0.25 + 2 * 2**2) / (6 - 2 + 2 * 2), 2)
    shrink = Z / stats.t.ppf(0.975, 3 - 1 + 2)
    expected = wilson(0.5, 6 / phi * shrink**2)
    found = intervals.bounded_mean(values, 0.95, clusters=codes)
    assert (found.low[0], found.high[0]) == pytest.approx(expected, abs=1e-6)


def test_equal_answers_count_as_often_as_there_are_documents():
    values, codes = np.ones((1, 20)), np.repeat(np.arange(4.0), 5)[None]
    found = intervals.bounded_mean(values, 0.95, clusters=codes)
    assert found.low[0] <= wilson(1, 4)[0] + 1e-9


def test_clustered_intervals_cover_where_ignoring_documents_does_not():
    """Check by simulation that intervals by document cover the true value and intervals by answer do not."""
    rng, rows, documents, each = np.random.default_rng(9), 1500, 10, 5
    rates = rng.beta(0.6, 0.6, (rows, documents)).repeat(each, axis=1)
    values = (rng.random(rates.shape) < rates).astype(float)
    codes = np.tile(np.arange(documents).repeat(each).astype(float), (rows, 1))
    shares = []
    for clusters in (codes, None):
        found = intervals.bounded_mean(values, 0.95, clusters=clusters)
        shares.append(np.mean((found.low <= 0.5) & (found.high >= 0.5)))
    assert shares[0] >= 0.92
    assert shares[1] < 0.85
