"""Test scoring: the join of cells and bins, and all reasons why a cell does not match."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from snakemake.iocontainers import Namedlist

from kv_transition import provenance
from kv_transition import tables as shared_tables
from kv_transition.errors import UserError
from kv_transition.studies.grid import tables
from kv_transition.studies.grid.score import score_cells

SCRIPT = Path(__file__).parents[1] / "scripts" / "call.py"
HASH = "0123456789abcdef"


class Experiment:
    """The files of a small experiment, with methods that damage them."""

    def __init__(self, root: Path):
        self.root = root
        self.output = str(root / "scores.parquet")
        self.cells: dict[str, list[dict]] = {}
        self.bins: dict[str, list[dict]] = {}
        self.manifests: list[str] = []

    def add_bin(
        self, task: str, bin: int, examples: dict[str, list[str]], dataset: str = "synthetic", **columns
    ) -> None:
        """Add a bin of examples by their id and gold answers, and the task's manifest."""
        self.bins[str(self.root / f"data/{task}/bin{bin}.parquet")] = [
            {
                "task": task,
                "example_id": example_id,
                "question": f"{example_id} ?",
                "answers": answers,
                "meta": json.dumps({"kind": "one_hop"}),
                "token_len": 100 + i,
                "bin": bin,
                "prompt_sha256": provenance.text_sha256(example_id),
                **columns,
            }
            for i, (example_id, answers) in enumerate(examples.items())
        ]
        manifest = str(self.root / f"data/{task}/manifest.json")
        if manifest not in self.manifests:
            provenance.write_json(manifest, {"version": 1, "dataset": dataset, "task": task})
            self.manifests.append(manifest)

    def add_cell(
        self,
        task: str,
        bin: int,
        texts: dict[str, str],
        mode: str = "before_question",
        policy: str = "full",
        budget: str = "r1",
        **columns,
    ) -> str:
        """Add a cell of texts by example id; return its path."""
        path = str(self.root / f"cells/{task}/{mode}/{policy}/{budget}/bin{bin}.parquet")
        self.cells[path] = [
            {
                "task": task,
                "example_id": example_id,
                "bin": bin,
                "mode": mode,
                "policy": policy,
                "budget": budget,
                "repeat": 0,
                "prompt_sha256": provenance.text_sha256(example_id),
                "text": text,
                "finish_reason": "stop",
                "latency_s": 0.5,
                "cell_hash": HASH,
                **columns,
            }
            for example_id, text in texts.items()
        ]
        return path

    def write(self) -> None:
        for path, rows in self.bins.items():
            provenance.write_table(path, provenance.rows_to_table(rows, shared_tables.BIN), {})
        for path, rows in self.cells.items():
            table = provenance.rows_to_table(rows, tables.CELLS)
            provenance.write_table(path, table, {"model": "tiny", "dtype": "float32", "cell": path})

    def score(self, **arguments) -> list[dict]:
        self.write()
        defaults = {
            "cells": list(self.cells),
            "bins": list(self.bins),
            "manifests": self.manifests,
            "expected": dict.fromkeys(self.cells, HASH),
            "output": self.output,
        }
        score_cells(**defaults | arguments)
        return pq.read_table(self.output).to_pylist()

    def refusal(self, **arguments) -> str:
        """Return the sentence with which scoring refuses, and check that no file is written."""
        with pytest.raises(UserError) as error:
            self.score(**arguments)
        assert not Path(self.output).exists()
        sentence = str(error.value)
        assert "\n" not in sentence
        return sentence


@pytest.fixture
def experiment(tmp_path):
    it = Experiment(tmp_path / "results" / "small")
    it.add_bin("reader_qa", 0, {"a": ["Paris"], "b": ["unknown"], "c": ["Port Keina", "Keina"]})
    it.add_bin("reader_qa", 1, {"d": ["1999"]})
    it.add_cell("reader_qa", 0, {"a": "Paris", "b": "unknown", "c": "the big Keina."})
    it.add_cell("reader_qa", 1, {"d": "in 1999"})
    it.add_cell("reader_qa", 0, {"c": "Keina", "a": "unknown", "b": ""}, policy="random", budget="r0.2")
    return it


def test_scores_of_every_row(experiment):
    rows = experiment.score()
    assert [(r["policy"], r["bin"], r["example_id"]) for r in rows] == [
        ("full", 0, "a"),
        ("full", 0, "b"),
        ("full", 0, "c"),
        ("full", 1, "d"),
        ("random", 0, "c"),
        ("random", 0, "a"),
        ("random", 0, "b"),
    ]
    # full: equal; equal; "big keina" against "port keina" 2*1/4 and "keina" 2*1/3; "in 1999" against "1999" 2*1/3
    assert [r["score"] for r in rows] == pytest.approx([1, 1, 2 / 3, 2 / 3, 1, 0, 0])
    assert [r["em"] for r in rows] == [1, 1, 0, 0, 1, 0, 0]
    assert [r["contains"] for r in rows] == [1, 1, 1, 1, 1, 0, 0]
    assert [r["failure"] for r in rows] == [None, None, None, None, None, "ABSTAIN", "EMPTY_OUTPUT"]
    assert [r["pred_norm"] for r in rows][2:4] == ["big keina", "in 1999"]
    assert [r["gold_norm"] for r in rows][2:4] == ["keina", "1999"]
    assert [r["token_len"] for r in rows] == [100, 101, 102, 100, 102, 100, 101]
    assert rows[2]["answers"] == ["Port Keina", "Keina"]
    assert rows[2]["question"] == "c ?"
    assert {r["meta"] for r in rows} == {'{"kind": "one_hop"}'}
    assert {r["metric"] for r in rows} == {"qa_f1"}
    assert {r["latency_s"] for r in rows} == {0.5}
    assert [r["f1"] for r in rows] == [r["score"] for r in rows]
    assert not any(r["alias"] for r in rows)


def test_the_table_has_its_schema_and_what_the_cells_have_in_common(experiment):
    experiment.score()
    assert pq.read_schema(experiment.output).equals(tables.SCORES)
    metadata = provenance.read_metadata(experiment.output)
    assert metadata["model"] == "tiny"
    assert metadata["dtype"] == "float32"
    assert "cell" not in metadata  # differs between the cells
    assert metadata["cells_git_commit"] == metadata["git_commit"]
    assert "cells_timestamp" not in metadata


def test_rows_that_the_engine_failed_on_have_a_label_and_no_score(experiment):
    path = experiment.add_cell("reader_qa", 1, {"d": ""}, policy="h2o", budget="t8", error="OOM: 3 GiB", text=None)
    row = next(r for r in experiment.score() if r["policy"] == "h2o")
    assert row["failure"] == "OOM"
    assert row["error"] == "OOM: 3 GiB"
    assert [row[name] for name in ("score", "em", "f1", "contains", "pred_norm", "gold_norm")] == [None] * 6
    assert path in experiment.cells


def test_aliases_repeat_the_full_cache_in_every_mode(experiment):
    experiment.add_cell("reader_qa", 1, {"d": "1999"}, mode="after_prompt")
    rows = experiment.score(aliases=[("snapkv", "r1"), ("h2o", "r1")])
    plain = [r for r in rows if not r["alias"]]
    assert [r["policy"] for r in rows if r["alias"]] == ["snapkv"] * 5 + ["h2o"] * 5
    full = [r for r in plain if r["policy"] == "full"]
    for policy in ("snapkv", "h2o"):
        copies = [r for r in rows if r["policy"] == policy]
        assert {r["mode"] for r in copies} == {"before_question", "after_prompt"}
        assert copies == [r | {"policy": policy, "budget": "r1", "alias": True} for r in full]


def test_aliases_of_no_full_cache_are_refused(experiment):
    for path in [p for p in experiment.cells if "/full/" in p]:
        del experiment.cells[path]
    assert "full cache" in experiment.refusal(aliases=[("snapkv", "r1")])


def test_the_task_decides_the_metric_and_the_line_that_counts(experiment):
    experiment.add_bin("trec", 0, {"t": ["Food"]}, dataset="longbench", all_classes=["Food", "Date"])
    experiment.add_cell("trec", 0, {"t": "\nFood or Date\nQuestion: Event"})
    experiment.add_bin("passage_count", 0, {"n": ["7"]}, dataset="longbench")
    experiment.add_cell("passage_count", 0, {"n": "seven"})
    trec, number = experiment.score()[-2:]
    assert (trec["metric"], trec["score"], trec["pred_norm"]) == ("classification", 0.5, "food or date")
    assert trec["f1"] == pytest.approx(2 / 4)
    assert (number["metric"], number["score"], number["failure"]) == ("count", 0, "FORMAT_ERROR")


def test_an_unfit_gold_answer_is_named_with_its_example(experiment):
    experiment.add_bin("passage_retrieval_en", 0, {"p": ["the third"]}, dataset="longbench")
    experiment.add_cell("passage_retrieval_en", 0, {"p": "Paragraph 3"})
    assert experiment.refusal().startswith("task passage_retrieval_en, example p: answer 'the third'")


def test_a_bin_without_examples_is_fine(experiment):
    experiment.add_bin("reader_qa", 2, {})
    experiment.add_cell("reader_qa", 2, {})
    assert len(experiment.score()) == 7


def test_nothing_to_score(tmp_path):
    it = Experiment(tmp_path)
    it.add_bin("reader_qa", 0, {})
    it.add_cell("reader_qa", 0, {})
    assert it.score(aliases=[("h2o", "r1")]) == []
    assert pq.read_schema(it.output).equals(tables.SCORES)


def test_repeats_are_all_scored(experiment):
    path = experiment.add_cell("reader_qa", 1, {"d": "1999"}, policy="random", budget="r0.5")
    experiment.cells[path].append(experiment.cells[path][0] | {"repeat": 1, "text": "2000"})
    rows = [r for r in experiment.score() if r["budget"] == "r0.5"]
    assert [(r["repeat"], r["score"]) for r in rows] == [(0, 1), (1, 0)]


def test_tables_are_the_same_every_time(experiment):
    assert experiment.score() == experiment.score()


# ----------------------------------------------------------------------------------------------------
# Cells that do not match


def spoil(experiment, **columns):
    path = next(p for p in experiment.cells if "/random/" in p)
    experiment.cells[path][0].update(columns)
    return path


def test_another_hash(experiment):
    path = spoil(experiment, cell_hash="feedfeed")
    sentence = experiment.refusal()
    assert sentence == (
        f"1 of 3 cells do not match this experiment ({path}: computed with other settings or code, cell_hash feedfeed "
        f"instead of {HASH}): delete these files and run again, or rerun all cells with snakemake --forcerun cell"
    )


def test_no_hash(experiment):
    spoil(experiment, cell_hash=None)
    assert "cell_hash None" in experiment.refusal()


def test_another_prompt(experiment):
    spoil(experiment, prompt_sha256="0" * 64)
    assert "answers another prompt of c" in experiment.refusal()


def test_a_missing_example(experiment):
    path = spoil(experiment)
    del experiment.cells[path][1]
    assert "has no answer to a" in experiment.refusal()


def test_an_empty_cell_of_a_bin_that_is_not(experiment):
    path = spoil(experiment)
    experiment.cells[path].clear()
    assert "has no answer to a" in experiment.refusal()


def test_a_missing_repeat(experiment):
    path = spoil(experiment)
    experiment.cells[path].append(experiment.cells[path][0] | {"repeat": 1})
    assert "has no answer to a" in experiment.refusal()


def test_a_duplicate_example(experiment):
    path = spoil(experiment)
    experiment.cells[path].append(experiment.cells[path][0])
    assert "answers c more than once" in experiment.refusal()


def test_a_surplus_example(experiment):
    spoil(experiment, example_id="z")
    assert "answers z, which is not in its bin" in experiment.refusal()


@pytest.mark.parametrize(
    ("column", "value"),
    [("task", "other"), ("bin", 3), ("mode", "after_prompt"), ("policy", "h2o"), ("budget", "r0.5")],
)
def test_rows_of_another_cell(experiment, column, value):
    spoil(experiment, **{column: value})
    assert f"contains answers of {column} {value}" in experiment.refusal()


def test_a_cell_that_is_not_expected(experiment):
    experiment.write()
    path = spoil(experiment)
    expected = {p: HASH for p in experiment.cells if p != path}
    assert f"{path}: not a cell of this experiment" in experiment.refusal(expected=expected)


def test_an_unreadable_cell_and_one_with_other_columns(experiment):
    paths = list(experiment.cells)
    experiment.write()
    Path(paths[0]).write_text("not parquet")
    provenance.write_table(paths[1], pa.table({"text": ["x"]}), {})
    Path(paths[2]).unlink()
    experiment.write = lambda: None
    sentence = experiment.refusal()
    assert sentence.startswith("3 of 3 cells do not match this experiment")
    assert all(f"{path}: not a readable cell" in sentence for path in paths)


def test_many_unfit_cells_are_counted_and_the_first_named(experiment):
    for budget in ("r0.1", "r0.3", "r0.5", "t64"):
        experiment.add_cell("reader_qa", 1, {"d": "x"}, policy="tova", budget=budget, cell_hash="old")
    sentence = experiment.refusal()
    assert sentence.startswith("4 of 7 cells do not match this experiment (")
    assert sentence.count("cell_hash old") == 3
    assert "; and 1 more)" in sentence


def test_missing_bins_and_manifests_are_named(experiment):
    bins = list(experiment.bins)
    assert "bin1.parquet: the bin file or the manifest" in experiment.refusal(bins=bins[:1])
    assert "bin0.parquet: the bin file or the manifest" in experiment.refusal(manifests=[])


def test_unreadable_bins_and_manifests_are_named(experiment):
    experiment.write()
    experiment.write = lambda: None
    Path(experiment.manifests[0]).write_text("{}")
    assert experiment.refusal().startswith(f"{experiment.manifests[0]} is not a readable manifest")
    Path(next(iter(experiment.bins))).write_text("x")
    assert "bin0.parquet is not a readable bin file" in experiment.refusal()


# ----------------------------------------------------------------------------------------------------
# The script, and speed


def run_script(experiment):
    experiment.write()
    log = experiment.root / "score.log"
    cells = list(experiment.cells)
    grid = experiment.root / "grid.json"
    grid.write_text(json.dumps(dict.fromkeys(cells, HASH)))
    inputs = {"grid": str(grid), "cells": cells, "bins": list(experiment.bins), "manifests": experiment.manifests}
    function = "kv_transition.studies.grid.score:write_scores"
    snakemake = SimpleNamespace(
        input=Namedlist(fromdict=inputs),
        params=Namedlist(fromdict={"function": function, "code": "0" * 16, "aliases": [("h2o", "r1")]}),
        output=Namedlist(fromdict={"output": experiment.output}),
        log=[str(log)],
    )
    try:
        with mock.patch.dict(os.environ, KVT_WORKER="never"):
            runpy.run_path(str(SCRIPT), init_globals={"snakemake": snakemake})
    finally:
        experiment.log = log.read_text()


def test_the_script_scores(experiment):
    run_script(experiment)
    assert pq.read_table(experiment.output).num_rows == 7 + 4
    assert experiment.log == ""


def test_the_script_ends_with_the_sentence_here_and_in_the_log(experiment, capsys):
    spoil(experiment, cell_hash="feedfeed")
    with pytest.raises(SystemExit) as end:
        run_script(experiment)
    assert end.value.code == 2
    assert "1 of 3 cells do not match this experiment" in experiment.log
    assert experiment.log.count("\n") == 1
    assert capsys.readouterr().err == experiment.log


def test_the_work_grows_in_proportion_to_the_rows(tmp_path):
    # Function calls are counted, because a time depends on other processes of the machine.
    def calls(n):
        it = Experiment(tmp_path / str(n))
        examples = {f"e{i}": [f"Keina {i}", "Port Keina"] for i in range(n)}
        it.add_bin("reader_qa", 0, examples)
        for i in range(4):
            it.add_cell(
                "reader_qa", 0, {e: f"the answer {e} is Keina {i}" for e in examples}, policy=f"p{i}", budget="r0.5"
            )
        it.write()
        it.write = lambda: None
        events = []
        sys.setprofile(lambda frame, event, argument: events.append(1) if event == "call" else None)
        try:
            rows = len(it.score())
        finally:
            sys.setprofile(None)
        assert rows == 4 * n
        return len(events)

    first, second, third = calls(100), calls(200), calls(400)
    assert third - second <= 2.2 * (second - first)
