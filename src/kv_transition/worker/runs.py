"""Which run of the workflow a job belongs to, so that nothing outlives it: the process that Snakemake is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

VARIABLE = "KVT_RUN"
"""``host:pid:start`` of the workflow's process; the workflow sets it for its jobs"""


def current() -> str:
    """Return the run that this process was started by; where there is none on this machine, it begins one."""
    given = os.environ.get(VARIABLE, "")
    return given if given and is_alive(given) else own()


def own() -> str:
    """Return this process, as ``host:pid:start``."""
    return f"{platform.node()}:{os.getpid()}:{_started(os.getpid())}"


def is_alive(run: str) -> bool:
    """Return whether the process of a run is still there; one of another machine counts as gone."""
    host, _, process = run.partition(":")
    pid, _, start = process.partition(":")
    if host != platform.node() or not pid.isdecimal():
        return False
    return _started(int(pid)) == start and _exists(int(pid))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str:
    """Clock ticks from boot to the start of a process, which tell it from a later one of the same number; empty where
    the system does not say, and ``gone`` for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else ""
    return "gone" if fields[0] == "Z" else fields[19]
