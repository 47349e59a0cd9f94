"""Test the scale of outcomes: five words with one definition each, used everywhere."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from scipy import stats
from simulated_scores import cell_rows, table

from kv_transition.stats import paired
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis import scale, transition
from kv_transition.studies.grid.analysis.comparisons import comparisons
from kv_transition.studies.grid.analysis.noninferiority import noninferiority

HOW = Statistics(resamples=200)


def rows_of(policy_right, policy_failed=0.0, n=60, bins=2, policy="h2o"):
    """Return rows of a full cache that is always right and of a policy with these shares of right and failed answers
    per bin."""
    rows, index, none = [], np.arange(n)[:, None], np.zeros((n, 1), bool)
    for bin in range(bins):
        rows += cell_rows(np.ones((n, 1)), none, bin=bin, length=256 * (bin + 1))
        right = np.broadcast_to(policy_right, bins)[bin]
        failed = index >= n - round(np.broadcast_to(policy_failed, bins)[bin] * n)
        at = {"policy": policy, "budget": "r0.5", "bin": bin, "length": 256 * (bin + 1)}
        rows += cell_rows(np.where(index < round(right * n), 1.0, 0.0), failed, **at)
    return rows


def found(*arguments, **options):
    frame = pl.from_arrow(transition.transitions(table(rows_of(*arguments, **options)), HOW))
    return frame.filter(detector="definition").row(0, named=True)


@pytest.mark.parametrize(
    ("right", "failed", "n", "word", "since"),
    [
        (1.0, 0.0, 60, "no loss shown", None),
        (1.0, 0.0, 10, "undecided", None),
        ((1.0, 0.8), 0.0, 60, "loss shown", 1),
        ((1.0, 0.7), (0.0, 0.3), 60, "unstable", 1),
        ((1.0, 0.2), 0.0, 60, "collapsed", 1),
        ((0.1, 0.1), 0.0, 60, "collapsed", 0),
    ],
)
def test_the_worst_that_is_shown_names_the_outcome(right, failed, n, word, since):
    row = found(right, failed, n)
    assert (row["outcome"], row["since_bin"]) == (word, since)
    states = [point["state"] for point in json.loads(row["details"])["bins"]]
    assert set(states) <= set(scale.SCALE)
    if since is not None:
        assert states[since] == word
        assert word not in states[:since]


def test_a_loss_that_only_all_bins_together_show_has_no_beginning():
    row = found((0.91, 0.91), n=45)
    assert (row["outcome"], row["since_bin"]) == ("loss shown", None)
    assert "over all bins" in row["sentence"]
    assert scale.words(row, None, 90) == "loss shown over all lengths"


def test_undecided_says_the_n_that_would_decide():
    row = found(1.0, n=10)
    assert row["n_decides"] > 20
    assert f"about {row['n_decides']} would decide" in row["sentence"]
    assert scale.words(row, None, 20).startswith("undecided, because n = 20; about ")
    # this many equal answers do show that there is no loss
    enough = found(1.0, n=-(-row["n_decides"] // 2))
    assert enough["outcome"] == "no loss shown"


def test_only_the_definition_has_an_outcome_and_it_is_a_word_of_the_scale():
    frame = pl.from_arrow(transition.transitions(table(rows_of(1.0)), HOW))
    assert dict(frame.select("detector", "outcome").iter_rows()) == {"definition": "no loss shown", "zscore": None}
    assert set(scale.DEFINITIONS) == set(scale.SCALE) == set(scale.SYMBOLS)


def test_as_many_pairs_as_are_said_to_decide_do_so_four_times_in_five():
    rng, loss, trials = np.random.default_rng(0), 0.2, 1500
    n = paired.examples(loss, (loss * (1 - loss)) ** 0.5, -1.0, 0.025)
    draws = -(rng.random((trials, n)) < loss).astype(float)
    assert np.mean(paired.difference(draws).p_below < 0.025) == pytest.approx(0.8, abs=0.1)
    normal = ((stats.norm.isf(0.025) + stats.norm.ppf(0.8)) / (loss / (loss * (1 - loss)) ** 0.5)) ** 2
    assert n > normal  # the additional pair increases n
    assert paired.examples(0.0, 1.0, -1.0, 0.025) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_on_the_first_screen_agrees_with_the_word_beside_it(seed):
    rng, rows, n = np.random.default_rng(seed), [], 50
    for bin in range(3):
        full = (rng.random((n, 1)) < 0.95).astype(float)
        rows += cell_rows(full, np.zeros((n, 1), bool), bin=bin)
        for i, lost in enumerate((0.0, 0.005, 0.02, 0.04, 0.08, 0.2)):
            score = np.where(rng.random((n, 1)) < lost, 0.0, full)
            rows += cell_rows(score, np.zeros((n, 1), bool), policy=f"p{i}", budget="r0.5", bin=bin)
    scores = table(rows)
    frame = pl.from_arrow(transition.transitions(scores, HOW)).filter(detector="definition")
    pooled = pl.from_arrow(comparisons(scores, HOW)).filter(pl.col("bin").is_null(), statistic="score")
    lost = dict(pooled.select("policy", (pl.col("p_holm") < 0.05) & (pl.col("estimate") < 0)).iter_rows())
    kept = pl.from_arrow(noninferiority(scores, HOW)).filter(pl.col("bin").is_null())
    enough = dict(kept.select("policy", "non_inferior").iter_rows())
    assert any(lost.values())
    for row in frame.iter_rows(named=True):
        assert (row["kept_low"] > 0.95) == enough[row["policy"]]
        assert (row["kept_high"] < 1) == lost[row["policy"]]
        if row["outcome"] == "undecided":
            assert row["kept_low"] <= 0.95
            assert row["kept_high"] >= 1
