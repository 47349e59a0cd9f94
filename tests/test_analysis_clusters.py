"""Test sums and means over clusters, compared with their definition and scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kv_transition.stats import clusters

CELLS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=20)


@given(CELLS)
def test_spread_is_that_of_the_cluster_sums_around_the_mean(cell):
    values, codes = np.array([v for v, _ in cell]), np.array([c for _, c in cell])
    found = clusters.moments(values[None], codes[None].astype(float))
    expected = sum((values[codes == c].sum() - (codes == c).sum() * values.mean()) ** 2 for c in set(codes.tolist()))
    assert found.spread[0] == pytest.approx(expected, abs=1e-9)
    assert found.effective[0] == pytest.approx(len(cell) ** 2 / sum((codes == c).sum() ** 2 for c in set(codes)))
    assert clusters.number(values[None], codes[None].astype(float))[0] == len(set(codes.tolist()))


def test_missing_values_are_in_no_cluster():
    values, codes = np.array([[0.5, np.nan, 1.0]]), np.array([[0.0, 1.0, 1.0]])
    count, total = clusters.sums(values, codes)
    assert count.tolist() == [[1, 1]]
    assert total.tolist() == [[0.5, 1.0]]


def test_resampled_sums_have_the_bootstraps_mean_and_variance():
    rng = np.random.default_rng(0)
    columns = np.stack([rng.random(30), np.ones(30)], axis=1)
    found = clusters.resample_sums(columns, 20_000, 1)
    assert found.shape == (20_001, 2)
    assert found[0] == pytest.approx(columns.sum(axis=0))
    assert (found[:, 1] == 30).all()
    # n draws with replacement: the variance of their sum is n times the population variance
    assert found[1:, 0].mean() == pytest.approx(columns[:, 0].sum(), abs=4 * (30 * columns[:, 0].var() / 20_000) ** 0.5)
    assert found[1:, 0].var() == pytest.approx(30 * columns[:, 0].var(), rel=0.05)


def test_resampled_means_agree_with_scipys_bootstrap():
    values = np.random.default_rng(2).beta(2, 1, 40)
    ours = np.quantile(clusters.resample_sums(values[:, None], 20_000, 0)[1:, 0] / 40, [0.025, 0.975])
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=3).confidence_interval
    assert ours == pytest.approx([theirs.low, theirs.high], abs=0.004)


def test_draws_do_not_depend_on_the_columns_beside():
    columns = np.random.default_rng(5).random((9, 3))
    together = clusters.resample_sums(columns, 50, 7)
    for i in range(3):
        assert together[:, i] == pytest.approx(clusters.resample_sums(columns[:, i : i + 1], 50, 7)[:, 0])
