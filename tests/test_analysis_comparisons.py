"""Test comparisons of policies with each other: differences, effect sizes, and the minimum detectable difference."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats
from simulated_scores import BUDGETS, MODES, POLICIES, cell_rows, demo, table
from statsmodels.stats.multitest import multipletests

from kv_transition.stats import paired
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import comparisons as c

SETTINGS = Statistics(resamples=1000)


def cell(values, **key):
    scores = np.array(values, dtype=float)[:, None]
    return cell_rows(scores, np.zeros(scores.shape, bool), **key)


@pytest.fixture(scope="module")
def simulated():
    return demo(n=8)


@pytest.fixture(scope="module")
def frame(simulated):
    return pl.from_arrow(c.pairs(simulated, SETTINGS))


def test_every_pair_of_policies_stands_once_per_bin_and_over_all(frame):
    """Check that each pair of policies has one row per bin and one over all bins, with Holm's adjustment by family."""
    pairs = len(POLICIES) * (len(POLICIES) - 1) // 2
    assert frame.height == len(MODES) * len(BUDGETS) * pairs * (5 + 1) * 2
    assert (frame["policy"] < frame["reference_policy"]).all()
    assert (frame["budget"] == frame["reference_budget"]).all()
    for _, family in frame.group_by("family"):
        expected = multipletests(family["p_value"].to_numpy(), method="holm")[1]
        assert family["p_holm"].to_numpy() == pytest.approx(expected, abs=1e-6)


def test_pairs_are_differences_of_the_differences_from_full(simulated, frame):
    key = {"mode": "after_prompt", "budget": "r0.2", "bin": 3, "statistic": "score"}
    against_full = pl.from_arrow(c.comparisons(simulated, SETTINGS)).filter(**key)
    of = dict(against_full.select("policy", "estimate").iter_rows())
    for row in frame.filter(**key).iter_rows(named=True):
        assert row["estimate"] == pytest.approx(of[row["policy"]] - of[row["reference_policy"]], abs=1e-9)


def test_effect_is_the_share_better_minus_the_share_worse():
    rows = cell([1, 1, 0.5, 0, 1]) + cell([0.5, 0, 0.5, 0.2, 0.9], policy="h2o", budget="r0.5")
    row = pl.from_arrow(c.comparisons(table(rows), SETTINGS)).filter(statistic="score", bin=0).row(0, named=True)
    assert row["effect"] == pytest.approx((1 - 3) / 5)
    assert row["effect_low"] < row["effect"] < row["effect_high"]
    assert row["estimate"] == pytest.approx((-0.5 - 1 + 0 + 0.2 - 0.1) / 5)


def test_what_is_called_detectable_is_detected_four_times_in_five():
    """Check by simulation that the test finds the minimum detectable difference with a power of about 80 %."""
    rng, n, loss, trials = np.random.default_rng(0), 60, 0.25, 3000
    none = np.zeros((n, 1), bool)
    lost = np.where(np.arange(n)[:, None] < loss * n, 0.0, 1.0)
    rows = cell_rows(np.ones((n, 1)), none) + cell_rows(lost, none, policy="h2o", budget="r0.5")
    row = pl.from_arrow(c.comparisons(table(rows), SETTINGS)).filter(statistic="score", bin=0).row(0, named=True)
    # the same spread around a mean whose distance from 0 is the minimum detectable difference
    samples = rng.choice(lost[:, 0] - 1 + loss, (trials, n)) - row["mdd"]
    found = (paired.difference(samples, ends=(-2, 1)).p < 0.05).mean()
    assert found == pytest.approx(c.POWER, abs=0.06)


@pytest.mark.parametrize(
    ("n", "alpha", "some"), [(5, 0.05, False), (6, 0.05, True), (9, 0.002, False), (1, 0.5, False)]
)
def test_nothing_is_detectable_where_not_even_losing_every_pair_is_significant(n, alpha, some):
    """Check that there is no minimum detectable difference if even a loss in every pair is not significant."""
    assert (c.detectable(n, alpha) is not None) == some
    if n > 1:
        assert (2 * stats.ttest_1samp([-1.0] * n + [1], 0, alternative="less").pvalue < alpha) == some


def test_mdd_falls_with_n_and_is_never_zero():
    found = []
    for n in (20, 80):
        rows = cell([1.0] * n) + cell([1.0] * n, policy="h2o", budget="r0.5")
        frame = pl.from_arrow(c.comparisons(table(rows), SETTINGS)).filter(statistic="score", bin=0)
        found.append(frame["mdd"][0])
    assert 0 < found[1] < found[0] < 1


def test_documents_are_the_unit_of_a_comparison():
    full = cell_rows(np.ones((20, 1)), np.zeros((20, 1), bool), per_document=5)
    values = np.repeat([[1.0], [0.0], [0.5], [1.0]], 5, axis=0)
    policy = cell_rows(values, np.zeros((20, 1), bool), policy="h2o", budget="r0.5", per_document=5)
    frame = pl.from_arrow(c.comparisons(table(full + policy), SETTINGS))
    row = frame.filter(statistic="score", bin=0).row(0, named=True)
    assert (row["n"], row["clusters"]) == (20, 4)
    # Cluster sums of four documents of five answers, plus one document that is gained; two documents differ.
    assert row["p_value"] == pytest.approx(2 * stats.ttest_1samp([0, -1, -0.5, 0, 1], 0, alternative="less").pvalue)
    assert "clusters" in row["method"]
    assert row["mdd"] is None
    alone = paired.difference((values - 1).T).interval(0.95)
    assert row["ci_high"] - row["ci_low"] > alone.high[0] - alone.low[0]
