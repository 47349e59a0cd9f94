"""Test the command line: its calls of Snakemake, its error sentences, and the effect of a lost session."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from project import ROOT, SMALL, Project
from typer.testing import CliRunner

from kv_transition import cli
from kv_transition.studies import registry

PERPLEXITY = {"corpus": "synthetic", "books": 2, "windows_per_book": 2, "context_tokens": [64, 128], "stride": 32}
CHAT = {"source": "generated", "n": 3, "max_turns": 2, "max_tokens": 8}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an experiment file: SMALL with other sections; a section that is None is
    omitted."""

    def written(**sections) -> str:
        config = copy.deepcopy(SMALL) | {"output": {"dir": str(tmp_path / "results")}} | sections
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return str(path)

    return written


@pytest.fixture
def asked(monkeypatch):
    """Return the list of commands that the command line would run, instead of running them."""
    commands: list[list[str]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.subprocess, "call", lambda command, **_: commands.append(command) or 0)
    return commands


def invoke(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == status, done.output
    return done.output.strip()


def until(command: list[str]) -> list[str]:
    rest = command[command.index("--until") + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def rules() -> set[str]:
    text = "\n".join(file.read_text() for file in (ROOT / "workflow/rules").glob("*.smk"))
    return set(re.findall(r"^ *(?:rule|checkpoint) (\w+):", text, flags=re.MULTILINE))


def test_every_rule_that_a_step_names_exists():
    named = {rule for found in cli._UNTIL.values() for rule in found}
    named |= {rule for study in registry.studies() for found in study.rules.values() for rule in found}
    assert named <= rules()


@pytest.mark.parametrize(
    ("step", "sections", "rules"),
    [
        ("prepare", {}, ["prepare"]),
        ("run", {}, ["cell"]),
        ("run", {"observe": {"enabled": True}, "perplexity": PERPLEXITY}, ["cell", "observe", "perplexity"]),
        ("run", {"dataset": None, "perplexity": PERPLEXITY}, ["perplexity"]),
        ("run", {"adaptive": {"enabled": True, "start": 1, "step": 1, "cap": 3}}, ["score"]),
        ("prepare", {"dataset": None, "chat": CHAT}, ["conversations"]),
        ("export", {}, ["exports"]),
        ("report", {}, ["report", "exports"]),
    ],
)
def test_a_step_ends_at_the_rules_of_the_sections_that_are_there(step, sections, rules, write, asked):
    invoke(step, "-c", write(**sections))
    assert until(asked[0]) == rules


@pytest.mark.parametrize(
    ("step", "sections", "sentence"),
    [
        ("observe", {}, "observe: the experiment observes nothing; add observe: {enabled: true}"),
        ("perplexity", {}, "perplexity: the experiment scores no text; add the section perplexity"),
        ("chat", {}, "chat: the experiment has no conversations; add the section chat"),
        ("score", {"dataset": None, "perplexity": PERPLEXITY}, "score: the experiment has no dataset"),
    ],
)
def test_an_experiment_without_the_section_is_refused_with_one_sentence(step, sections, sentence, write, asked):
    output = invoke(step, "-c", write(**sections), status=2)
    assert output.startswith(sentence)
    assert len(output.splitlines()) == 1
    assert not asked


def test_analysis_stops_before_the_report(write, asked):
    invoke("analyze", "-c", write())
    assert asked[0][asked[0].index("--omit-from") + 1 :][:2] == ["report", "exports"]


def test_a_profile_says_how_many_jobs_unless_cores_are_given(write, asked):
    config = write()
    invoke("all", "-c", config)
    invoke("all", "-c", config, "--profile", "profiles/default")
    invoke("all", "-c", config, "--profile", "profiles/default", "--cores", "3")
    assert [command[command.index("--cores") + 1] if "--cores" in command else None for command in asked] == [
        "all",
        None,
        "3",
    ]


@pytest.fixture
def bare_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sdm", "conda"], "--sdm conda: conda is not installed"),
        (["--software-deployment-method", "apptainer"], "--sdm: 'apptainer' is not allowed"),
        (["--profile", "profiles/nowhere"], "--profile: there is no profiles/nowhere/config.yaml"),
    ],
)
def test_what_this_machine_lacks_is_one_sentence(options, sentence, write, asked, bare_path):
    output = invoke("all", "-c", write(), *options, status=2)
    assert output.startswith(sentence)
    assert len(output.splitlines()) == 1
    assert not asked


def test_slurm_without_a_cluster_is_one_sentence(write, asked, bare_path):
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("snakemake's plugin for Slurm is not installed")
    output = invoke("run", "-c", write(), "--profile", "profiles/slurm", status=2)
    assert output.startswith("--profile profiles/slurm: there is no Slurm here (sbatch)")
    assert len(output.splitlines()) == 1


def test_a_plugin_that_is_not_installed_is_one_sentence(write, asked, tmp_path):
    (tmp_path / "config.yaml").write_text("executor: some-cloud\n")
    output = invoke("run", "-c", write(), "--profile", str(tmp_path), status=2)
    assert "snakemake_executor_plugin_some_cloud is not installed" in output


def test_conda_is_passed_on(write, asked, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(__file__).parent / 'fakeconda/bin'}:{os.environ['PATH']}")
    invoke("all", "-c", write(), "--sdm", "conda")
    assert asked[0][asked[0].index("--software-deployment-method") + 1] == "conda"


GPU_PATH = {"download", "prepare", "prefill", "cell"}


def planned(project: Project) -> Counter[str]:
    """Return the number of jobs that `python -m kv_transition all` would run, by rule."""
    command = [sys.executable, "-m", "kv_transition", "all", "-c", "small.yaml", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(project.folder / "src"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    table = re.findall(r"^\W*([a-z_]+)\W+(\d+)\W*$", output, flags=re.MULTILINE)
    return Counter({rule: int(count) for rule, count in table if rule not in ("total", "default", "all")})


@pytest.mark.slow
def test_a_lost_session_costs_no_gpu_time(finished, tmp_path):
    """Check a restart after a notebook's disk was lost: the results were on another drive, the checkout is new."""
    (tmp_path / "again").mkdir()
    project = Project(tmp_path / "again")
    shutil.copytree(finished.folder / "results", project.folder / "results")
    assert not (project.folder / ".snakemake").exists()
    assert not GPU_PATH & set(planned(project))
    changed = copy.deepcopy(SMALL)
    changed["kv"]["policies"]["snap"]["window"] = 8
    project.configure(changed)
    now = planned(project)
    assert {rule: now[rule] for rule in GPU_PATH & set(now)} == {"cell": 2}
    project.edit("src/kv_transition/policies/h2o.py", "int(k * self.recent_share)", "round(k * self.recent_share)")
    assert planned(project)["cell"] == 6  # also the cells of h2o and h2o_heavy


@pytest.mark.slow
def test_snakemakes_own_report_is_one_page_with_captions(finished, tmp_path):
    page = tmp_path / "report.html"
    done = finished.snakemake("--report", str(page))
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    captions = [file.read_text().strip() for file in (ROOT / "workflow/report").glob("*.rst")]
    assert len(html) > 100_000
    assert 'src="http' not in html
    assert any(caption.split(".")[0].split("`")[0][:40] in html for caption in captions)
    for figure in ("acc_vs_len", "failures"):
        assert f"{figure}.svg" in html
