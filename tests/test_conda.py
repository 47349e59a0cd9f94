"""Test `--sdm conda` with a replacement for conda (fakeconda/), because tests cannot reach a channel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import Project

FAKE = Path(__file__).parent / "fakeconda" / "bin"
PREPARED = "results/small/data/reader_qa/manifest.json"
pytestmark = pytest.mark.slow


class CondaProject(Project):
    """A checkout whose jobs run in environments that the replacement creates."""

    def conda(self, *arguments: str) -> str:
        environment = os.environ | {
            "PATH": f"{FAKE}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "src"),
            "FAKECONDA_LOG": str(self.folder / "calls"),
            "FAKECONDA_PYTHON": sys.executable,
        }
        command = [sys.executable, "-m", "snakemake", "--sdm", "conda", "--configfile", "small.yaml", "--cores", "2"]
        done = subprocess.run(
            [*command, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if "create" in line.split()]

    def environments(self) -> list[Path]:
        return [path for path in (self.folder / ".snakemake/conda").iterdir() if path.is_dir()]

    def wanted(self, environment: Path) -> str:
        """Return the text of the file from which an environment was last created."""
        pins = environment.with_name(f"{environment.name}.pin.txt")
        return (pins if pins.exists() else environment.with_name(f"{environment.name}.yaml")).read_text()


@pytest.fixture
def project(tmp_path):
    return CondaProject(tmp_path)


def test_a_rule_runs_in_its_own_environment_with_the_package_of_the_checkout(project):
    package = project.folder / "src/kv_transition/__init__.py"
    package.write_text(package.read_text() + 'print("from this checkout")\n')
    project.conda(PREPARED)
    (environment,) = project.environments()
    assert project.wanted(environment) == (project.folder / "envs/data.yaml").read_text()
    assert (environment / "used").exists()
    assert "from this checkout" in (project.results / "logs/download/reader_qa.log").read_text()
    # created once, and reused after that
    project.conda("--forcerun", "prepare", "--", PREPARED)
    assert len(project.calls()) == 1


def test_every_environment_can_be_made_before_any_job_runs(project):
    project.conda("--conda-create-envs-only")
    made = sorted(project.wanted(environment) for environment in project.environments())
    files = [project.folder / f"envs/{env}.yaml" for env in ("data", "inference", "analysis")]
    assert made == sorted(file.read_text() for file in files)
    assert not project.results.exists()


def test_a_pin_file_is_taken_first(project):
    (project.folder / "envs/data.linux-64.pin.txt").write_text("@EXPLICIT\nhttps://channel/noarch/x-1-0.conda#0\n")
    output = project.conda(PREPARED)
    (call,) = project.calls()
    assert "data.linux-64.pin.txt" in output
    assert call.split()[:2] != ["env", "create"]  # conda create accepts explicit files, conda env create does not


def test_a_pin_file_that_cannot_be_had_falls_back_to_the_yaml_and_says_so(project):
    (project.folder / "envs/data.linux-64.pin.txt").write_text("@EXPLICIT\nno-such-package\n")
    output = project.conda(PREPARED)
    assert "Failed to install conda environment from pin file" in output
    assert len(project.calls()) == 2
    assert project.calls()[1].startswith("env create")
    assert (project.folder / PREPARED).exists()


def test_an_edited_environment_makes_its_files_stale(project):
    project.conda(PREPARED)
    file = project.folder / "envs/data.yaml"
    file.write_text("# explained\n" + file.read_text())
    output = project.conda("--dry-run", "--quiet", "rules", "--", PREPARED)
    assert "prepare" in output
    assert "software environment definition has changed" in output.lower()
