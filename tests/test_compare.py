"""Test the comparison of two experiments: paired differences, settings that differ, and error sentences."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats
from simulated_scores import demo

from kv_transition.errors import UserError
from kv_transition.outputs.compare import compare, setting_differences

CONFIG = {
    "experiment": "one", "model": {"name": "org/model", "dtype": "float32"}, "kv": {"budgets": [0.5, 0.2]},
    "statistics": {"confidence": 0.95, "resamples": 2000, "seed": 0}, "provenance": {"git_commit": "0123456789ab"},
}  # fmt: skip


def experiment(folder: Path, rows: list[dict], **changes) -> str:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=demo(n=1).schema), folder / "scores.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [r | {"prompt_sha256": r["example_id"]} for r in demo(n=12).to_pylist() if r["policy"] != "random"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, rows):
    """Compare two experiments. B lacks the longest bin and has half the score with h2o at 20 %."""
    folder = tmp_path_factory.mktemp("compared")
    other = []
    for r in (r for r in rows if r["bin"] < 4):
        if (r["policy"], r["budget"]) == ("h2o", "r0.2"):
            r = r | {"score": r["score"] / 2}
        other.append(r)
    a = experiment(folder / "a", rows)
    b = experiment(folder / "b", other, experiment="two", model={"name": "org/model", "dtype": "bfloat16"})
    compare(a, b, str(folder / "out"))
    return folder, other


def test_differences_are_means_over_the_same_examples(compared, rows):
    folder, other = compared
    table = pl.read_csv(folder / "out/differences.csv")
    key = ("task", "mode", "policy", "budget", "example_id")
    first = {tuple(r[k] for k in key): r for r in rows}
    for mode in ("before_question", "after_prompt"):
        own = [r for r in other if (r["mode"], r["policy"], r["budget"]) == (mode, "h2o", "r0.2")]
        paired = [r["score"] - first[tuple(r[k] for k in key)]["score"] for r in own]
        found = table.filter(pl.col("bin").is_null(), mode=mode, policy="h2o", budget="r0.2", statistic="score").row(
            0, named=True
        )
        assert found["estimate"] == pytest.approx(sum(paired) / len(paired))
        assert found["n"] == len(paired) == 48
        test = stats.permutation_test(
            (paired,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=20_000, rng=0
        )
        assert found["p_value"] == pytest.approx(test.pvalue, abs=0.01)
        assert found["ci_low"] <= found["estimate"] <= found["ci_high"]


def test_where_nothing_changed_the_difference_is_none(compared):
    folder, _ = compared
    table = pl.read_csv(folder / "out/differences.csv").filter(pl.col("policy") == "snapkv", statistic="score")
    assert (table["estimate"] == 0).all()
    assert (table["p_holm"] == 1).all()


def test_holm_is_over_the_policies_and_budgets_of_a_mode(compared):
    folder, _ = compared
    table = pl.read_csv(folder / "out/differences.csv")
    own = table.filter(pl.col("bin").is_null(), mode="after_prompt", statistic="score").sort("p_value")
    assert own.height == 1 + 4 * 2
    p = own["p_value"].to_list()
    step = [min(1.0, (len(p) - i) * value) for i, value in enumerate(p)]
    assert own["p_holm"].to_list() == pytest.approx([max(step[: i + 1]) for i in range(len(step))])


def test_the_report_says_what_was_compared_and_what_differs(compared):
    folder, other = compared
    text, page = ((folder / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert "most for h2o, 20 %" in text
    assert f"{len(other)} answers are in both" in text
    assert "only in A, 0 only in B" in text
    assert "| `model.dtype` | float32 | bfloat16 |" in text
    assert "n = 12" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert (folder / "out/differences.svg").read_text().startswith("<svg")
    for name in ("nan", "None"):
        assert not re.search(rf"\b{name}\b", text)


def test_other_examples_under_the_same_name_are_left_out(tmp_path, rows):
    own = [r for r in rows if r["mode"] == "after_prompt" and r["policy"] in ("full", "tova")]
    other = [r | {"question": "Another?"} if r["bin"] == 0 else r | {"prompt_sha256": "new"} for r in own]
    a, b = experiment(tmp_path / "a", own), experiment(tmp_path / "b", other)
    compare(a, b, str(tmp_path / "out"))
    text = (tmp_path / "out/report.md").read_text()
    left = sum(r["bin"] == 0 for r in own)
    assert f"{left} answers whose question or gold answer is not the same" in text
    assert f"{len(own) - left} answers were given to prompts that are not identical" in text


def test_nothing_in_common_is_an_error_that_says_so(tmp_path, rows):
    own = [r for r in rows if r["policy"] == "tova"]
    a = experiment(tmp_path / "a", own)
    b = experiment(tmp_path / "b", [r | {"task": "other"} for r in own])
    with pytest.raises(UserError, match="have no answer in common"):
        compare(a, b, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"there is no scores\.parquet in it"):
        compare(a, str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_setting_differences_are_named_by_their_keys():
    a = {"experiment": "x", "model": {"name": "m", "dtype": "a"}, "kv": {"budgets": [0.5]}}
    b = {"experiment": "y", "model": {"name": "m", "dtype": "b"}, "decoding": {"repeats": 2}, "kv": {"budgets": [0.5]}}
    assert setting_differences(a, b) == [("decoding.repeats", "not there", "2"), ("model.dtype", "a", "b")]
