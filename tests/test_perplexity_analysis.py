"""Test the analysis of perplexity: estimates by hand, intervals compared with peers, and simulated coverage."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import statsmodels.api as sm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, sem, t
from simulated_windows import LOG_PPL, simulated
from statsmodels.stats.multitest import multipletests

from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.stats.examples import Statistics
from kv_transition.stats.quotients import quotient
from kv_transition.studies.perplexity import analysis

STATISTICS = Statistics(resamples=2000)
FEW = Statistics(resamples=100)
SPANS = {
    "full": {},
    "entropy_merge": {"n_sink": 4},
    "entropy_drop": {},
    "merge_03": {"kind": "entropy_merge", "target": "threshold", "threshold": 0.3, "count_bias": True},
    "drop_03": {"kind": "entropy_drop", "target": "threshold", "threshold": 0.3},
    "drop_05": {"kind": "entropy_drop", "target": "threshold"},
}


def stats(windows: pl.DataFrame, statistics: Statistics = FEW) -> dict[tuple, dict]:
    table = analysis.perplexity(windows, statistics).to_pylist()
    return {(row["policy"], row["budget"], row["bin"]): row for row in table}


def some(seed: int = 0, costs=None, **options) -> pl.DataFrame:
    return simulated(np.random.default_rng(seed), costs or {("h2o", "r0.25"): 0.1}, **options)


def written(frame: pl.DataFrame, path) -> str:
    frame.write_parquet(path)
    return str(path)


def test_perplexity_ratio_and_compression_by_hand():
    frame = some(books=2, windows=2, lengths=(100,))
    frame = frame.sort("policy", "book_id", "window").with_columns(
        # full: 2 nats per token; h2o: 2.5 in the book with 10 and 30 tokens, 3 in the book with 20 and 40
        n_tokens=pl.Series([10, 30, 20, 40] * 2),
        nll_sum=pl.Series([20.0, 60, 40, 80, 25, 75, 60, 120]),
        score_s=pl.Series([1.0] * 4 + [2.0] * 4),
    )
    found = stats(frame)
    full, evicted = found["full", "r1", 0], found["h2o", "r0.25", 0]
    assert full["perplexity"] == pytest.approx(np.exp(2))
    assert evicted["perplexity"] == pytest.approx(np.exp(280 / 100))
    assert evicted["ratio"] == pytest.approx(np.exp(80 / 100))
    assert evicted["compression"] == pytest.approx(0.75)
    assert evicted["compression_end"] == pytest.approx(1 - (25 + 64) / (100 + 64))
    assert (full["tokens_per_s"], evicted["tokens_per_s"]) == pytest.approx((25, 12.5))
    assert (full["ratio"], full["ratio_low"]) == (1, None)
    assert (evicted["n"], evicted["clusters"], evicted["n_tokens"], evicted["paired"]) == (4, 2, 100, 4)
    assert evicted["exploratory"]


def test_all_lengths_are_one_sum_over_all_windows():
    frame = some(books=3, lengths=(64, 128, 256))
    found = stats(frame)
    own = frame.filter(policy="h2o")
    assert found["h2o", "r0.25", None]["perplexity"] == pytest.approx(
        np.exp(own["nll_sum"].sum() / own["n_tokens"].sum())
    )
    assert found["h2o", "r0.25", None]["n"] == sum(found["h2o", "r0.25", bin]["n"] for bin in range(3))
    assert (found["h2o", "r0.25", None]["context_min"], found["h2o", "r0.25", None]["context_max"]) == (64, 256)
    # every bin has the same books
    assert found["h2o", "r0.25", None]["clusters"] == 3


def test_bounds_are_students_after_one_more_book_on_either_side():
    """Compare with scipy for books of equal size, after adding one book as far out as the farthest book."""
    frame = some(seed=3, books=30).filter(policy="full")
    row = stats(frame, STATISTICS)["full", "r1", 0]
    books = frame.with_columns(y=pl.col("nll_sum") / pl.col("n_tokens")).group_by("book_id").agg(pl.col("y").mean())
    y = books["y"].sort().to_numpy()
    for end, bound, sign in ((0, "low", -1), (-1, "high", 1)):
        far = y.mean() + y[end] - np.delete(y, end).mean()
        more = np.append(y, far)
        wanted = more.mean() + sign * t.ppf(0.975, len(y) - 1) * sem(more)
        assert np.log(row[f"perplexity_{bound}"]) == pytest.approx(wanted)
    # wider than a cluster-robust regression interval, and much wider than with independent windows
    y = (frame["nll_sum"] / frame["n_tokens"]).to_numpy()
    groups = frame["book_id"].rank("dense").to_numpy()
    fitted = sm.OLS(y, np.ones_like(y)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    width = np.log(row["perplexity_high"] / row["perplexity_low"])
    assert np.ptp(fitted.conf_int()[0]) < width < 1.5 * np.ptp(fitted.conf_int()[0])
    assert np.log(row["perplexity"]) == pytest.approx(y.mean())
    assert width > 1.5 * np.ptp(sm.OLS(y, np.ones_like(y)).fit().conf_int()[0])


@pytest.mark.parametrize("books", [5, 10, 20])
def test_skewed_books_seldom_show_a_cost_that_is_none(books):
    rng, runs, windows = np.random.default_rng(books), 3000, 4
    codes, tokens, found = np.repeat(np.arange(books), windows), np.full(books * windows, 64.0), 0
    for _ in range(runs):
        nats = 0.03 * (rng.exponential(size=books) - 1)[codes] + 0.05 * (rng.exponential(size=len(codes)) - 1)
        found += quotient(nats * tokens, tokens, codes, 0.95).p < 0.05
    # three standard errors above 5 %
    assert found / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


NATS = st.one_of(st.sampled_from([0.0, 0.1, -0.1]), st.floats(-3, 3, allow_nan=False).map(lambda v: round(v, 3)))


@given(
    windows=st.lists(st.tuples(NATS, st.integers(1, 200), st.integers(0, 5)), min_size=1, max_size=40),
    alpha=st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5]),
)
def test_whatever_the_books_the_interval_excludes_1_exactly_where_p_is_below_the_level(windows, alpha):
    nats, tokens, book = (np.array(column, dtype=float) for column in zip(*windows, strict=True))
    found = quotient(nats * tokens, tokens, book, 1 - alpha).exp()
    if len(set(book)) == 1:
        assert np.isnan([found.low, found.high, found.p]).all()
        return
    assume(abs(found.p - alpha) > 1e-9)
    assert found.low <= found.value <= found.high
    assert (found.low > 1 or found.high < 1) == (found.p < alpha)


@pytest.mark.parametrize("books", [5, 10, 30])
def test_intervals_cover_the_truth(books):
    rng, hits, runs = np.random.default_rng(books), np.zeros(2), 200
    for _ in range(runs):
        frame = simulated(rng, {("h2o", "r0.2"): 0.05}, books=books, windows=3)
        found = stats(frame, Statistics(resamples=300))
        full, evicted = found["full", "r1", 0], found["h2o", "r0.2", 0]
        hits += [
            full["perplexity_low"] <= np.exp(LOG_PPL) <= full["perplexity_high"],
            evicted["ratio_low"] <= np.exp(0.05) <= evicted["ratio_high"],
        ]
    # 95 % nominal; three standard errors of 200 runs below 93 %
    assert (hits / runs > 0.88).all(), hits / runs


def test_what_full_shares_with_a_policy_leaves_the_ratio():
    """Check that pairing removes the variation of books: the ratio has a much narrower interval than each
    perplexity."""
    row = stats(some(seed=1), STATISTICS)["h2o", "r0.25", 0]
    spread = np.log([row["perplexity_high"] / row["perplexity_low"], row["ratio_high"] / row["ratio_low"]])
    assert spread[0] > 4 * spread[1]


def test_windows_without_a_score_are_counted_and_not_paired():
    frame = some(books=4, windows=2)
    lost = (pl.col("window") == 0) & (pl.col("book_id") == "book000")
    frame = frame.with_columns(nll_sum=pl.when(~lost | (pl.col("policy") == "h2o")).then("nll_sum"))
    frame = frame.with_columns(
        nll_sum=pl.when((pl.col("policy") == "h2o") & (pl.col("book_id") == "book003")).then(float("nan"))
        .otherwise("nll_sum")
    )  # fmt: skip
    found = stats(frame.with_columns(pl.col("nll_sum").fill_nan(None)))
    assert (found["full", "r1", 0]["n"], found["full", "r1", 0]["missing"]) == (7, 1)
    assert (found["h2o", "r0.25", 0]["n"], found["h2o", "r0.25", 0]["missing"]) == (6, 2)
    assert found["h2o", "r0.25", 0]["paired"] == 5
    both = frame.filter(~lost, pl.col("book_id") != "book003")
    sums = [both.filter(policy=policy)["nll_sum"].sum() for policy in ("h2o", "full")]
    assert found["h2o", "r0.25", 0]["ratio"] == pytest.approx(np.exp((sums[0] - sums[1]) / (5 * 64)))


def test_one_book_gives_no_interval_and_says_so():
    row = stats(some(books=1))["h2o", "r0.25", 0]
    assert row["ratio"] is not None
    assert row["ratio_low"] is row["ratio_high"] is row["perplexity_low"] is None
    assert "one book" in row["method"]


def test_without_the_full_cache_there_is_no_ratio():
    row = stats(some().filter(policy="h2o"))["h2o", "r0.25", 0]
    assert row["ratio"] is None
    assert row["paired"] == 0
    assert row["perplexity"] > 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), books=st.integers(2, 6), windows=st.integers(1, 4))
def test_ratio_times_the_full_perplexity_is_the_perplexity(seed, books, windows):
    found = stats(some(seed, books=books, windows=windows))
    full, evicted = found["full", "r1", None], found["h2o", "r0.25", None]
    assert evicted["ratio"] * full["perplexity"] == pytest.approx(evicted["perplexity"])
    assert evicted["ratio_low"] <= evicted["ratio"] <= evicted["ratio_high"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: pl.concat([f, f.head(1)]), "more than once"),
        (lambda f: f.with_columns(nll_sum=-pl.col("nll_sum")), "negative"),
        (lambda f: f.with_columns(n_tokens=pl.lit(0, dtype=pl.Int64)), "no scored token"),
        (lambda f: f.clear(), "no window"),
    ],
)
def test_windows_that_make_no_sense_are_refused(tmp_path, change, said):
    path = written(change(some()), tmp_path / "bin0.parquet")
    with pytest.raises(UserError, match=said):
        analysis.read_windows([path])


def test_windows_made_with_other_settings_are_refused(tmp_path):
    path = written(some(), tmp_path / "bin0.parquet")
    assert analysis.read_windows([path], {path: "0"}).height
    with pytest.raises(UserError, match=r"bin0.parquet was computed with other settings or code.* 0 instead of 1"):
        analysis.read_windows([path], {path: "1"})


def test_pairs_choose_the_same_spans():
    assert analysis.pairs_of(SPANS) == [("entropy_merge", "entropy_drop"), ("merge_03", "drop_03")]


def merging(seed: int = 0, gain: float = 0.0, **options) -> pl.DataFrame:
    costs = {("entropy_merge", r): 0.1 - gain for r in ("r0.5", "r0.2")}
    costs |= {("entropy_drop", r): 0.1 for r in ("r0.5", "r0.2")}
    return simulated(np.random.default_rng(seed), costs | {("merge_03", "r1"): 0.1, ("drop_03", "r1"): 0.1}, **options)


def test_merging_against_dropping_is_paired_tested_by_book_and_adjusted():
    frame = merging(gain=0.04, books=8, lengths=(64, 128))
    rows = analysis.merge_against_drop(frame, SPANS, STATISTICS).to_pylist()
    assert len(rows) == 3 * 3
    merged, dropped = (frame.filter(policy=p, budget="r0.2", bin=1) for p in ("entropy_merge", "entropy_drop"))
    row = next(r for r in rows if (r["policy"], r["budget"], r["bin"]) == ("entropy_merge", "r0.2", 1))
    d = merged["nll_sum"] - dropped["nll_sum"]
    assert row["ratio"] == pytest.approx(np.exp(d.sum() / merged["n_tokens"].sum()))
    by_book = merged.with_columns(d=d).group_by("book_id").agg(pl.col("d").sum())["d"].to_numpy()
    exact = permutation_test((by_book,), np.sum, permutation_type="samples", n_resamples=np.inf)
    # close to the exact permutation test by book, and more conservative
    assert exact.pvalue < row["p_value"] < 2 * exact.pvalue
    for whole in (False, True):
        family = [r for r in rows if (r["bin"] is None) == whole]
        adjusted = multipletests([r["p_value"] for r in family], method="holm")[1]
        assert [r["p_holm"] for r in family] == pytest.approx(list(adjusted))
    assert row["compression"] == row["reference_compression"] == pytest.approx(1 - 26 / 128)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_a_ratio_excludes_1_exactly_where_its_p_is_below_the_level(confidence):
    frame, how = merging(gain=0.02, books=6, lengths=(64, 128)), Statistics(confidence, resamples=300)
    rows = analysis.merge_against_drop(frame, SPANS, how).to_pylist()
    against_full = [row for row in analysis.perplexity(frame, how).to_pylist() if row["policy"] != "full"]
    assert all(row["p_value"] is not None for row in against_full)
    for found in (rows, against_full):
        for row in found:
            apart = row["ratio_low"] > 1 or row["ratio_high"] < 1
            assert apart == (row["p_value"] < 1 - confidence)


def test_no_gain_of_merging_is_found_where_there_is_none():
    runs, found, covered = 150, 0, 0
    for seed in range(runs):
        frame = merging(seed, books=10, windows=3)
        rows = analysis.merge_against_drop(frame, SPANS, Statistics(resamples=1100)).to_pylist()
        own = [r for r in rows if r["bin"] is None]
        found += any(r["p_holm"] < 0.05 for r in own)
        covered += own[0]["ratio_low"] <= 1 <= own[0]["ratio_high"]
    # 5 % family-wise, plus three standard errors of 150 runs
    assert found / runs < 0.104
    assert covered / runs > 0.9


def test_the_tables_are_written_with_where_they_come_from(tmp_path):
    frame = merging(lengths=(64, 128))
    files = []
    for (policy, budget, bin), own in frame.group_by("policy", "budget", "bin"):
        files.append(written(own, tmp_path / f"{policy}-{budget}-{bin}.parquet"))
    output, pairs = tmp_path / "perplexity.parquet", tmp_path / "pairs.parquet"
    analysis.write_perplexity(files, output, pairs, {"confidence": 0.9, "resamples": 100, "seed": 0}, SPANS)
    assert pl.read_parquet(output).height == 7 * 3
    assert pl.read_parquet(pairs).height == 3 * 3
    assert json.loads(read_metadata(output)["statistics"])["confidence"] == 0.9
