"""Test that after a change exactly the affected jobs run again."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
from project import SMALL

# two bins each
CELLS = {"full": 2, "h2o": 2, "h2o_heavy": 2, "snap": 2}
ANALYSIS = {"score": 1, "aggregate": 1, "transition": 1, "plots": 1, "report": 1, "exports": 1}
GPU_PATH = {"download", "prepare", "prefill", "cell"}


@pytest.fixture
def project(finished, tmp_path):
    """Return a copy of the finished experiment that a test may change, with time stamps and Snakemake's state."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder, symlinks=True)
    mine = copy.copy(finished)
    mine.folder = folder
    return mine


def changed(**kv) -> dict:
    config = copy.deepcopy(SMALL)
    config["kv"] |= kv
    return config


def cells_of(project, *arguments):
    """Return the policies whose cells would run again, with their numbers of cells."""
    done = project.snakemake("--dry-run", *arguments)
    outputs = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    cells = [line.split("/cells/")[1] for line in outputs if line.startswith("output: ") and "/cells/" in line]
    return Counter(cell.split("/")[2] for cell in cells)


def test_a_second_run_has_nothing_to_do(project):
    assert "Nothing to be done" in project.run()


def test_a_deleted_cell_is_run_again_alone(project):
    (project.results / "cells/reader_qa/before_question/h2o/r0.5/bin1.parquet").unlink()
    assert project.planned() == {"cell": 1, **ANALYSIS}
    assert cells_of(project) == {"h2o": 1}


def test_a_new_policy_is_one_file_and_one_line_of_config(project):
    policies = project.folder / "src/kv_transition/policies"
    source = (policies / "knorm.py").read_text()
    (policies / "mine.py").write_text(source.replace("return -layer", "return layer"))
    project.configure(changed(policies=SMALL["kv"]["policies"] | {"mine": {}}))
    assert project.planned() == {"cell": 2, "grid": 1, "experiment": 1, **ANALYSIS}
    assert cells_of(project) == {"mine": 2}


def test_a_new_budget_runs_its_cells_only(project):
    project.configure(changed(budgets=[1.0, 0.5, {"tokens": 32}]))
    assert project.planned() == {"cell": 6, "grid": 1, "experiment": 1, **ANALYSIS}
    assert cells_of(project) == {"h2o": 2, "h2o_heavy": 2, "snap": 2}


def test_an_edited_policy_runs_its_own_cells(project):
    project.edit("src/kv_transition/policies/snapkv.py", "return max(1, min(", "return max(2, min(")
    assert project.planned() == {"cell": 2, "grid": 1, **ANALYSIS}
    assert cells_of(project) == {"snap": 2}


def test_an_edited_parent_runs_its_children_too(project):
    """Check that an edit of a policy's module reruns the policies that inherit from it."""
    project.edit("src/kv_transition/policies/h2o.py", "int(k * self.recent_share)", "round(k * self.recent_share)")
    assert cells_of(project) == {"h2o": 2, "h2o_heavy": 2}


def test_a_changed_hyper_parameter_runs_its_variant(project):
    policies = SMALL["kv"]["policies"] | {"snap": {"kind": "snapkv", "window": 8}}
    project.configure(changed(policies=policies))
    assert project.planned() == {"cell": 2, "grid": 1, "experiment": 1, **ANALYSIS}
    assert cells_of(project) == {"snap": 2}


def test_an_unrelated_key_runs_no_cell(project):
    project.configure(SMALL | {"hardware": {"runtime_min": 5}})
    assert project.planned() == {"experiment": 1, "report": 1, "exports": 1}


def test_a_changed_plot_is_drawn_again(project):
    path = project.folder / "src/kv_transition/studies/grid/plots.py"
    path.write_text(path.read_text() + "\n\nCHANGED = True\n")
    assert project.planned() == {"plots": 1, "report": 1}


def test_an_edited_data_module_runs_from_there_on(project):
    path = project.folder / "src/kv_transition/data/binning.py"
    path.write_text(path.read_text() + "\n\nCHANGED = True\n")
    assert project.planned() == {"prepare": 1, "prefill": 2, "cell": 8, **ANALYSIS}


def test_without_prefill_tensors_a_new_policy_runs_alone_and_answers_the_same(project):
    cell = "cells/reader_qa/before_question/{}/r0.5/bin1.parquet"
    shutil.rmtree(project.folder / "results/prefill")
    project.configure(changed(policies=SMALL["kv"]["policies"] | {"again": {"kind": "h2o"}}))
    assert project.planned()["cell"] == 2
    assert "prefill" not in project.planned()
    project.run()
    texts = [pq.read_table(project.results / cell.format(policy))["text"].to_pylist() for policy in ("h2o", "again")]
    assert texts[0] == texts[1]


def test_touching_every_source_runs_nothing_on_the_gpu_path(project):
    """Check that new time stamps of all sources rerun no job on the GPU path."""
    later = time.time() + 5
    for part in ("src", "scripts", "workflow", "envs", "Snakefile", "small.yaml"):
        path = project.folder / part
        for file in [path] if path.is_file() else path.rglob("*"):
            os.utime(file, (later, later))
    assert not GPU_PATH & set(project.planned())


def test_explaining_code_better_runs_nothing_on_the_gpu_path(project):
    """Check that new comments rerun no job."""
    for file in (project.folder / "src").rglob("*.py"):
        file.write_text("# A comment.\n" + file.read_text())
    assert not project.planned()


def test_without_snakemakes_memory_scoring_names_the_cells_that_no_longer_fit(project):
    shutil.rmtree(project.folder / ".snakemake")
    assert "Nothing to be done" in project.run()
    policies = SMALL["kv"]["policies"] | {"snap": {"kind": "snapkv", "window": 8}}
    project.configure(changed(policies=policies))
    assert project.snakemake().returncode != 0
    sentence = (project.results / "logs/score.log").read_text()
    assert "cells/reader_qa/before_question/snap/r0.5/bin0.parquet" in sentence
    assert "/h2o/" not in sentence
    _, cost = sentence.splitlines()
    assert cost.startswith("worker ")


def test_a_killed_run_is_taken_up_again(project, tmp_path):
    """Check that an incomplete cell is run again and that the others are kept."""
    done = pq.read_table(project.results / "cells/reader_qa/before_question/full/r1/bin0.parquet")
    (project.results / "cells/reader_qa/before_question/full/r1/bin0.parquet").unlink()
    temporary = project.results / "cells/reader_qa/before_question/full/r1/.bin0.parquet.half"
    temporary.write_bytes(b"half a file")
    assert project.planned()["cell"] == 1
    project.run()
    again = pq.read_table(project.results / "cells/reader_qa/before_question/full/r1/bin0.parquet")
    assert again["text"] == done["text"]
