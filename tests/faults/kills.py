"""kill -9 at random moments: of the whole run, of Snakemake, of the command line, or of whichever process there is."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from faults.experiment import Experiment

VICTIMS = ("everything", "snakemake", "command line", "any process")
WAIT_S = 120.0
"""seconds in which a job may end that was under way, and the worker that has no run any more"""
LATEST_S = 25.0
"""seconds after the lock is there, at the latest, that something is killed"""


def campaign(experiment: Experiment, n: int, rng: random.Random, report: Callable[[dict], None]) -> dict:
    """Kill ``n`` times; a run goes on from what the last one left, and a finished one is compared and forgotten."""
    figures = {"tries": 0, "survived": 0, "finished": 0, "identical": 0, "half_written": 0, "orphans": 0}
    victims: Counter[str] = Counter()
    while figures["tries"] < n:
        process = experiment.start()
        early = rng.random() < 0.25
        if not early:
            _wait_for_lock(experiment.folder, process)
        deadline = time.monotonic() + rng.uniform(0, 6.0 if early else LATEST_S)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            victim = rng.choice(VICTIMS)
            _kill(process.pid, victim, rng)
            victims[victim] += 1
            figures["tries"] += 1
            process.wait()
            figures["orphans"] += clear(experiment.folder)
            figures["half_written"] += len(experiment.half_written())
            figures["survived"] += "LockException" not in experiment.screen()
        elif process.returncode == 0:
            _settle(experiment, figures)
        else:
            print(experiment.screen()[-2000:], flush=True)
            break  # a rerun that does not go on is what this looks for
        report(figures | {"victims": dict(victims)})
    if figures["tries"] >= n and experiment.finish().returncode == 0:
        _settle(experiment, figures)
    report(figures | {"victims": dict(victims)})
    return figures


def _settle(experiment: Experiment, figures: dict) -> None:
    figures["finished"] += 1
    figures["identical"] += experiment.identical()
    experiment.reset()


def _wait_for_lock(folder: Path, process) -> None:
    while process.poll() is None and not any((folder / ".snakemake/locks").glob("*")):
        time.sleep(0.02)


def _kill(pid: int, victim: str, rng: random.Random) -> None:
    family = _family(pid)
    if victim == "everything":
        chosen = family
    elif victim == "command line":
        chosen = [pid]
    elif victim == "snakemake":
        chosen = [p for p in family if b"snakemake" in _command(p) and p != pid][:1] or [pid]
    else:
        chosen = [rng.choice(family)]
    for each in chosen:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdecimal()}
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each and child not in found]
    return found


def _parent(process: Path) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return -1


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def clear(folder: Path) -> int:
    """Wait for what is left of a killed run in its folder; kill what stays, and count it.

    A Snakemake whose command line was killed goes on by right, so it is killed as well and not counted.
    """
    for each in _running(folder):
        if b"snakemake" in _command(each):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        left = _running(folder)
        if not left:
            return 0
        time.sleep(0.2)
    for each in left:
        print(f"left: {_command(each)[:200]!r}", flush=True)
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return len(left)


def _running(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with suppress(OSError):
                if (process / "cwd").resolve() == folder and _parent(process) >= 0:
                    state = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                    found += [int(process.name)] if state != "Z" else []
    return found
