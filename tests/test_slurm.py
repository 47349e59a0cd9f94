"""Test the workflow on a real Slurm of one node, which the test starts: `pytest -m slurm`, as root."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from project import SMALL, Project
from slurm import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TINY = copy.deepcopy(SMALL)
TINY["binning"] |= {"n_bins": 1}
TINY["model"] |= {"device": "auto"}  # so that jobs request GPUs; they run without one
TINY["kv"] |= {"policies": {"full": {}, "h2o": {}}, "budgets": [0.5]}
TINY["hardware"] = {"gpu_model": "a100", "mem_gb": 2, "runtime_min": 7}

# there is no accounting database, and tests should not wait for polls
SLURM = (
    *("--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue"),
    *("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "1"),
)
GENERIC = ("--workflow-profile", "profiles/generic", "--seconds-between-status-checks", "1")


@pytest.fixture(scope="module")
def slurm():
    missing = cluster.start()
    if missing:
        pytest.skip(missing)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory, slurm):
    mine = Project(tmp_path_factory.mktemp("slurm"))
    mine.configure(TINY)
    return mine


def submit(project: Project, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--configfile", "small.yaml", *arguments]
    return subprocess.Popen(
        command,
        cwd=project.folder,
        env=os.environ | {"PYTHONPATH": str(project.folder / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a test that runs in the background would have children that ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def running(rule: str) -> list[dict[str, str]]:
    return [job for job in cluster.jobs(rule) if job["JobState"] == "RUNNING"]


@pytest.fixture(scope="module")
def ran(project):
    """Run the grid up to its scores and kill the first running cell; return (killed job, output)."""
    # gpu=1 limits a local run only; on a cluster each submission has its own GPUs
    workflow = submit(project, *SLURM, "--resources", "gpu=1", "--until", "score")
    killed = cluster.wait_for(lambda: running("rule_cell"))[0]
    cluster.cancel(killed["JobId"])
    output, _ = workflow.communicate(timeout=400)
    assert workflow.returncode == 0, output
    return killed, output


def test_the_grid_is_run_to_its_scores(ran, project):
    rows = pq.read_table(project.results / "scores.parquet").to_pylist()
    assert {(row["policy"], row["budget"]) for row in rows} == {("full", "r1"), ("h2o", "r0.5")}
    assert not any(row["error"] for row in rows)
    assert cluster.queue() == []


def test_each_prefill_and_cell_asked_for_one_gpu_of_the_model_named(ran):
    cells = cluster.jobs("rule_cell")
    assert {job["TresPerJob"] for job in cells + cluster.jobs("rule_prefill")} == {"gres:gpu:a100:1"}
    assert all("TresPerJob" not in job for job in cluster.jobs("rule_prepare") + cluster.jobs("rule_score"))


def test_jobs_asked_for_what_the_experiment_says(ran):
    prefill = cluster.jobs("rule_prefill")[0]
    assert (prefill["MinMemoryNode"], prefill["TimeLimit"]) == ("2000M", "00:07:00")
    prepare = cluster.jobs("rule_prepare")[0]
    assert (prepare["MinMemoryNode"], prepare["TimeLimit"]) == ("4000M", "00:30:00")


def test_a_killed_job_is_submitted_again_with_more_memory_and_time(ran):
    killed, _ = ran
    cells = [job for job in cluster.jobs("rule_cell") if job["Comment"] == killed["Comment"]]
    assert [job["JobState"] for job in cells] == ["CANCELLED", "COMPLETED"]
    assert [job["MinMemoryNode"] for job in cells] == ["2000M", "4000M"]
    assert [job["TimeLimit"] for job in cells] == ["00:07:00", "00:14:00"]


def test_cells_run_side_by_side_though_a_local_run_has_one_gpu(ran):
    killed, _ = ran
    other = next(job for job in cluster.jobs("rule_cell") if job["Comment"] != killed["Comment"])
    assert other["SubmitTime"] <= killed["EndTime"]


def test_what_needs_the_network_or_no_time_is_not_submitted(ran):
    assert cluster.jobs("rule_download") == cluster.jobs("rule_grid") == cluster.jobs("rule_experiment") == []


def test_a_bin_can_be_one_submission(ran, project):
    """Check the profile's last lines: documents are read and cells run in one submission, one after the other on one
    GPU."""
    before = {job["JobId"] for job in cluster.jobs()}
    groups = ["--groups", "prefill=bin_{task}_{bin}", "cell=bin_{task}_{bin}", "--resources", "gpu=1"]
    workflow = submit(project, *SLURM, *groups, "--config", "set=experiment=grouped", "--until", "cell")
    output, _ = workflow.communicate(timeout=400)
    assert workflow.returncode == 0, output
    assert len(list((project.folder / "results/grouped/cells").rglob("*.parquet"))) == 2
    # apart from prepare there is one submission, the group
    new = [job for job in cluster.jobs() if job["JobId"] not in before]
    grouped = [job for job in new if not job["Comment"].startswith("rule_prepare")]
    assert [job.get("TresPerJob") for job in grouped] == ["gres:gpu:a100:1"]
    assert grouped[0]["MinMemoryNode"] == "2000M"
    assert grouped[0]["TimeLimit"] == "00:21:00"  # three jobs, one after the other


def test_ctrl_c_leaves_an_empty_queue(project):
    workflow = submit(project, *SLURM, "--config", "set=experiment=cancelled", "--until", "cell")
    cluster.wait_for(cluster.queue)
    workflow.send_signal(signal.SIGINT)
    workflow.communicate(timeout=120)
    assert workflow.returncode != 0
    assert cluster.wait_for(lambda: cluster.queue() == [], 30)
    # the next run continues: no lock is left, and no file is incomplete
    done = project.snakemake("--dry-run", "--config", "set=experiment=cancelled", "--until", "cell")
    assert done.returncode == 0, done.stdout + done.stderr


def test_any_scheduler_by_its_submit_command(project):
    workflow = submit(project, *GENERIC, "--config", "set=experiment=generic", "--until", "prefill")
    killed = cluster.wait_for(lambda: [job for job in cluster.jobs() if "snakejob.prefill" in job["JobName"]])[0]
    cluster.cancel(killed["JobId"])
    output, _ = workflow.communicate(timeout=400)
    assert workflow.returncode == 0, output
    assert (project.folder / "results/generic/prefill/reader_qa/bin0.json").exists()
    prefills = [job for job in cluster.jobs() if "snakejob.prefill" in job["JobName"]]
    assert [job["JobState"] for job in prefills] == ["CANCELLED", "COMPLETED"]
    assert {job["TresPerNode"] for job in prefills} == {"gres:gpu:1"}
    assert [job["MinMemoryNode"] for job in prefills] == ["2000M", "4000M"]
