"""Test the detection of onset, collapse and outcomes, with constructed data and simulated error rates."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from simulated_scores import LENGTHS, cell_rows, demo, table
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from kv_transition.stats.examples import Statistics
from kv_transition.stats.multiplicity import holm
from kv_transition.studies.grid.analysis import instability, scale, transition
from kv_transition.studies.grid.analysis.outcomes import BUDGET

SETTINGS = Statistics(resamples=500)


def run(right, failed=None, *, full=1.0, n=20, policy_values=None):
    """Return both detectors' rows for a policy with exactly these shares of right and of failed answers per bin."""
    rows = []
    failed = failed or [0.0] * len(right)
    for b, (share, lost) in enumerate(zip(right, failed, strict=True)):
        index = np.arange(n)[:, None]
        none = np.zeros((n, 1), bool)
        at = {"bin": b, "length": LENGTHS[b % 5] * (1 + b // 5)}
        rows += cell_rows(np.where(index < round(full * n), 1.0, 0.0), none, **at)
        values = np.where(index < round(share * n), 1.0, 0.0)
        rows += cell_rows(values, index >= n - round(lost * n), policy="snapkv", budget="r0.2", **at)
    frame = pl.from_arrow(transition.transitions(table(rows), SETTINGS))
    assert frame.height == 2
    return {row["detector"]: row for row in frame.iter_rows(named=True)}


def pattern(row):
    """Return the pattern that the detector found, before the comparisons decide whether there is a loss."""
    return json.loads(row["details"])["pattern"]


def test_early_failures_then_collapse_is_a_zone():
    found = run([1.0, 1.0, 0.65, 0.6, 0.1], failed=[0, 0, 0.35, 0.4, 0.5])["definition"]
    assert (found["outcome"], found["onset_bin"], found["collapse_bin"]) == ("collapsed", 2, 4)
    assert found["collapse_probability"] > 0.8
    assert 0 < found["onset_probability"] <= 1
    for part in ("snapkv at 20 %", "unstable from", "failures 0.35 against 0.00", "collapsed at", "n = 20"):
        assert part in found["reason"]


def test_a_collapse_without_a_sign_is_a_cliff():
    """Check that a collapse without an earlier instability has no onset bin."""
    found = run([1.0, 0.95, 1.0, 0.1, 0.05])["definition"]
    assert (found["outcome"], found["onset_bin"], found["collapse_bin"]) == ("collapsed", None, 3)


def test_flat_and_high_is_neither_unstable_nor_collapsed():
    found = run([1.0, 1.0, 0.95, 1.0, 0.9])["definition"]
    assert (pattern(found), found["onset_bin"], found["collapse_bin"]) == ("neither", None, None)
    details = json.loads(found["details"])
    assert details["probability_no_collapse"] == 1


def test_failures_without_collapse_are_unstable():
    found = run([1.0, 1.0, 0.7, 0.65, 0.65], failed=[0, 0, 0.3, 0.35, 0.35])["definition"]
    assert (found["outcome"], found["collapse_bin"]) == ("unstable", None)
    assert found["onset_bin"] in (2, 3)


def test_all_failed_is_a_collapse_in_the_shortest_bin():
    both = run([0.0] * 5, failed=[1.0] * 5)
    assert (both["definition"]["outcome"], both["definition"]["collapse_bin"]) == ("collapsed", 0)
    assert "lies below the lengths measured" in both["definition"]["reason"]
    assert both["definition"]["collapse_probability"] == 1


def test_a_mean_near_the_criterion_is_undecided():
    found = run([1.0, 0.5, 0.5, 0.5, 0.5])["definition"]
    assert pattern(found) == "open"
    assert "either side" in found["reason"]


def test_few_examples_are_undecided_not_stable():
    for n in (1, 2, 4):
        found = run([1.0] * 5, n=n)["definition"]
        assert pattern(found) == "open"
        assert f"n = {n}" in found["reason"]


def test_a_single_bin_is_enough_to_be_stable_or_collapsed_but_not_for_z_scores():
    both = run([1.0])
    assert pattern(both["definition"]) == "neither"
    assert both["zscore"]["outcome"] is None
    assert run([0.0])["definition"]["outcome"] == "collapsed"


def test_a_full_cache_that_scores_nothing_decides_nothing():
    """Check that the pattern is open if the full cache itself scores 0."""
    found = run([0.0] * 3, full=0.0)["definition"]
    assert pattern(found) == "open"
    assert "full cache itself" in found["reason"]


def test_without_a_full_cache_nothing_is_decided():
    rows = cell_rows(np.ones((20, 1)), np.zeros((20, 1), bool), policy="h2o", budget="r0.5")
    frame = pl.from_arrow(transition.transitions(table(rows), SETTINGS))
    assert frame["outcome"].to_list() == ["undecided", None]


def test_lost_answers_count_as_failures_worth_nothing():
    """Check that an answer without a score counts as a failure with a score of 0."""
    rows = []
    for b in range(3):
        rows += cell_rows(np.ones((20, 1)), np.zeros((20, 1), bool), bin=b)
        lost = cell_rows(np.ones((20, 1)), np.full((20, 1), b == 2), policy="h2o", budget="r0.5", bin=b)
        rows += [row | ({"score": None, "failure": "OOM"} if b == 2 else {}) for row in lost]
    frame = pl.from_arrow(transition.transitions(table(rows), SETTINGS)).filter(detector="definition")
    assert frame.row(0, named=True)["collapse_bin"] == 2


def test_disagreement_between_repeats_is_instability():
    rows, rng = [], np.random.default_rng(0)
    for b in range(4):
        none = np.zeros((20, 4), bool)
        rows += cell_rows(np.tile(rng.random((20, 1)) < 0.9, 4).astype(float), none, bin=b)
        steady = np.tile(rng.random((20, 1)) < 0.9, 4).astype(float)
        shaky = (rng.random((20, 4)) < 0.8).astype(float)
        rows += cell_rows(shaky if b >= 2 else steady, none, policy="random", budget="r0.5", bin=b)
    found = pl.from_arrow(transition.transitions(table(rows), SETTINGS)).row(0, named=True)
    assert (found["outcome"], found["onset_bin"]) == ("unstable", 2)
    assert "repeats" in found["reason"]


def test_polarised_scores_are_dispersion_beyond_the_mean():
    """Check that scores near 0 and 1 with an unchanged mean count as instability."""
    rng, rows = np.random.default_rng(1), []
    for b in range(4):
        none = np.zeros((40, 1), bool)
        rows += cell_rows(rng.beta(12, 8, (40, 1)), none, bin=b)
        polar = (rng.random((40, 1)) < 0.55).astype(float)
        rows += cell_rows(polar if b >= 2 else rng.beta(12, 8, (40, 1)), none, policy="h2o", budget="r0.5", bin=b)
    found = pl.from_arrow(transition.transitions(table(rows), SETTINGS)).row(0, named=True)
    assert (found["outcome"], found["onset_bin"]) == ("unstable", 2)
    assert "differ more than the mean implies" in found["reason"]


def test_zscores_by_hand():
    found = run([1.0, 1.0, 1.0, 0.6, 0.3], failed=[0, 0, 0, 0.4, 0.1])["zscore"]
    details = json.loads(found["details"])["bins"]
    rates = np.array([0, 0, 0, 0.4, 0.1])
    expected = (rates - rates.mean()) / rates.std()
    assert [b["z_fail"] for b in details] == pytest.approx(expected)
    assert (found["outcome"], found["onset_bin"], found["collapse_bin"]) == (None, 3, 4)


def test_holm_for_many_rows_is_that_of_statsmodels():
    p = np.random.default_rng(0).random((6, 10)) ** 3
    adjusted = holm(p, np.full(6, 10))
    for row, found in zip(p, adjusted, strict=True):
        assert found == pytest.approx(multipletests(row, method="holm")[1])


def test_sign_test_by_hand():
    assert instability.sign_test_p(np.array([5]), np.array([0])) == pytest.approx([1 / 32])
    assert instability.sign_test_p(np.array([0]), np.array([0])) == pytest.approx([1])
    assert instability.sign_test_p(np.array([3]), np.array([1])) == pytest.approx([5 / 16])


def test_every_pair_has_a_row_of_each_detector_and_aliases_have_none():
    scores = demo(n=6)
    frame = pl.from_arrow(transition.transitions(scores, SETTINGS))
    assert frame.height == 2 * 2 * 5 * 2
    assert not frame.select(pl.col(pl.Float64).is_nan().any()).row(0).count(True)
    assert set(frame["outcome"]) <= {*scale.SCALE, None}
    assert all(reason.endswith(".") and "nan" not in reason for reason in frame["reason"])
    assert "NaN" not in "".join(frame["details"])
    again = pl.from_arrow(transition.transitions(scores, SETTINGS))
    assert frame.equals(again)


def test_nothing_unstable_raises_few_alarms():
    """Check the rate of false alarms on simulated policies without instability."""
    rng, alarms = np.random.default_rng(7), 0
    for _ in range(60):
        bins = []
        for b in range(5):
            mean = 0.7 - 0.05 * b
            full, policy = (rng.beta(4 * m, 4 * (1 - m), 20) for m in (mean, 0.8 * mean))
            failed, full_failed = (rng.random((2, 20)) < 0.1).astype(float)
            none = np.full(20, np.nan)
            bins.append(transition.Point(b, (b, b + 1), policy, failed, full, full_failed, none, none))
        alarms += transition.detect(bins, "x", Statistics(resamples=200)).onset is not None
    assert alarms <= 8  # 5 % of 60 is 3; at a rate of 5 %, more than 8 has a probability below 1 %


# ----------------------------------------------------------------------------------------------------
# Simulated policies with known true values


def constructed(right, lost, *, n=60, graded_from=None, seed=0):
    """Return transition tables of a policy whose answers are right and fail with these probabilities per bin.

    From the bin ``graded_from`` on, graded scores (beta distribution of precision 12) become 0 or 1 with the same mean.
    """
    rng, rows, none = np.random.default_rng(seed), [], np.zeros((n, 1), bool)
    for b, (share, rate) in enumerate(zip(right, lost, strict=True)):
        at = {"bin": b, "length": LENGTHS[b]}
        if graded_from is None:
            full, own = (rng.random((n, 1)) < 0.95).astype(float), (rng.random((n, 1)) < share).astype(float)
        else:
            full, own = rng.beta(12 * 0.6, 12 * 0.4, (n, 1)), rng.beta(12 * share, 12 * (1 - share), (n, 1))
            own = (rng.random((n, 1)) < share).astype(float) if b >= graded_from else own
        rows += cell_rows(full, none, **at)
        rows += cell_rows(own, rng.random((n, 1)) < rate, policy="snapkv", budget="r0.2", **at)
    frame = pl.from_arrow(transition.transitions(table(rows), SETTINGS)).filter(detector="definition")
    return frame.row(0, named=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_three_constructed_truths_are_found(seed):
    zone = constructed([0.95, 0.95, 0.9, 0.9, 0.1], [0.0, 0.0, 0.35, 0.4, 0.4], seed=seed)
    assert (zone["outcome"], zone["onset_bin"], zone["collapse_bin"]) == ("collapsed", 2, 4)
    cliff = constructed([0.95, 0.95, 0.93, 0.1, 0.08], [0.0] * 5, seed=seed)
    assert (cliff["outcome"], cliff["onset_bin"], cliff["collapse_bin"]) == ("collapsed", None, 3)
    polarised = constructed([0.6] * 5, [0.0] * 5, graded_from=3, seed=seed)
    assert (polarised["outcome"], polarised["onset_bin"], polarised["collapse_bin"]) == ("unstable", 3, None)
    calm = constructed([0.95, 0.95, 0.93, 0.93, 0.9], [0.0] * 5, seed=seed)
    assert (pattern(calm), calm["onset_bin"], calm["collapse_bin"]) == ("neither", None, None)


def test_the_sentence_tells_the_whole_story():
    found = run([1.0, 1.0, 0.65, 0.6, 0.1], failed=[0, 0, 0.35, 0.4, 0.5])["definition"]
    assert found["sentence"].startswith("snapkv at 20 %, after the prompt: neither unstable nor collapsed up to ")
    for part in (
        "1.00 [0.84, 1.00], full cache 1.00, n = 20",
        "failures 0.00 -> 0.35 [0.18, 0.57], n = 20",
        "collapsed",
    ):
        assert part in found["sentence"]


def test_what_lies_open_is_not_called_calm():
    """Check that the sentence names bins between the last stable bin and the collapse as open."""
    found = run([1.0, 0.6, 0.1], full=1.0)["definition"]
    assert found["outcome"] == "collapsed"
    assert "neither unstable nor collapsed up to 271 tokens" in found["sentence"]
    assert "open from 271 to" in found["sentence"]


def budgets(shares, lost, n=40):
    rows, none, index = (
        cell_rows(np.ones((n, 1)), np.zeros((n, 1), bool)),
        np.zeros((n, 1), bool),
        np.arange(n)[:, None],
    )
    for budget, (share, rate) in zip(("r0.5", "r0.3", "r0.2", "r0.1"), zip(shares, lost, strict=True), strict=True):
        values = np.where(index < round(share * n), 1.0, 0.0)
        rows += cell_rows(values, index >= n - round(rate * n), policy="h2o", budget=budget)
    return pl.from_arrow(transition.budget_transitions(table(rows + [r | {"budget": "t64"} for r in
        cell_rows(np.ones((n, 1)), none, policy="h2o", budget="r0.1")]), SETTINGS))  # fmt: skip


def test_along_the_budgets_of_a_bin():
    frame = budgets([1.0, 1.0, 0.7, 0.1], [0.0, 0.0, 0.3, 0.5])
    assert set(frame["kind"]) == {"r", "t"}
    row = frame.filter(kind="r", detector="definition").row(0, named=True)
    assert (row["outcome"], row["onset_budget"], row["collapse_budget"]) == ("collapsed", "r0.2", "r0.1")
    assert "neither unstable nor collapsed down to 30 %" in row["sentence"]
    assert "collapsed below" in row["sentence"]
    assert pattern(frame.filter(kind="t", detector="definition").row(0, named=True)) == "neither"
    assert frame.filter(kind="t", detector="zscore")["outcome"][0] is None


def test_budgets_within_a_bin_are_resampled_together():
    rng, none = np.random.default_rng(3), np.full(30, np.nan)
    score = rng.beta(2, 2, 30)
    points = [
        transition.Point(0, (1, 2), score, np.zeros(30), np.ones(30), np.zeros(30), none, none, budget)
        for budget in ("r0.5", "r0.2")
    ]
    first, second = instability.resampled(points, 50, 0, 0.95)
    assert (first.high == second.high).all()
    found = transition.detect(points, "h2o", SETTINGS, BUDGET)
    assert [b["budget"] for b in found.details["budgets"]] == ["r0.5", "r0.2"]


def test_a_missing_cell_is_said():
    rows = []
    for b in range(3):
        there = [("full", "r1"), ("h2o", "r0.2")] + [("h2o", "r0.5")] * (b != 1)
        for policy, budget in there:
            at = {"policy": policy, "budget": budget, "bin": b, "length": LENGTHS[b]}
            rows += cell_rows(np.ones((20, 1)), np.zeros((20, 1), bool), **at)
    lengths, along_budget = (pl.from_arrow(t) for t in transition.tables_of(table(rows), SETTINGS))
    row = lengths.filter(budget="r0.5", detector="definition").row(0, named=True)
    assert pattern(row) == "neither"
    assert "no answers to compare at 497" in row["sentence"]
    assert "no answers to compare at 50 %" in along_budget.filter(bin=1, detector="definition")["reason"][0]


def test_failures_of_one_document_are_one_failure():
    outcomes = []
    for each in (1, 10):
        rows = []
        for b in range(3):
            failed = (np.arange(40) >= 30)[:, None] & (b > 0)
            rows += cell_rows(np.ones((40, 1)), np.zeros((40, 1), bool), bin=b, per_document=each)
            rows += cell_rows(np.ones((40, 1)), failed, policy="h2o", budget="r0.5", bin=b, per_document=each)
        row = pl.from_arrow(transition.transitions(table(rows), SETTINGS)).row(0, named=True)
        outcomes.append((row["onset_bin"], row["sentence"]))
    assert outcomes[0][0] == 1
    assert outcomes[1][0] is None
    assert "n = 40 from 4 documents" in outcomes[1][1]


def test_mcnemar_is_that_of_statsmodels():
    two_sided = mcnemar([[0, 9], [2, 0]], exact=True).pvalue
    assert 2 * instability.sign_test_p(np.array([9]), np.array([2]))[0] == pytest.approx(two_sided, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "scores", "failed", "n"),
    [
        ("all failed", 0.0, True, 20),
        ("one example", 1.0, False, 1),
        ("identical scores", 0.4, False, 20),
        ("not a number", np.nan, False, 20),
        ("lost", np.nan, True, 20),
    ],
)
def test_degenerate_bins_are_said_in_words(name, scores, failed, n):
    rows = []
    for b in range(2):
        shape = (n, 1)
        rows += cell_rows(np.full(shape, 0.4 if name == "identical scores" else 1.0), np.zeros(shape, bool), bin=b)
        rows += cell_rows(np.full(shape, scores), np.full(shape, failed), policy="h2o", budget="r0.5", bin=b)
    for frame in map(pl.from_arrow, transition.tables_of(table(rows), SETTINGS)):
        assert frame.height >= 2
        assert set(frame["outcome"]) <= {*scale.SCALE, None}
        assert not frame.select(pl.col(pl.Float64).is_nan().any()).row(0).count(True)
        for column in ("reason", "sentence", "details"):
            assert all(text and "nan" not in text.lower() for text in frame[column])
