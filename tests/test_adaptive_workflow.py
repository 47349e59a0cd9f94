"""Test adaptive allocation through Snakemake: rounds, and looks that decide in which bins the next round runs.

The model is scripted, so that the true effects are known and a round takes seconds: half of the answers of the policy
`fails` are empty in the longer bin; all other answers are right.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from project import SMALL, Project

from kv_transition import settings as settings_module
from kv_transition.data.shard import cut
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.studies.grid.analysis import adaptive
from kv_transition.studies.grid.analysis.aggregate import Statistics, bin_stats, comparisons
from kv_transition.studies.grid.analysis.noninferiority import noninferiority
from kv_transition.studies.grid.analysis.transition import tables_of
from kv_transition.studies.grid.settings import Adaptive

PLAN = {"enabled": True, "start": 8, "step": 8, "cap": 24}
ADAPTIVE = SMALL | {
    "dataset": SMALL["dataset"] | {"lengths": [128, 256], "n_per_length": 24},
    "binning": {"n_bins": 2, "n_per_bin": 24},
    "kv": {
        "modes": ["before_question"],
        "policies": {"full": {}, "fails": {"kind": "snapkv", "window": 16}},
        "budgets": [1.0, 0.5],
    },
    "adaptive": PLAN,
}

ARGUMENTS = """
import argparse, json
parser = argparse.ArgumentParser()
for name in ("--spec", "--threads", "--bin", "--index", "--output"):
    parser.add_argument(name)
arguments, _ = parser.parse_known_args()  # cells are told more than these need
"""
PREFILL = (
    ARGUMENTS
    + """
from kv_transition.provenance import write_json
write_json(arguments.index, {})
"""
)
CELL = (
    ARGUMENTS
    + """
import pyarrow.parquet as pq
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.studies.grid.tables import CELLS
spec = json.loads(arguments.spec)
rows = []
for example in pq.read_table(arguments.bin).to_pylist():
    fails = spec["policy"] == "fails" and example["bin"] == 1 and int(example["prompt_sha256"], 16) % 2
    rows.append({
        **{key: example[key] for key in ("task", "example_id", "bin", "prompt_sha256")},
        **{key: spec[key] for key in ("mode", "policy", "budget")},
        "cell_hash": digest(spec), "repeat": 0, "text": "" if fails else example["answers"][0],
        "finish_reason": "stop", "prompt_tokens": example["prompt_len"], "completion_tokens": 1, "kept_mean": 1.0,
        "cache_bytes": 1, "total_bytes": 1, "full_bytes": 2, "latency_s": 1.0, "ttft_s": 1.0, "decode_s": 1.0,
        "batch_size": 1, "co_running": False, "engine": "scripted",
    })
write_table(arguments.output, rows_to_table(rows, CELLS), {"clock": "process"})
"""
)


def scripted(folder: Path) -> Project:
    project = Project(folder)
    (folder / "src/kv_transition/run/prefill.py").write_text(PREFILL)
    (folder / "src/kv_transition/studies/grid/run.py").write_text(CELL)
    project.configure(ADAPTIVE)
    return project


@pytest.fixture(scope="module")
def finished_adaptive(tmp_path_factory):
    project = scripted(tmp_path_factory.mktemp("adaptive"))
    project.run()
    return project


@pytest.fixture
def project(finished_adaptive, tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(finished_adaptive.folder, folder, symlinks=True)
    mine = copy.copy(finished_adaptive)
    mine.folder = folder
    return mine


def times(project) -> dict[str, int]:
    """Return the modification time of each cell file."""
    root = project.results / "shards"
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("cells/**/*.parquet")}


def looks(project) -> list[dict]:
    return pl.read_parquet(project.results / "allocation.parquet").to_dicts()


def without_cell(project) -> dict[str, int]:
    """Delete a cell of the second round; return the modification times of the other cells."""
    cell = "1/cells/reader_qa/before_question/fails/r0.5/bin1.parquet"
    (project.results / "shards" / cell).unlink()
    return times(project)


@pytest.mark.slow
def test_only_the_undecided_bin_gets_more(finished_adaptive):
    rounds = [{r["bin"]: (r["n"], r["wanted"]) for r in looks(finished_adaptive) if r["look"] == k} for k in range(3)]
    # Eight examples decide nothing. Sixteen show that the short bin is stable, but not that half of the long bin fails.
    assert rounds == [{0: (8, 16), 1: (8, 16)}, {0: (16, 16), 1: (16, 24)}, {0: (16, 16), 1: (24, 24)}]
    scores = pl.read_parquet(finished_adaptive.results / "scores.parquet").filter(~pl.col("alias"))
    counted = scores.group_by("policy", "bin").agg(pl.col("example_id").n_unique(), pl.len())
    assert set(counted.rows()) == {(p, b, n, n) for p in ("full", "fails") for b, n in ((0, 16), (1, 24))}
    assert {path[0] + path[-len("bin0.parquet") :] for path in times(finished_adaptive)} == {
        "0bin0.parquet", "0bin1.parquet", "1bin0.parquet", "1bin1.parquet", "2bin1.parquet",
    }  # fmt: skip
    found = pl.read_parquet(finished_adaptive.results / "transition.parquet").filter(detector="definition")
    assert found.select("outcome", "onset_bin").rows() == [("unstable", 1)]


@pytest.mark.slow
def test_each_look_is_kept_and_everything_is_stated_at_the_last_ones_level(finished_adaptive):
    levels = [adaptive.confidence(adaptive.Adaptive(**PLAN), look) for look in range(3)]
    assert [row["confidence"] for row in looks(finished_adaptive)] == pytest.approx([x for x in levels for _ in "01"])
    kept = [finished_adaptive.results / f"allocation/look{look}.parquet" for look in range(3)]
    assert [row for path in kept for row in pq.read_table(path).to_pylist()] == looks(finished_adaptive)
    for table in ("bin_stats", "comparisons", "pairs", "noninferiority", "transition", "budget_transition"):
        statistics = yaml.safe_load(read_metadata(finished_adaptive.results / f"{table}.parquet")["statistics"])
        assert statistics["confidence"] == pytest.approx(levels[-1]), table
    assert (finished_adaptive.results / "report.html").is_file()


@pytest.mark.slow
def test_a_round_leaves_the_cells_of_earlier_ones_alone(finished_adaptive):
    ends = [(finished_adaptive.results / f"allocation/look{look}.parquet").stat().st_mtime_ns for look in range(3)]
    for path, written in times(finished_adaptive).items():
        number = int(path[0])
        assert (ends[number - 1] if number else 0) < written < ends[number], path


@pytest.mark.slow
def test_the_result_is_that_of_a_fixed_design_with_these_examples(project):
    fixed = {key: value for key, value in ADAPTIVE.items() if key != "adaptive"} | {"experiment": "fixed"}
    project.configure(fixed)
    plan = project.planned("--until", "score")
    assert plan == {"download": 1, "prepare": 1, "grid": 1, "prefill": 2, "cell": 4, "score": 1}
    project.run("--until", "score")
    other = project.results.parent / "fixed"
    taken = [
        pl.read_parquet(other / f"data/reader_qa/bin{b}.parquet", columns=["bin", "example_id"]).head(n)
        for b, n in ((0, 16), (1, 24))
    ]
    expected = pl.read_parquet(other / "scores.parquet").join(pl.concat(taken), on=["bin", "example_id"], how="semi")
    found = pl.read_parquet(project.results / "scores.parquet")
    key = ["policy", "budget", "bin", "example_id"]
    assert found.sort(key).equals(expected.sort(key))

    level = adaptive.confidence(adaptive.Adaptive(**PLAN), 2)
    statistics = Statistics(**SMALL["statistics"], confidence=level)
    scores = expected.to_arrow().cast(pq.read_schema(other / "scores.parquet").remove_metadata())
    transition, budget_transition = tables_of(scores, statistics)
    tables = {
        "bin_stats": bin_stats(scores, statistics),
        "comparisons": comparisons(scores, statistics),
        "noninferiority": noninferiority(scores, statistics),
        "transition": transition,
        "budget_transition": budget_transition,
    }
    for name, table in tables.items():
        assert pq.read_table(project.results / f"{name}.parquet").to_pylist() == table.to_pylist(), name


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(finished_adaptive):
    assert "Nothing to be done" in finished_adaptive.run()
    assert not finished_adaptive.planned()


@pytest.mark.slow
def test_a_lost_cell_is_run_again_alone(project):
    others = without_cell(project)
    assert project.planned()["cell"] == 1
    before = looks(project)
    project.run()
    after = times(project)
    assert {path: after[path] for path in others} == others
    assert len(after) == len(others) + 1
    assert looks(project) == before


@pytest.mark.slow
def test_another_plan_looks_again_and_runs_no_cell(project):
    project.configure(ADAPTIVE | {"adaptive": PLAN | {"cap": 16}})
    planned = project.planned()
    assert planned["allocate"]
    assert not {"shard", "prefill", "cell"} & set(planned)
    before = times(project)
    project.run()
    assert times(project) == before
    assert {row["look"] for row in looks(project)} == {0, 1}
    assert pl.read_parquet(project.results / "scores.parquet").filter(~pl.col("alias")).height == 4 * 16


@pytest.mark.slow
def test_scoring_names_cells_that_do_not_fit(project):
    shutil.rmtree(project.folder / ".snakemake")
    assert "Nothing to be done" in project.run()
    config = copy.deepcopy(ADAPTIVE)
    config["kv"]["policies"]["fails"]["window"] = 8
    project.configure(config)
    assert project.snakemake().returncode != 0
    sentence = (project.results / "shards/0/logs/score/reader_qa/bin0.log").read_text()
    assert "shards/0/cells/reader_qa/before_question/fails/r0.5/bin0.parquet" in sentence
    assert "/full/" not in sentence


@pytest.mark.slow
def test_a_dry_run_plans_the_first_round(tmp_path):
    planned = scripted(tmp_path).planned()
    assert {rule: planned[rule] for rule in ("shard", "prefill", "cell", "score_shard", "allocate")} == {
        "shard": 2, "prefill": 2, "cell": 4, "score_shard": 2, "allocate": 1,
    }  # fmt: skip


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 60))
def test_shards_cut_a_bin_at_the_sizes_of_the_looks(start, step, more):
    plan = {"start": start, "step": step, "cap": start + more}
    shards = Adaptive(**plan).shards
    assert [end for _, end in shards] == list(adaptive.Adaptive(**plan).sizes)
    assert [place for begin, end in shards for place in range(begin, end)] == list(range(start + more))


def test_shards_of_a_bin_are_its_examples_in_order(tmp_path):
    whole = str(tmp_path / "bin0.parquet")
    pq.write_table(pl.DataFrame({"example_id": list("abcdefg")}).to_arrow().replace_schema_metadata({"x": "y"}), whole)
    parts = []
    for begin, end in ((0, 3), (3, 6), (6, 9), (9, 12)):
        part = str(tmp_path / f"part{begin}.parquet")
        cut(whole, begin, end, part)
        assert read_metadata(part)["x"] == "y"
        parts.append("".join(pq.read_table(part)["example_id"].to_pylist()))
    assert parts == ["abc", "def", "g", ""]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"start": 30}, "adaptive.start: 30 is more than cap, 24; give at most the value of cap"),
        ({"cap": 40}, "adaptive.cap: 40 is more than the 24 examples that binning.n_per_bin chooses in a bin; raise"),
        ({"step": 0}, "adaptive.step: it should be greater than or equal to 1, not 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, sentence):
    with pytest.raises(UserError, match="adaptive") as error:
        settings_module.parse(ADAPTIVE | {"adaptive": PLAN | change})
    assert str(error.value).startswith(sentence)
