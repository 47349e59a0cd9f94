"""Test the tables of bins and comparisons: values by hand, pairing by example, clusters, and null values."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ttest_1samp
from simulated_scores import cell_rows, demo, table
from statsmodels.stats.multitest import multipletests

from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.studies.grid.analysis.aggregate import Statistics, bin_stats, comparisons, write_aggregates
from kv_transition.studies.grid.tables import BIN_STATS, COMPARISONS, NONINFERIORITY, SMALLEST_BUDGET

SETTINGS = Statistics(resamples=2000)


def scores_of(values, failed=None):
    scores = np.array(values, dtype=float)
    scores = scores[:, None] if scores.ndim == 1 else scores
    return scores, np.zeros(scores.shape, bool) if failed is None else np.array(failed, bool).reshape(scores.shape)


def stat(result: pa.Table, name: str, **key) -> dict:
    found = pl.from_arrow(result).filter(statistic=name, **key)
    assert found.height == 1
    return found.row(0, named=True)


def no_nan(result: pa.Table) -> bool:
    frame = pl.from_arrow(result)
    floats = frame.select(pl.col(pl.Float64))
    return floats.height == 0 or not floats.select(pl.all().is_nan().any()).row(0).count(True)


@pytest.fixture(scope="module")
def simulated() -> pa.Table:
    return demo()


def test_one_cell_by_hand():
    rows = cell_rows(*scores_of([1, 1, 0.5, 0, 1, 0], failed=[0, 0, 0, 1, 0, 0]))
    result = bin_stats(table(rows), SETTINGS)
    assert result.schema.names == BIN_STATS.names
    assert stat(result, "score_mean")["estimate"] == pytest.approx(3.5 / 6)
    assert stat(result, "score_mean")["n"] == 6
    assert stat(result, "failure_rate")["estimate"] == pytest.approx(1 / 6)
    assert stat(result, "score_std")["estimate"] == pytest.approx(np.std([1, 1, 0.5, 0, 1, 0], ddof=1))
    assert stat(result, "footprint")["estimate"] == 1
    latencies = sorted(row["latency_s"] for row in rows)
    assert stat(result, "latency_p50")["estimate"] == pytest.approx((latencies[2] + latencies[3]) / 2)
    assert stat(result, "score_mean")["token_min"] == min(row["token_len"] for row in rows)


def test_the_example_is_the_unit_not_the_repeat():
    result = bin_stats(table(cell_rows(*scores_of([[1, 0, 1], [0, 0, 0]]))), SETTINGS)
    mean = stat(result, "score_mean")
    assert mean["n"] == 2
    assert mean["estimate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("change", [{"co_running": True}, {"co_running": None}, {"batch_size": 8}])
def test_times_count_only_where_the_answer_had_the_machine_to_itself(change):
    """Check that times and memory are null if no answer ran alone at batch size 1."""
    rows = [row | change for row in cell_rows(*scores_of([1] * 8))]
    result = bin_stats(table(rows), SETTINGS)
    for name in ("latency_p50", "latency_p95", "ttft_p50", "tokens_per_s", "peak_mem_mb"):
        row = stat(result, name)
        assert (row["estimate"], row["ci_low"], row["n"]) == (None, None, 0)
        assert row["method"] == "no answer ran alone at batch size 1"
    assert stat(result, "cache_bytes")["n"] == 8


def test_what_a_machine_cannot_measure_is_null():
    """Check that a value that the machine cannot measure is null, with the reason as its method."""
    rows = [row | {"peak_mem_mb": None, "decode_s": 0.0} for row in cell_rows(*scores_of([1] * 8))]
    result = bin_stats(table(rows), SETTINGS)
    assert stat(result, "peak_mem_mb")["method"] == "not measured on this machine"
    assert stat(result, "tokens_per_s")["n"] == 0
    assert stat(result, "latency_p50")["n"] == 8


def test_difference_from_the_full_cache_is_paired_by_example():
    full = cell_rows(*scores_of([1, 1, 0, 1, 0.5]))
    policy = cell_rows(*scores_of([0, 1, 0, 0.5, 0.5]), policy="snapkv", budget="r0.2")
    result = comparisons(table(full + policy[::-1]), SETTINGS)
    assert result.schema.names == COMPARISONS.names
    row = stat(result, "score", bin=0)
    assert row["estimate"] == pytest.approx((-1 + 0 + 0 - 0.5 + 0) / 5)
    assert row["n"] == 5
    # Student's t-test after adding one pair in which the policy gains
    expected = ttest_1samp([-1, 0, 0, -0.5, 0, 1], 0, alternative="less").pvalue
    assert row["p_value"] == pytest.approx(min(1, 2 * expected))
    ratio = stat(result, "score_ratio")
    assert ratio["bin"] is None
    assert ratio["estimate"] == pytest.approx(2 / 3.5)


def test_only_shared_examples_are_compared():
    full = cell_rows(*scores_of([1, 1, 1, 1]))[:3]
    policy = cell_rows(*scores_of([0, 0, 0, 1]), policy="h2o", budget="r0.5")
    assert stat(comparisons(table(full + policy), SETTINGS), "score", bin=0)["n"] == 3


def test_aliases_and_runs_without_a_full_cache_are_not_compared():
    full = cell_rows(*scores_of([1, 0, 1]))
    alias = [row | {"policy": "h2o", "alias": True} for row in full]
    assert comparisons(table(full + alias), SETTINGS).num_rows == 0
    lonely = cell_rows(*scores_of([1, 0, 1]), policy="h2o", budget="r0.5")
    assert comparisons(table(lonely), SETTINGS).num_rows == 0


def test_holm_is_within_task_mode_and_budget(simulated):
    frame = pl.from_arrow(comparisons(simulated, SETTINGS)).drop_nulls("p_value")
    assert set(frame["family"]) == {
        f"reader_qa/{mode}/{budget}/{name}/{scope}"
        for mode in ("before_question", "after_prompt")
        for budget in ("r0.5", "r0.2")
        for name in ("score", "failure_rate")
        for scope in ("by bin", "all bins")
    }
    for _, family in frame.group_by("family"):
        expected = multipletests(family["p_value"].to_numpy(), method="holm")[1]
        assert family["p_holm"].to_numpy() == pytest.approx(expected)


def test_a_true_loss_is_seen_and_none_is_not(simulated):
    result = comparisons(simulated, SETTINGS)
    worst = stat(result, "score", mode="after_prompt", policy="random", budget="r0.2", bin=4)
    assert worst["ci_high"] < 0
    assert worst["p_holm"] < 0.05
    same = stat(result, "score", mode="after_prompt", policy="snapkv", budget="r0.2", bin=0)
    assert same["ci_low"] < 0 <= same["ci_high"]
    assert same["p_holm"] > 0.05


def test_speed_is_the_paired_ratio_of_times():
    full, policy = (cell_rows(*scores_of([1] * 6), policy=p, budget=b) for p, b in (("full", "r1"), ("h2o", "r0.5")))
    for slow, fast in zip(full, policy, strict=True):
        fast["latency_s"] = slow["latency_s"] / 2
    row = stat(comparisons(table(full + policy), SETTINGS), "speedup")
    assert row["estimate"] == pytest.approx(2)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((2, 2))


def test_an_empty_table_and_a_double_example_are_named():
    with pytest.raises(UserError, match="empty"):
        bin_stats(table([]), SETTINGS)
    rows = cell_rows(*scores_of([1, 0]))
    with pytest.raises(UserError, match="reader_qa-0-0 occurs more than once in cell reader_qa/after_prompt/full/r1/0"):
        bin_stats(table([*rows, rows[0]]), SETTINGS)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_examples_and_lost_answers_give_no_nan(n):
    rows = cell_rows(*scores_of([1.0] * n)) + cell_rows(*scores_of([0.0] * n), policy="h2o", budget="t64")
    rows += [row | {"score": None, "em": None, "f1": None, "contains": None, "failure": "OOM", "latency_s": None}
             for row in cell_rows(*scores_of([0.0] * n), policy="tova", budget="t64")]  # fmt: skip
    stats, compared = bin_stats(table(rows), SETTINGS), comparisons(table(rows), SETTINGS)
    assert no_nan(stats)
    assert no_nan(compared)
    assert stat(stats, "score_mean", policy="tova")["n"] == 0
    assert stat(stats, "failure_rate", policy="tova")["estimate"] == 1


def test_files_are_the_same_twice_and_carry_the_metadata_of_their_source(tmp_path, simulated):
    scores = tmp_path / "scores.parquet"
    pq.write_table(simulated.replace_schema_metadata({"model": "tiny", "git_commit": "old"}), scores)
    tables = []
    for run in ("a", "b"):
        write_aggregates(str(scores), *(str(tmp_path / f"{run}{i}.parquet") for i in (1, 2)), {"seed": 1})
        tables.append([pq.read_table(tmp_path / f"{run}{i}.parquet") for i in (1, 2)])
    assert tables[0] == tables[1]
    metadata = read_metadata(tmp_path / "a1.parquet")
    assert metadata["model"] == "tiny"
    assert metadata["git_commit"] != "old"


def test_examples_of_one_document_are_fewer_than_they_seem():
    values = np.repeat([1, 1, 0, 1], 5)
    alone = stat(bin_stats(table(cell_rows(*scores_of(values))), SETTINGS), "score_mean")
    shared = stat(bin_stats(table(cell_rows(*scores_of(values), per_document=5)), SETTINGS), "score_mean")
    assert (alone["n"], alone["clusters"]) == (20, 20)
    assert (shared["n"], shared["clusters"]) == (20, 4)
    assert shared["estimate"] == alone["estimate"]
    assert shared["ci_high"] - shared["ci_low"] > 1.5 * (alone["ci_high"] - alone["ci_low"])
    assert "clusters" in shared["method"]


def test_scores_without_the_column_of_documents_are_read_as_before():
    rows = table(cell_rows(*scores_of([1, 0, 1])))
    assert bin_stats(rows.drop_columns(["cluster"]), SETTINGS) == bin_stats(rows, SETTINGS)


def test_a_score_out_of_range_is_named_and_one_that_is_no_number_is_lost():
    """Check that a score above 1 gives an error sentence, and that a NaN counts as a missing score."""
    rows = cell_rows(*scores_of([1, 0, 1]))
    with pytest.raises(UserError, match=r"score of example reader_qa-0-1 in cell .* is 1\.2; .* between 0 and 1"):
        bin_stats(table([rows[0], rows[1] | {"score": 1.2}, rows[2]]), SETTINGS)
    row = stat(bin_stats(table([rows[0], rows[1] | {"score": float("nan")}, rows[2]]), SETTINGS), "score_mean")
    assert (row["n"], row["estimate"]) == (2, 1)


def test_the_other_tables_are_written_where_they_have_a_path(tmp_path, simulated):
    """Check that the optional tables are written if a path is given for them."""
    scores = tmp_path / "scores.parquet"
    pq.write_table(simulated, scores)
    paths = {name: str(tmp_path / f"{name}.parquet") for name in ("pairs", "noninferiority", "smallest_budgets")}
    write_aggregates(
        str(scores), str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"), {"resamples": 200},
        **{f"{name}_path": path for name, path in paths.items()},
    )  # fmt: skip
    for name, schema in (
        ("pairs", COMPARISONS),
        ("noninferiority", NONINFERIORITY),
        ("smallest_budgets", SMALLEST_BUDGET),
    ):
        found = pq.read_table(paths[name])
        assert found.num_rows > 0
        assert found.schema.names == schema.names
        assert no_nan(found)
