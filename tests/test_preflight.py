"""Test checks before Snakemake starts: holders of the lock, damaged results, and disk space."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import SMALL, Project

from kv_transition import locks, preflight, provenance, settings
from kv_transition.errors import UserError
from kv_transition.worker import runs

DEAD = f"{os.uname().nodename}:1:999999999999"
"""a process of this machine that no longer exists: process 1 started earlier"""


@pytest.fixture
def lock(tmp_path):
    """Return a function that makes a folder locked by Snakemake, with the registered runs of these processes."""

    def made(*processes: str, results: str = "results/small") -> Path:
        (tmp_path / locks.LOCKS).mkdir(parents=True)
        (tmp_path / locks.LOCKS / "0.output.lock").write_text("results/small/scores.parquet\n")
        (tmp_path / locks.RUNS).mkdir()
        for i, process in enumerate(processes):
            said = {"process": process, "results": str(Path(results).absolute())}
            (tmp_path / locks.RUNS / f"{i}.json").write_text(json.dumps(said))
        return tmp_path

    return made


def test_the_lock_of_a_killed_run_is_removed(lock):
    folder = lock(DEAD)
    assert locks.clear("results/small", "snakemake --unlock", folder)
    assert not (folder / locks.LOCKS).exists()
    assert locks.left(folder) == []
    assert not locks.clear("results/small", "snakemake --unlock", folder)


def test_a_run_that_lives_keeps_its_lock(lock):
    folder = lock(runs.own(), results="results/other")
    assert not locks.clear("results/small", "snakemake --unlock", folder)
    assert (folder / locks.LOCKS / "0.output.lock").exists()
    assert len(locks.left(folder)) == 1


def test_two_runs_on_the_same_results_are_refused(lock):
    with pytest.raises(UserError, match=rf"another run works on these results \(process {os.getpid()}\)"):
        locks.clear("results/small", "snakemake --unlock", lock(runs.own()))


@pytest.mark.parametrize("processes", [[], ["elsewhere:12:34"], [DEAD, "elsewhere:12:34"]])
def test_a_lock_whose_owner_cannot_be_known_is_left_and_the_command_given(lock, processes):
    folder = lock(*processes)
    with pytest.raises(UserError, match=r"snakemake --configfile a\.yaml --unlock$"):
        locks.clear("results/small", "snakemake --configfile a.yaml --unlock", folder)
    assert (folder / locks.LOCKS / "0.output.lock").exists()


def test_a_run_says_that_it_works_and_that_it_has_ended(tmp_path):
    folder = str(tmp_path)
    code = f"from kv_transition import locks; locks.enter('results/x', {folder!r}); print(locks.left({folder!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "results/x" in done.stdout
    assert locks.left(tmp_path) == []


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / ".snakemake").write_text("")
    locks.enter("results/x", tmp_path)


# disk space


@pytest.fixture
def disk(tmp_path):
    """Yield a file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def small(folder: Path) -> settings.Settings:
    return settings.parse(SMALL | {"output": {"dir": str(folder)}})


def test_a_full_disk_is_said_before_anything_runs(disk):
    (disk / "ballast").write_bytes(b"x" * 250_000)
    with pytest.raises(UserError, match=r"^output\.dir: .* free, and about .* are needed"):
        preflight.check_folder(small(disk))


def test_a_full_disk_ends_a_write_with_one_sentence_and_leaves_what_was_there(disk):
    provenance.write_text(disk / "a.txt", "before")
    with pytest.raises(
        UserError, match=r"a\.txt: the disk is full, 400,000 bytes or more are needed and .* has [\d,]+"
    ):
        provenance.write_text(disk / "a.txt", "x" * 400_000)
    assert (disk / "a.txt").read_text() == "before"
    assert [file.name for file in disk.iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="the disk is full"), provenance.atomic_path(disk / "b.bin") as temporary:
        temporary.write_bytes(b"x" * 400_000)
    assert [file.name for file in disk.iterdir()] == ["a.txt"]


def test_a_read_only_folder_is_one_sentence(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match=r"^output\.dir: .* cannot be written to \(Read-only"):
        preflight.check_folder(small(disk))
    with pytest.raises(UserError, match=r"a\.txt cannot be written \(Read-only"):
        provenance.write_text(disk / "a.txt", "x")


def test_a_database_on_a_full_disk_is_one_sentence(disk):
    import sqlite3
    from contextlib import closing

    def fill(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("create table t (x blob)")
            db.execute("insert into t values (zeroblob(1000000))")

    with pytest.raises(UserError, match="the disk is full"), provenance.atomic_path(disk / "x.sqlite") as temporary:
        fill(temporary)
    assert list(disk.iterdir()) == []


def test_times_in_the_future_are_moved_to_now_in_their_order(tmp_path):
    root, now = tmp_path / "small", time.time()
    root.mkdir()
    times = {"old": now - 100, "first": now + 3600, "second": now + 7200}
    for name, then in times.items():
        (root / name).write_text("")
        os.utime(root / name, (then, then))
    assert "2 files" in preflight.mend_times(small(tmp_path))
    found = {name: (root / name).stat().st_mtime for name in times}
    assert found["old"] == pytest.approx(now - 100, abs=0.01)
    assert found["second"] - found["first"] == pytest.approx(3600, abs=0.01)
    assert found["second"] <= time.time()
    assert preflight.mend_times(small(tmp_path)) is None


# damaged results


@pytest.fixture
def results(finished, tmp_path, monkeypatch):
    """Return the settings of a copy of a finished experiment; the test runs in the experiment's project."""
    monkeypatch.chdir(finished.folder)
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    return small(tmp_path / "results")


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "random": os.urandom(len(content)),
                      "other": b"[]", "middle": content[:100] + b"\xff" * 200 + content[300:]}[how])  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "empty", "random", "other"])
def test_damaged_results_are_made_again(results, how):
    root = Path(results.output.dir, "small")
    assert preflight.outdated(results) == []
    cell = next(root.glob("cells/*/*/h2o/*/bin0.parquet"))
    index = root / "prefill/reader_qa/bin0.json"
    bin_file, scores = root / "data/reader_qa/bin1.parquet", root / "scores.parquet"
    for path in (cell, index, bin_file, scores):
        spoil(path, how)
    assert sorted(preflight.outdated(results, rename=False)) == sorted(map(str, (cell, index)))
    assert bin_file.exists()
    assert sorted(preflight.outdated(results)) == sorted(map(str, (cell, index)))
    assert not bin_file.exists()
    assert not scores.exists()


def test_a_cell_damaged_in_its_middle_is_made_again(results):
    cell = next(Path(results.output.dir).glob("small/cells/*/*/h2o/*/bin0.parquet"))
    spoil(cell, "middle")
    assert preflight.outdated(results) == [str(cell)]


@pytest.mark.parametrize("how", ["cut", "empty", "random", "other"])
def test_a_damaged_manifest_is_refused_before_a_job_can_lose_anything(results, how):
    manifest = Path(results.output.dir, "small/data/reader_qa/manifest.json")
    preflight.check_manifests(results)
    spoil(manifest, how)
    with pytest.raises(UserError, match=r"manifest\.json.*run again") as error:
        preflight.check_manifests(results)
    assert "\n" not in str(error.value)


def test_a_cell_of_a_bin_without_examples_is_done(tmp_path):
    """Check that such a cell is not run again, although it has no row that could contain its hash."""
    from kv_transition.studies.grid.tables import CELLS
    from kv_transition.studies.study import Item, Job

    path = tmp_path / "bin0.parquet"
    provenance.write_table(path, provenance.rows_to_table([], CELLS), {})
    item = Item("cells", "answers", (Job(str(path), "hash", 0, 0, 0, 0),), "cell_hash")
    assert [job.path for job in item.state["done"]] == [str(path)]


@pytest.mark.slow
def test_plain_snakemake_says_what_the_command_line_says(tmp_path, disk):
    """Check one sentence, status 2, no traceback, and no change of any file."""
    (tmp_path / "a project").mkdir()
    project = Project(tmp_path / "a project")
    manifest = project.results / "data/reader_qa/manifest.json"
    config = project.folder / "resources/tiny-reader/config.json"

    def both(changes):
        project.configure(SMALL | changes)
        environment = os.environ | {"PYTHONPATH": str(project.folder / "src")}
        command = [sys.executable, "-m", "kv_transition", "all", "-c", "small.yaml"]
        cli = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=300)
        plain = project.snakemake("--quiet", "all")
        assert (cli.returncode, plain.returncode) == (2, 2)
        (sentence,) = cli.stderr.strip().splitlines()
        assert plain.stderr.strip().splitlines()[-1] == sentence
        assert "File " not in plain.stderr
        assert "Traceback" not in plain.stderr
        assert not (project.folder / ".snakemake/locks").exists()
        return sentence

    (project.folder / "file").write_text("")
    assert both({"output": {"dir": "file"}}).startswith("output.dir: file is a file")
    assert both({"kv": {"policies": {"nothing": {}}, "budgets": [0.5]}}).startswith("kv.policies")
    (disk / "ballast").write_bytes(b"x" * 250_000)
    assert "are needed" in both({"output": {"dir": str(disk)}})
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "cannot be written to" in both({"output": {"dir": str(disk)}})

    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    assert "manifest.json" in both({})
    assert manifest.read_text() == "{"
    manifest.unlink()
    config.write_text("{")
    assert "config.json" in both({})
