"""Test reports of unfinished experiments, from a small real experiment without some cells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

# Run in the experiment's own checkout, because a cell counts only with the code of that checkout.
SCRIPT = """
import sys
from kv_transition import settings
from kv_transition.errors import UserError
from kv_transition.outputs.partial import write_partial
try:
    print(write_partial(settings.load("small.yaml", [f"output.dir={sys.argv[1]}"])))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def unfinished(finished, tmp_path):
    """Return a copy of the finished experiment's results, and a function that reports on it.

    The function's process prints the path of the page or an error.
    """
    shutil.copytree(finished.results, tmp_path / "small")

    def report() -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(finished.folder / "src")}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        return subprocess.run(
            command, cwd=finished.folder, env=environment, capture_output=True, text=True, timeout=300
        )

    return tmp_path / "small", report


def test_what_is_missing_stale_or_broken_is_named_and_left_out(unfinished):
    folder, report = unfinished
    cells = folder / "cells/reader_qa/before_question"
    (cells / "h2o/r0.5/bin1.parquet").unlink()
    (cells / "snap/r0.5/bin0.parquet").write_bytes(b"PAR1 half")
    stale = cells / "h2o_heavy/r0.5/bin0.parquet"
    table = pq.read_table(stale, partitioning=None)
    where = table.schema.get_field_index("cell_hash")
    pq.write_table(table.set_column(where, "cell_hash", [["other"] * table.num_rows]), stale)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}

    done = report()

    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip())
    text = page.with_suffix(".md").read_text()
    assert "**Unfinished.** 3 cells are not in this report" in text
    assert "`cells/reader_qa/before_question/h2o/r0.5/bin1.parquet`: not run yet" in text
    assert "`cells/reader_qa/before_question/snap/r0.5/bin0.parquet`: not readable" in text
    assert "`cells/reader_qa/before_question/h2o_heavy/r0.5/bin0.parquet`: computed with other settings or code" in text
    assert "1 of 2 bins only" in text
    assert "Unfinished." in page.read_text()
    rows = pq.read_table(page.parent / "scores.parquet").to_pylist()
    found = {(r["policy"], r["bin"]) for r in rows if not r["alias"]}
    assert found == {("full", 0), ("full", 1), ("h2o", 0), ("h2o_heavy", 1), ("snap", 1)}
    assert before == {f: f.stat().st_mtime_ns for f in before}, "the experiment's own files are unchanged"


def test_without_the_full_cache_there_is_still_a_report(unfinished):
    folder, report = unfinished
    shutil.rmtree(folder / "cells/reader_qa/before_question/full")
    done = report()
    assert done.returncode == 0, done.stderr
    assert "the full cache was not run" in (folder / "partial/report.md").read_text().lower()


def test_nothing_yet_is_said_in_one_sentence(unfinished):
    folder, report = unfinished
    shutil.rmtree(folder / "cells")
    done = report()
    assert done.returncode == 1
    assert "this experiment has no finished cell yet" in done.stderr
    assert "Traceback" not in done.stderr
