"""Start a Slurm cluster of one node on this machine for a test, and read its record of jobs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = Path("/etc/slurm/slurm.conf")
OURS = "# kv-transition"
PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
PACKAGES = ("slurm-wlm", "munge")


def start() -> str | None:
    """Install the missing packages and start the cluster; return None, or the reason why this is impossible."""
    for plugin in ("slurm", "cluster_generic"):
        if importlib.util.find_spec(f"snakemake_executor_plugin_{plugin}") is None:
            return f"snakemake's plugin {plugin} is not installed: pip install '.[cluster]'"
    if os.getuid() != 0:
        return "only root can start a Slurm"
    if CONFIG.exists() and OURS not in CONFIG.read_text():
        return f"{CONFIG} is of another cluster"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return f"install {' and '.join(PACKAGES)} first: there is no apt-get here"
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)} failed; try apt-get update: {done.stderr.strip()[-200:]}"
    done = subprocess.run([HERE / "start.sh"], capture_output=True, text=True, timeout=120)
    return f"Slurm did not start: {done.stderr.strip()[-400:]}" if done.returncode else None


def stop() -> None:
    subprocess.run([HERE / "stop.sh"], check=False)


def jobs(rule: str | None = None) -> list[dict[str, str]]:
    """Return the recorded jobs, the newest last: those of one rule (``rule_cell``), or all."""
    text = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, check=True).stdout
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines() if line.startswith("JobId=")]
    return [job for job in found if rule is None or job.get("Comment", "").startswith(rule)]


def queue() -> list[str]:
    """Return the ids of the pending and running jobs."""
    command = ["squeue", "--noheader", "--format", "%i", "--states", "PENDING,RUNNING,CONFIGURING"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def cancel(job: str) -> None:
    subprocess.run(["scancel", job], check=True)


def wait_for(what, seconds: float = 120):
    """Return the first true value of ``what()``. Raise TimeoutError if no value becomes true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.2)
    raise TimeoutError(f"nothing within {seconds} s")
