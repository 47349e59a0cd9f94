"""The workflow run that a job belongs to, identified by Snakemake's process, so that workers end with it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

VARIABLE = "KVT_RUN"
"""environment variable with ``host:pid:start`` of the workflow's process; the workflow sets it for its jobs"""


def current() -> str:
    """Return the run that this process belongs to; without a live one on this machine, this process starts one."""
    given = os.environ.get(VARIABLE, "")
    return given if given and is_alive(given) else own()


def own() -> str:
    """Return the identity of this process, as ``host:pid:start``."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_alive(run: str) -> bool:
    """Return whether the process of a run still exists; a run on another machine counts as ended."""
    host, _, process = run.partition(":")
    pid, _, start = process.partition(":")
    if host != socket.gethostname() or not pid.isdecimal():
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
    """Return the start time of a process in clock ticks since boot; ``gone`` if it has ended, empty if it is unknown.

    The start time distinguishes a process from a later one with the same number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else ""
    return "gone" if fields[0] == "Z" else fields[19]
