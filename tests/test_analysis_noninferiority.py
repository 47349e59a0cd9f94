"""Test non-inferiority to the full cache: the margin, error rates, and the smallest budget that passes."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats
from simulated_scores import cell_rows, table

from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import noninferiority as ni

SETTINGS = Statistics(resamples=200)


def cells(n, policy_right, budgets, full_right=1.0, bins=1, policy="snapkv"):
    """Return rows of the full cache and one policy with these shares of right answers by budget; the first examples are
    right."""
    rows, none, index = [], np.zeros((n, 1), bool), np.arange(n)[:, None]
    for b in range(bins):
        rows += cell_rows(np.where(index < round(full_right * n), 1.0, 0.0), none, bin=b)
        for budget, share in zip(budgets, policy_right, strict=True):
            values = np.where(index < round(share * n), 1.0, 0.0)
            rows += cell_rows(values, none, policy=policy, budget=budget, bin=b)
    return table(rows)


def test_the_margin_by_hand():
    score, full = np.array([1, 1, 0.5, 0, 1.0]), np.array([1, 1, 1, 0, 0.5])
    difference = score - 0.95 * full
    tested = ni.margin(difference[None], 0.95)
    found, p = tested.interval(0.95), tested.p_above
    with_lost = np.append(difference, -0.95)
    expected = stats.ttest_1samp(with_lost, 0, alternative="greater")
    low = stats.ttest_1samp(with_lost, 0).confidence_interval(0.95).low
    assert found.estimate[0] == pytest.approx(difference.mean())
    assert p[0] == pytest.approx(expected.pvalue, abs=1e-6)
    assert found.low[0] == pytest.approx(max(low, -0.95), abs=1e-6)


def test_p_and_lower_bound_agree():
    rng = np.random.default_rng(1)
    full = (rng.random((400, 120)) < 0.9).astype(float)
    difference = np.where(rng.random(full.shape) < 0.02, 0, full) - 0.95 * full
    tested = ni.margin(difference, 0.95)
    found, p = tested.interval(0.95), tested.p_above
    assert 20 < (p < 0.025).sum() < 380
    assert ((p < 0.025) == (found.low > 0)).all()


def test_wrong_claims_at_the_margin_are_rare():
    rng, claims = np.random.default_rng(2), []
    for n in (40, 100, 400):
        for right in (0.95, 0.6):
            full = (rng.random((2000, n)) < right).astype(float)
            policy = full * (rng.random((2000, n)) < 0.95)
            claims.append((ni.margin(policy - 0.95 * full, 0.95).p_above < 0.025).mean())
    assert np.mean(claims) <= 0.025
    assert max(claims) <= 0.04


def test_equal_answers_are_enough_only_from_n_needed_on():
    needed = ni.examples_needed(0.025)
    assert needed > 20
    for n, enough in ((needed, True), (needed - 2, False)):
        assert (ni.margin(np.full((1, n), 0.05), 0.95).p_above[0] < 0.025) == enough


def test_the_smallest_budget_is_the_last_before_the_first_failure():
    scores = cells(300, (1.0, 1.0, 0.8, 1.0), ("r0.5", "r0.3", "r0.2", "r0.1"))
    tested = ni.noninferiority(scores, SETTINGS)
    overall = pl.from_arrow(ni.smallest_budgets(tested, SETTINGS)).filter(pl.col("bin").is_null()).row(0, named=True)
    assert overall["budget"] == overall["budget_unadjusted"] == "r0.3"
    assert overall["tested"] == ["r0.5", "r0.3", "r0.2", "r0.1"]
    for part in ("down to 30 %", "not shown at 20 %", "n = 300", "0.80 ["):
        assert part in overall["reason"]


def test_small_n_shows_nothing_and_says_so():
    """Check that without any loss a small sample shows no non-inferiority, and that the reason says so."""
    scores = cells(20, (1.0,), ("r0.5",), bins=2)
    rows = ni.smallest_budgets(ni.noninferiority(scores, SETTINGS), SETTINGS).to_pylist()
    assert [row["bin"] for row in rows] == [0, 1, None]
    assert all(row["budget"] is None for row in rows)
    assert all("without any loss" in row["reason"] for row in rows)
    assert rows[2]["n"] == 40


def test_shares_and_tokens_are_sequences_of_their_own():
    """Check that budgets in shares and budgets in tokens are searched separately for the smallest budget."""
    scores = cells(300, (0.5, 1.0), ("r0.5", "t128"))
    rows = ni.smallest_budgets(ni.noninferiority(scores, SETTINGS), SETTINGS).to_pylist()
    assert {(row["bin"], row["budget"]) for row in rows} == {(0, None), (0, "t128"), (None, None), (None, "t128")}


def test_holm_makes_claims_harder_among_many_policies():
    rng, rows, none = np.random.default_rng(3), [], np.zeros((200, 1), bool)
    rows += cell_rows(np.ones((200, 1)), none)
    for i in range(8):
        lost = rng.permutation(200) < 3 + i
        rows += cell_rows(np.where(lost, 0.0, 1.0)[:, None], none, policy=f"p{i}", budget="r0.5")
    frame = pl.from_arrow(ni.noninferiority(table(rows), SETTINGS)).filter(bin=0)
    assert (frame["p_holm"] >= frame["p_value"]).all()
    assert (frame["non_inferior"] == (frame["p_holm"] < 0.025)).all()
    assert 0 < frame["non_inferior"].sum() < (frame["p_value"] < 0.025).sum() + 1


def test_lost_answers_and_a_lonely_policy_are_null():
    rows = [
        row | {"score": None} for row in cell_rows(np.ones((5, 1)), np.ones((5, 1), bool), policy="h2o", budget="r0.5")
    ]
    alone = ni.noninferiority(table(rows), SETTINGS)
    assert alone.num_rows == 0
    assert ni.smallest_budgets(alone, SETTINGS).num_rows == 0
    tested = ni.noninferiority(table(rows + cell_rows(np.ones((5, 1)), np.zeros((5, 1), bool))), SETTINGS)
    assert tested.column("non_inferior").to_pylist() == [None, None]
    reasons = ni.smallest_budgets(tested, SETTINGS).column("reason").to_pylist()
    assert all("no answers to compare at 50 %" in reason for reason in reasons)
