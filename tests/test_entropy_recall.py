"""Test entropy against recall: estimates compared with scipy and statsmodels, and verdicts for known true values."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import statsmodels.api as sm
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_observations import POLICIES, observed, recalled_scores, rows_of, simulated_steps, table

from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.stats.association import Estimate, moments2, rank_statistics, resample_weights
from kv_transition.stats.examples import Statistics
from kv_transition.stats.frames import read_table
from kv_transition.studies.recall import plots
from kv_transition.studies.recall.analysis import analyse, entropy_recall, write_entropy_recall
from kv_transition.studies.recall.moments import answer, pairs_of, points, recall_moments, write_recall_moments
from kv_transition.studies.recall.observations import COLUMNS, cells, levels, read_observations
from kv_transition.studies.recall.tables import ENTROPY_RECALL
from kv_transition.studies.recall.verdict import (
    AFTER_CONTROLLING,
    CONFIRMED,
    NOT_CONFIRMED,
    UNDECIDED,
    Bin,
    controlled,
    judge,
)

FAST = Statistics(resamples=200)
STATISTICS = {"confidence": 0.95, "resamples": 200, "seed": 0}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def made(truth: str, n: int = 30, steps: int = 20, seed: int = 0):
    return getattr(simulated_steps, truth)(rng(seed), n, steps)


def changed(steps, **fields):
    return simulated_steps.Steps(**{**vars(steps), **fields})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, list[str]]:
    """Return the path of the table and the paths of the observation files that it is made from."""
    folder = tmp_path_factory.mktemp("observed")
    pq.write_table(observed(), folder / "bin0.parquet")
    write_entropy_recall([str(folder / "bin0.parquet")], str(folder / "entropy_recall.parquet"), STATISTICS)
    return str(folder / "entropy_recall.parquet"), [str(folder / "bin0.parquet")]


def row(frame: pl.DataFrame, statistic: str, **key) -> dict:
    found = frame.filter(statistic=statistic, **key).to_dicts()
    assert len(found) == 1, (statistic, key, len(found))
    return found[0]


# Estimates


def test_estimates_are_those_of_scipy_and_statsmodels():
    steps = made("weak")
    found = {name: e.value for name, e in analyse(steps, FAST).estimates.items()}
    h, r = steps.entropy, steps.recall
    assert found["pearson"] == pytest.approx(stats.pearsonr(h, r).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(h, r).statistic)
    assert found["slope"] == pytest.approx(stats.linregress(h, r).slope)
    assert found["trend"] == pytest.approx(stats.linregress(levels(h), r).slope)
    failed = r < 0.5
    u = stats.mannwhitneyu(h[failed], h[~failed]).statistic
    assert found["auroc"] == pytest.approx(u / (failed.sum() * (~failed).sum()))
    own = np.stack([[h[steps.example == e].mean(), r[steps.example == e].mean()] for e in range(30)])
    centred = np.stack([h, r], axis=1) - own[steps.example]
    assert found["pearson_within"] == pytest.approx(stats.pearsonr(*centred.T).statistic)


def test_the_partial_correlation_is_that_of_regression_residuals():
    steps = made("by_step", n=8)  # fewer than ten examples: the controls enter as straight lines
    dummies = (steps.kind[:, None] == [1, 2]).astype(float)
    design = sm.add_constant(np.column_stack([steps.step, steps.length, dummies]))
    residuals = [sm.OLS(y, design).fit().resid for y in (steps.entropy, steps.recall)]
    found = analyse(steps, FAST).estimates
    assert found["partial"].value == pytest.approx(stats.pearsonr(*residuals).statistic)
    alone = sm.add_constant(steps.length)
    residuals = [sm.OLS(y, alone).fit().resid for y in (steps.entropy, steps.recall)]
    assert found["partial_length"].value == pytest.approx(stats.pearsonr(*residuals).statistic)


def test_each_bootstrap_sample_is_the_statistic_of_the_examples_drawn():
    steps = made("driven", n=6, steps=8)
    weights = resample_weights(6, 50, seed=3)
    drawn = []
    for sample in weights.astype(int):
        index = np.concatenate([np.tile(np.flatnonzero(steps.example == e), k) for e, k in enumerate(sample)])
        drawn.append((steps.entropy[index], steps.recall[index]))
    (moments,) = moments2(steps.entropy, [steps.recall], steps.example, weights)
    slope = moments.slope(0.95)
    np.testing.assert_allclose(slope.draws, [stats.linregress(h, r).slope for h, r in drawn])
    event = steps.recall < 0.5
    ((spearman, auroc),) = rank_statistics(steps.entropy, [steps.recall], [event], steps.example, weights, 0.95)
    np.testing.assert_allclose(spearman.draws, [stats.spearmanr(h, r).statistic for h, r in drawn])
    pairs = [np.subtract.outer(h[r < 0.5], h[r >= 0.5]) for h, r in drawn]
    np.testing.assert_allclose(auroc.draws, [((d > 0) + 0.5 * (d == 0)).mean() for d in pairs])


def test_the_interval_of_a_slope_agrees_with_cluster_robust_regression():
    steps = made("weak", n=60)
    found = analyse(steps, Statistics(resamples=2000)).estimates["slope"]
    fit = sm.OLS(steps.recall, sm.add_constant(steps.entropy)).fit(
        cov_type="cluster", cov_kwds={"groups": steps.example}, use_t=True
    )
    low, high = fit.conf_int()[1]
    assert found.high - found.low == pytest.approx(high - low, rel=0.2)
    single = sm.OLS(steps.recall, sm.add_constant(steps.entropy)).fit().conf_int()[1]
    assert abs(found.value - fit.params[1]) < 1e-9
    assert single[1] - single[0] != pytest.approx(found.high - found.low, rel=0.05)


@given(scale=st.floats(0.01, 100), shift=st.floats(0, 50), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_correlations_do_not_depend_on_units(scale, shift, seed):
    steps = made("weak", n=6, steps=6, seed=seed)
    weights = resample_weights(6, 40, 0)
    units = (steps.entropy, steps.entropy * scale + shift)
    one, two = (moments2(x, [steps.recall], steps.example, weights)[0].correlation(0.95) for x in units)
    np.testing.assert_allclose((one.value, one.low, one.high), (two.value, two.low, two.high), atol=1e-7)
    assert -1 <= one.low <= one.value <= one.high <= 1


def test_copies_of_steps_within_examples_add_no_certainty():
    steps = made("weak", n=12, steps=10)
    twice = np.repeat(np.arange(len(steps)), 2)
    fields = {name: getattr(steps, name)[twice] for name in ("example", "entropy", "recall", "step", "length", "kind")}
    one, two = (analyse(s, FAST).estimates for s in (steps, changed(steps, **fields)))
    for name in ("pearson", "trend", "slope", "partial", "auroc"):
        assert (one[name].low, one[name].high) == pytest.approx((two[name].low, two[name].high), abs=1e-9)


def with_questions(truth: str, n: int, questions: int, shared: bool):
    """Analyse n examples, each ``questions`` times under different names; their context is the cluster if
    ``shared``."""
    rows = [
        own | {"example_id": f"{own['example_id']}-{q}", "cluster": own["example_id"] if shared else None}
        for own in rows_of(made(truth, n=n, steps=10))
        for q in range(questions)
    ]
    frame = pl.from_arrow(table(rows)).select(COLUMNS)
    [(_, steps)] = cells(frame.sample(fraction=1, shuffle=True, seed=1))
    return analyse(steps, FAST)


def test_copies_of_examples_about_one_context_add_no_certainty():
    """Check that three questions with the same steps count as one; with a context each they would count as three."""
    one, three, apart = (with_questions("weak", 12, *q) for q in ((1, False), (3, True), (3, False)))
    for name in ("pearson", "spearman", "pearson_within", "spearman_within", "trend", "slope", "partial", "auroc"):
        single, shared, own = (cell.estimates[name] for cell in (one, three, apart))
        assert shared.value == pytest.approx(single.value, abs=1e-9)
        assert (shared.low, shared.high) == pytest.approx((single.low, single.high), abs=1e-9)
        assert own.high - own.low < 0.8 * (shared.high - shared.low)
    means = [{r["statistic"]: r for r in cell.rows} for cell in (one, three, apart)]
    single, shared, own = (found["recall"] for found in means)
    assert (shared["ci_low"], shared["ci_high"]) == pytest.approx((single["ci_low"], single["ci_high"]), abs=1e-9)
    assert own["ci_high"] - own["ci_low"] < 0.8 * (shared["ci_high"] - shared["ci_low"])
    assert (shared["n"], shared["clusters"]) == (36, 12)
    assert (own["n"], own["clusters"]) == (36, 36)
    assert means[1]["verdict"]["n"] == 36
    assert means[1]["verdict"]["clusters"] == 12
    low = means[1]["recall_low"]
    assert low["n"] == 3 * low["clusters"] > 0
    assert f"n = {low['n']} from {low['clusters']} documents" in means[1]["verdict"]["reason"]


def test_entropy_bins_are_those_of_the_definition():
    assert levels(np.array([0, 0.999, 1.0, 2.5, 2.501])).tolist() == [0, 0, 1, 1, 2]


def test_where_few_examples_carry_high_entropy_the_trend_is_less_certain():
    """Check that the trend has fewer degrees of freedom if only two examples have high entropy."""
    spread = made("driven", n=20, steps=12)
    low = np.where(spread.example < 2, spread.entropy, np.minimum(spread.entropy, 0.9))
    few = analyse(changed(spread, entropy=low), FAST).estimates["trend"]
    many = analyse(spread, FAST).estimates["trend"]
    assert few.by.degrees < 3 < many.by.degrees


# Verdicts


@pytest.mark.parametrize(
    ("truth", "raw", "after"),
    [
        ("driven", CONFIRMED, CONFIRMED),
        ("unrelated", NOT_CONFIRMED, NOT_CONFIRMED),
        ("by_step", CONFIRMED, AFTER_CONTROLLING),
        ("by_length", None, AFTER_CONTROLLING),
        ("by_kind", None, AFTER_CONTROLLING),
        ("borderline", UNDECIDED, UNDECIDED),
    ],
)
def test_verdicts_on_known_truths(truth, raw, after):
    found = [analyse(made(truth, n=40, steps=24, seed=seed), FAST) for seed in range(20)]
    assert sum(cell.controlled.outcome == after for cell in found) >= 18
    if raw:
        assert sum(cell.verdict.outcome == raw for cell in found) >= 18
    if truth != "driven":
        assert not any(cell.controlled.outcome == CONFIRMED for cell in found[:10])


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, 0.5, "made up")


def mean(value: float, low: float, high: float) -> Bin:
    return Bin(value, low, high, 20, 100)


DOWN, FLAT, UP = estimate(-0.3, -0.4, -0.2), estimate(-0.1, -0.3, 0.0), estimate(0.2, 0.1, 0.3)
GOOD_LOW, POOR_LOW, OPEN_LOW = mean(0.9, 0.8, 0.95), mean(0.7, 0.6, 0.79), mean(0.85, 0.79, 0.9)
GOOD_HIGH, POOR_HIGH, OPEN_HIGH = mean(0.4, 0.3, 0.49), mean(0.6, 0.5, 0.7), mean(0.4, 0.3, 0.5)


@pytest.mark.parametrize(
    ("trend", "low", "high", "outcome", "words"),
    [
        (DOWN, GOOD_LOW, GOOD_HIGH, CONFIRMED, "0.90 [0.80, 0.95] (n = 20, 100 steps)"),
        (FLAT, GOOD_LOW, GOOD_HIGH, NOT_CONFIRMED, "is not downward"),
        (UP, GOOD_LOW, GOOD_HIGH, NOT_CONFIRMED, "is upward"),
        (DOWN, POOR_LOW, GOOD_HIGH, NOT_CONFIRMED, "is below 0.8"),
        (DOWN, GOOD_LOW, POOR_HIGH, NOT_CONFIRMED, "is not below 0.5"),
        (DOWN, OPEN_LOW, GOOD_HIGH, UNDECIDED, "may be above or below 0.8: n is too small"),
        (DOWN, GOOD_LOW, OPEN_HIGH, UNDECIDED, "may be above or below 0.5: n is too small"),
        (FLAT, OPEN_LOW, OPEN_HIGH, NOT_CONFIRMED, "is not downward"),
        (DOWN, GOOD_LOW, Bin(np.nan, np.nan, np.nan, 0, 0), UNDECIDED, "no step has an entropy above 2.5 nats"),
        (DOWN, Bin(np.nan, np.nan, np.nan, 0, 0), GOOD_HIGH, UNDECIDED, "no step has an entropy below 1 nat"),
        (estimate(-0.3, np.nan, np.nan), GOOD_LOW, GOOD_HIGH, UNDECIDED, "has no interval (made up)"),
    ],
)
def test_the_rule(trend, low, high, outcome, words):
    found = judge(trend, low, high)
    assert found.outcome == outcome
    assert words in found.reason


def test_the_rule_after_controlling():
    raw = judge(DOWN, GOOD_LOW, GOOD_HIGH)

    def after(partial: Estimate, first=raw, controls="step"):
        return controlled(first, estimate(-0.5, -0.6, -0.4), partial, GOOD_LOW, GOOD_HIGH, controls)

    assert after(DOWN).outcome == CONFIRMED
    assert "with step held constant" in after(DOWN).reason
    assert after(estimate(0.0, -0.2, 0.2)).outcome == AFTER_CONTROLLING
    assert after(estimate(-0.2, -0.7, 0.2)).outcome == UNDECIDED, "the association may be gone or unchanged"
    assert after(FLAT, controls="") == raw, "without anything to control for the first verdict stands"
    flat = judge(FLAT, GOOD_LOW, GOOD_HIGH)
    assert after(DOWN, flat).outcome == NOT_CONFIRMED
    assert "is downward" in after(DOWN, flat).reason


# Degenerate cases are named in words


def words_of(steps) -> dict[str, str]:
    return {row["statistic"]: row.get("method") or row.get("reason") for row in analyse(steps, FAST).rows}


def test_constant_entropy_is_said():
    steps = made("driven", n=12)
    found = words_of(changed(steps, entropy=np.full(len(steps), 0.5), recall=0.9 + 0.1 * steps.recall))
    assert found["pearson"] == found["spearman"] == found["slope"] == found["auroc"] == "the entropy does not vary"
    assert found["partial"] == "the entropy does not vary"
    assert found["trend"] == "all steps have low entropy"
    assert found["recall_high"] == "no step has such an entropy"
    assert "no step has an entropy above 2.5 nats" in found["verdict"]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_constant_recall_is_said(value):
    steps = made("driven", n=12)
    cell = analyse(changed(steps, recall=np.full(len(steps), value)), FAST)
    found = {row["statistic"]: row for row in cell.rows}
    assert found["pearson"]["method"] == found["spearman"]["method"] == "the recall does not vary"
    assert found["auroc"]["method"] == f"recall is {'always' if value < 0.5 else 'never'} below one half"
    assert found["slope"]["estimate"] == pytest.approx(0, abs=1e-12)
    assert cell.verdict.outcome == NOT_CONFIRMED


def test_one_example_gets_no_interval_and_no_verdict():
    steps = made("driven", n=1, steps=30)
    cell = analyse(steps, FAST)
    found = {row["statistic"]: row for row in cell.rows}
    for name in ("pearson", "spearman", "pearson_within", "trend", "slope"):
        assert found[name]["ci_low"] is None
        assert "one example" in found[name]["method"]
    assert cell.verdict.outcome == UNDECIDED
    assert "one example" in cell.verdict.reason


def test_entropy_that_only_follows_the_step_cannot_be_told_from_it():
    """Check that no relation is confirmed if the entropy depends on the step only."""
    steps = made("by_step", n=12)
    cell = analyse(changed(steps, entropy=0.2 * steps.step), FAST)
    assert cell.estimates["partial_step"].method == "the entropy does not vary"
    assert cell.controlled.outcome != CONFIRMED


def test_nan_and_null_steps_are_left_out_and_counted(tmp_path):
    steps = made("driven", n=12)
    rows = rows_of(steps)
    for i, name in ((0, "entropy"), (1, "recall"), (2, "recall")):
        rows[i][name] = float("nan") if i < 2 else None
    pq.write_table(table(rows), tmp_path / "o.parquet")
    found = pl.from_arrow(entropy_recall([str(tmp_path / "o.parquet")], FAST))
    assert row(found, "recall")["steps"] == len(steps) - 3
    assert row(found, "verdict")["reason"].startswith("3 steps without entropy or recall omitted; ")


def test_a_cell_without_any_recall_is_in_the_table(tmp_path):
    rows = [r | {"recall": None} for r in rows_of(made("driven", n=3))]
    pq.write_table(table(rows), tmp_path / "o.parquet")
    found = pl.from_arrow(entropy_recall([str(tmp_path / "o.parquet")], FAST))
    assert row(found, "verdict")["outcome"] == UNDECIDED
    assert row(found, "pearson")["method"] == "no step was observed"
    assert row(found, "recall_low")["n"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recall": 1.2}, "has a recall outside"),
        ({"entropy": -0.1}, "negative or infinite"),
        ({"entropy": float("inf")}, "negative or infinite"),
        ({"step": 0, "example_id": "e000"}, "occurs more than once"),
    ],
)
def test_impossible_rows_are_named(tmp_path, change, words):
    rows = rows_of(made("driven", n=3))
    rows[-1] |= change
    rows[-1] |= {"prompt_kind": rows[0]["prompt_kind"]} if "step" in change else {}
    pq.write_table(table(rows), tmp_path / "o.parquet")
    with pytest.raises(UserError, match=words) as caught:
        read_observations([str(tmp_path / "o.parquet")])
    assert "reader_qa/h2o/r0.2/global/ideal" in str(caught.value)


def test_no_observation_at_all_is_an_error(tmp_path):
    pq.write_table(table([]), tmp_path / "o.parquet")
    with pytest.raises(UserError, match="no observed step"):
        read_observations([str(tmp_path / "o.parquet")])


def test_two_prompts_about_one_document_are_one_cluster(tmp_path):
    rows = rows_of(made("driven", n=4))
    rows += [r | {"prompt_kind": "continuation"} for r in rows]
    pq.write_table(table(rows), tmp_path / "o.parquet")
    ((_, steps),) = cells(read_observations([str(tmp_path / "o.parquet")]))
    assert len(steps.examples) == 4
    assert len(steps) == len(rows)
    assert (np.diff(steps.example) >= 0).all()


# The table


def test_the_table_holds_every_statistic_of_every_cell(files):
    found = pl.read_parquet(files[0])
    assert found.columns == ENTROPY_RECALL.names
    cell = {"policy": "h2o", "budget": "r0.1", "granularity": "global", "memory": "ideal"}
    names = ("recall", "recall_low", "recall_medium", "recall_high", "failed_recall", "pearson", "spearman", "auroc",
             "pearson_within", "spearman_within", "partial", "partial_step", "partial_length", "partial_kind", "trend",
             "slope", "entropy_on_step", "recall_on_length", "entropy_of_kind:a", "recall_of_kind:c", "verdict",
             "verdict_controlled")  # fmt: skip
    for name in names:
        assert row(found, name, **cell)["n"] > 0
    assert row(found, "pearson", **cell)["n"] == 24
    assert found.select("policy", "budget", "granularity", "memory").drop_nulls().n_unique() == 2 * (4 + 2)
    assert read_metadata(files[0])["statistics"]


def test_trends_are_adjusted_by_holm_within_granularity_and_memory(files):
    from statsmodels.stats.multitest import multipletests

    trends = pl.read_parquet(files[0]).filter(statistic="trend")
    for _, family in trends.group_by("granularity", "memory"):
        assert family["family"].n_unique() == 1
        expected = multipletests(family["p_value"].to_numpy(), method="holm")[1]
        np.testing.assert_allclose(family["p_holm"].to_numpy(), expected)


def test_sensitivity_is_the_slope_of_slopes(files):
    found = pl.read_parquet(files[0])
    cell = {"policy": "h2o", "granularity": "global", "memory": "ideal"}
    r = [0.1, 0.2, 0.3, 0.5]
    slopes = [row(found, "slope", budget=f"r{x}", **cell)["estimate"] for x in r]
    got = row(found.filter(pl.col("budget").is_null()), "sensitivity", **cell)
    assert got["estimate"] == pytest.approx(stats.linregress(r, slopes).slope)
    assert got["ci_low"] > 0, "recall falls faster at smaller budgets"
    corrected = found.filter(statistic="sensitivity_corrected", **cell)["estimate"][0]
    assert corrected == pytest.approx(stats.linregress(r, [s / (1 - x) for s, x in zip(slopes, r, strict=True)]).slope)


def test_one_budget_has_no_sensitivity(tmp_path):
    pq.write_table(table(rows_of(made("driven", n=4))), tmp_path / "o.parquet")
    found = pl.from_arrow(entropy_recall([str(tmp_path / "o.parquet")], FAST))
    assert row(found, "sensitivity")["method"] == "needs two budgets that are fractions"


def test_the_same_observations_give_the_same_table(files):
    again = entropy_recall(files[1], Statistics(**STATISTICS))
    assert again.equals(pq.read_table(files[0]).cast(again.schema))


# Figures


def text_of(svg: str) -> str:
    return " ".join(re.findall(r">([^<>]+)<", svg))


def test_figures_name_budgets_policies_n_and_the_chance_level(files, tmp_path):
    names = ("entropy_bins_svg", "entropy_scatter_svg", "entropy_bins_png")
    outputs = {name: str(tmp_path / name) for name in names}
    plots.write_entropy_recall_plots(*files, 0.95, outputs)
    bins, scatter = (text_of((tmp_path / name).read_text()) for name in names[:2])
    for part in ("h2o", "snapkv", "10 %", "50 %", "95 % intervals", "n = ", "chance level", "&lt; 1 nat"):
        assert part in bins
    for part in ("h2o", "least squares", "r = ", "nats"):
        assert part in scatter
    assert (tmp_path / names[2]).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no figure is called 'pie_svg'"):
        plots.write_entropy_recall_plots(*files, 0.95, {"pie_svg": "p"})


def test_a_policy_without_the_studys_form_is_drawn_as_it_was_observed(files):
    found = read_table(files[0]).filter(~((pl.col("policy") == "snapkv") & (pl.col("granularity") == "global")))
    assert [key[1:] for key in plots.chosen(found)] == [
        ("h2o", "global", "ideal"),
        ("snapkv", "per_head", "irreversible"),
    ]


def test_points_drawn_are_the_means_of_the_table(files):
    found = read_table(files[0])
    rows = plots.bin_rows(found)
    assert len(rows) == found.filter(pl.col("statistic").is_in(["recall_low", "recall_medium", "recall_high"])).height
    one = next(r for r in rows if r["bin"] == "high" and r["policy"] == "h2o" and r["granularity"] == "global")
    key = {k: one[k] for k in plots.KEY}
    budget = f"r{float(one['budget'].removesuffix(' %')) / 100:g}"
    assert one["estimate"] == row(found, "recall_high", budget=budget, **key)["estimate"]


def test_nothing_to_draw_is_a_note(tmp_path):
    rows = [r | {"recall": None} for r in rows_of(made("driven", n=2))]
    pq.write_table(table(rows), tmp_path / "o.parquet")
    write_entropy_recall([str(tmp_path / "o.parquet")], str(tmp_path / "t.parquet"), STATISTICS)
    outputs = {f"{name}_svg": str(tmp_path / f"{name}.svg") for name in ("entropy_bins", "entropy_scatter")}
    plots.write_entropy_recall_plots(str(tmp_path / "t.parquet"), [str(tmp_path / "o.parquet")], 0.95, outputs)
    assert "No step has entropy and recall." in text_of((tmp_path / "entropy_bins.svg").read_text())
    assert plots.bins_explorer(read_table(str(tmp_path / "t.parquet")), 0.95) is None


# The policy entropy_recall


def test_controls_and_bounds_belong_to_their_policy():
    other = {"kind": "entropy_recall", "tau": 2.0, "inner": "tova"}
    policies = POLICIES | {"other": other, "others": other | {"moments": "random", "like": "other"}}
    assert pairs_of(policies) == [
        ("entropy_recall", "at_random"),
        ("entropy_recall", "evenly"),
        ("entropy_recall", "never"),
        ("entropy_recall", "always"),
        ("other", "others"),
    ]
    assert pairs_of({"full": {}, "h2o": {}}) == []


@pytest.mark.parametrize(
    ("gain", "said"),
    [(0.35, "Yes: score 0."), (0.0, "Not shown: score"), (-0.35, "No, entropy chooses worse moments: score −0.")],
)
def test_whether_entropy_chooses_better_moments(gain, said):
    found = pl.from_arrow(recall_moments(recalled_scores(gain, n=80), POLICIES, FAST)).filter(budget="r0.2")
    got = row(found, "score", reference_policy="at_random")
    scores = pl.from_arrow(recalled_scores(gain, n=80)).filter(budget="r0.2")
    means = {p: scores.filter(policy=p)["score"].mean() for p in ("entropy_recall", "at_random")}
    assert got["estimate"] == pytest.approx(means["entropy_recall"] - means["at_random"])
    assert got["n"] == 80
    assert answer(got, "random", 0.05).startswith(said)
    assert row(found, "triggers", reference_policy="at_random")["estimate"] == 0
    assert row(found, "score", reference_policy="always")["family"] is None, "bounds are no test of the moments"


def test_costs_are_means_over_examples():
    (point,) = [
        p for p in points(recalled_scores(0.1), POLICIES, 0.95) if (p["policy"], p["budget"]) == ("evenly", "r0.5")
    ]
    moved = [int(0.2 * 2**20 * (1 + i % 3)) for i in range(40)]
    assert point["moved_bytes"]["estimate"] == pytest.approx(np.mean(moved))
    assert point["moments"] == "periodic"
    assert point["total_bytes"]["estimate"] == 2**22


def test_the_figure_of_the_moments(tmp_path):
    pq.write_table(recalled_scores(0.2), tmp_path / "s.parquet")
    plots.write_moments_plots(
        str(tmp_path / "s.parquet"), POLICIES, 0.95, {"recall_moments_svg": str(tmp_path / "m.svg")}
    )
    words = text_of((tmp_path / "m.svg").read_text())
    for part in ("at_random", "entropy_recall", "hot", "total", "moved", "n = 40", "95 % intervals"):
        assert part in words
    plots.write_moments_plots(
        str(tmp_path / "s.parquet"), {"h2o": {}}, 0.95, {"recall_moments_svg": str(tmp_path / "n.svg")}
    )
    assert "No answer records" in text_of((tmp_path / "n.svg").read_text())


# The report section


def report(folder, monkeypatch, files=None, moments=True) -> tuple[str, str]:
    """Return the whole report as Markdown and as HTML, with the section if ``files`` or ``moments`` are given."""
    from kv_transition.outputs import build
    from kv_transition.studies.grid.analysis.aggregate import write_aggregates
    from kv_transition.studies.grid.analysis.transition import write_transition
    from kv_transition.studies.recall import report as entropy_recall

    section = entropy_recall.SECTIONS[0]
    monkeypatch.setattr(build, "SECTIONS", (section,))
    monkeypatch.setattr(build, "FIGURES", build.FIGURES | entropy_recall.FIGURES)
    paths = {name: str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "comparisons", "transition")}
    pq.write_table(recalled_scores(0.3, n=60), paths["scores"])
    write_aggregates(paths["scores"], paths["bin_stats"], paths["comparisons"], STATISTICS)
    write_transition(paths["scores"], paths["transition"], STATISTICS)
    extra = {"recall_moments": str(folder / "recall_moments.parquet")}
    if moments:
        write_recall_moments(paths["scores"], extra["recall_moments"], STATISTICS, POLICIES)
        outputs = {"recall_moments_svg": str(folder / "plots" / "recall_moments.svg")}
        plots.write_moments_plots(paths["scores"], POLICIES, 0.95, outputs)
    if files:
        extra["entropy_recall"] = files[0]
        outputs = {f"{n}_svg": str(folder / "plots" / f"{n}.svg") for n in ("entropy_bins", "entropy_scatter")}
        plots.write_entropy_recall_plots(*files, 0.95, outputs)
    config = {"experiment": "demo", "dataset": {"name": "synthetic", "tasks": ["reader_qa"]}, "statistics": STATISTICS,
              "model": {"name": "resources/tiny-reader", "dtype": "float32", "device": "cpu"},
              "kv": {"policies": POLICIES}, "decoding": {"temperature": 0.0, "repeats": 1}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    build.build_report(
        **paths, manifests=[], config=str(folder / "config.yaml"), plots_dir=str(folder / "plots"), extra=extra,
        output_md=str(folder / "report.md"), output_html=str(folder / "report.html"),
    )  # fmt: skip
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_report_has_a_section_where_the_table_is(files, tmp_path, monkeypatch):
    text, page = report(tmp_path, monkeypatch, files)
    found = pl.read_parquet(files[0])
    counts = found.filter(statistic="verdict_controlled")["outcome"].value_counts().rows()
    assert f"of {sum(n for _, n in counts)} combinations" in text
    start = text.index("## Entropy and recall")
    own = text[start : text.index("\n## ", start + 5)]
    for part in ("One set for all heads, ideal memory", "Possible confounders",
                 "Does the association depend on the budget?",
                 "plots/entropy_bins.svg", "mean entropy, a, nats"):  # fmt: skip
        assert part in own
    assert "- entropy_recall, 20 % kept, after the prompt: Yes: score" in own
    assert 'data-chart="entropy_recall"' in page
    assert not re.search(r"\b(nan|NaN|None|inf)\b", own)
    numbers = re.findall(r'data-from="entropy_recall/([^"]+)" data-n="(\d+)"[^>]*>([^<]+)<', page)
    assert len(numbers) > 50
    for source, n, shown in numbers:
        task, policy, budget, granularity, memory, statistic = source.split("/")
        key = {"task": task, "policy": policy, "granularity": granularity, "memory": memory}
        one = found.filter(pl.col("budget").is_null() if budget == "all" else pl.col("budget") == budget)
        one = row(one, statistic, **key)
        assert int(n) == one["n"]
        digits = len(re.match(r"[+−-]?\d+\.(\d+)", shown)[1])
        assert float(shown.split()[0].replace("−", "-")) == pytest.approx(one["estimate"], abs=0.51 * 10**-digits)


def test_the_report_has_no_section_without_a_table(tmp_path, monkeypatch):
    text, page = report(tmp_path, monkeypatch, moments=False)
    assert "Entropy and recall" not in text
    assert 'id="entropy_recall"' not in page


def test_the_section_stands_with_the_policy_alone(tmp_path, monkeypatch):
    """Check the section of the report if there are scores of entropy_recall, but no observations."""
    text, _ = report(tmp_path, monkeypatch)
    assert "Does entropy choose better moments" in text
    assert "Possible confounders" not in text


def test_a_report_of_observations_without_recall_is_still_written(tmp_path, monkeypatch):
    rows = [r | {"recall": None} for r in rows_of(made("driven", n=2))]
    pq.write_table(table(rows), tmp_path / "o.parquet")
    write_entropy_recall([str(tmp_path / "o.parquet")], str(tmp_path / "entropy_recall.parquet"), STATISTICS)
    files = str(tmp_path / "entropy_recall.parquet"), [str(tmp_path / "o.parquet")]
    text, _ = report(tmp_path, monkeypatch, files, moments=False)
    assert "undecided for 1 of 1 combinations" in text
