"""Send SIGKILL at random moments: to the whole run, Snakemake, the command line, a client, the server, or any
process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from faults.experiment import MARK, Experiment
from faults.served import FILE, PLACE, Server

VICTIMS = ("everything", "snakemake", "command line", "any process")
SERVED_VICTIMS = ("server", "client", "server and everything")
WAIT_S = 120.0
"""seconds in which a job that was running, and a worker without a run, may end"""
LATEST_S = 25.0
"""the maximum number of seconds between the appearance of the lock and the kill"""
GONE_S = 10.0
"""the maximum number of seconds until a killed server is started again"""


class Campaign:
    """Kills of the runs of one experiment file.

    A run continues from the state of the previous one; the tables of a finished run are compared.

    figures: ``left`` lists the processes of a killed run that existed after `WAIT_S`. server: the server that the
    experiment asks for its answers, None if the experiment runs its own model.
    """

    def __init__(self, experiment: Experiment, rng: random.Random, server: Server | None = None):
        self.experiment, self.rng, self.server = experiment, rng, server
        self.name, self.place = (FILE, PLACE) if server else ("small.yaml", "results")
        self.counts = Counter(dict.fromkeys(("tries", "survived", "finished", "identical", "half_written"), 0))
        self.victims: Counter[str] = Counter()
        self.left: list[str] = []

    @property
    def figures(self) -> dict:
        orphans = {"tries": self.counts["tries"], "orphans": len(self.left)}
        own = {"orphans_of": orphans, "left": self.left, "victims": dict(self.victims)}
        return dict(self.counts) | own | ({"server_starts": self.server.starts} if self.server else {})

    def kill(self, n: int, report: Callable[[dict], None]) -> None:
        """Kill ``n`` times, and then let the last run finish."""
        while self.counts["tries"] < n and self._one():
            report(self.figures)
        if self.counts["tries"] >= n and self.experiment.finish(self.name).returncode == 0:
            self._settle()
        report(self.figures)

    def _one(self) -> bool:
        """Start a run and kill some of its processes unless it ends first; return whether the campaign can continue."""
        rng, process = self.rng, self.experiment.start(self.name)
        early = rng.random() < 0.25
        if not early:
            _wait_for_lock(self.experiment.folder, process)
        deadline = time.monotonic() + rng.uniform(0, 6.0 if early else LATEST_S)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        victim = self.rng.choice(SERVED_VICTIMS if self.server else VICTIMS)
        killed = process.poll() is None and self._kill(process, victim)
        if killed:
            self.victims[victim] += 1
            self.counts["tries"] += 1
            process.wait()
            self.left += clear(self.experiment.folder)
            self.counts["half_written"] += len(self.experiment.half_written(self.place))
            self.counts["survived"] += "LockException" not in self._said() and "Traceback" not in self._said()
        if process.poll() == 0:
            self._settle()
        elif not killed:
            process.wait()
            print(self._said()[-2000:], flush=True)  # the defect that the campaign searches for
            return False
        return True

    def _said(self) -> str:
        return self.experiment.screen(self.name)

    def _settle(self) -> None:
        self.counts["finished"] += 1
        self.counts["identical"] += self.experiment.identical(self.place, self.name)
        self.experiment.reset(self.place)

    def _kill(self, process: subprocess.Popen, victim: str) -> bool:
        """Kill the victim; return False if the run ended before such a process existed."""
        if victim == "client":
            return self._kill_client(process)
        if victim in ("server", "server and everything"):
            self.server.kill()
        if victim != "server":
            for each in _chosen(process.pid, victim, self.rng):
                _end(each)
        if victim in ("server", "server and everything"):
            self.server.again(self.rng.uniform(0, GONE_S))
        return True

    def _kill_client(self, process: subprocess.Popen) -> bool:
        """Kill a job while it waits for an answer of the server."""
        while process.poll() is None:
            jobs = [each for each in _family(process.pid) if b"grid.remote" in _command(each)]
            if jobs:
                time.sleep(self.rng.uniform(0, 3))
                _end(self.rng.choice(jobs))
                return True
            time.sleep(0.02)
        return False


def _chosen(pid: int, victim: str, rng: random.Random) -> list[int]:
    family = _family(pid)
    if victim == "command line":
        return [pid]
    if victim == "snakemake":
        return [p for p in family if b"snakemake" in _command(p) and p != pid][:1] or [pid]
    return [rng.choice(family)] if victim == "any process" else family


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait_for_lock(folder: Path, process: subprocess.Popen) -> None:
    while process.poll() is None and not any((folder / ".snakemake/locks").glob("*")):
        time.sleep(0.02)


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
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


def clear(folder: Path) -> list[str]:
    """Wait until the processes of a killed run end; kill those that remain, and return their command lines.

    A Snakemake process whose command line was killed continues by design, so it is killed as well and not counted.
    """
    for each in _running(folder):
        if b"snakemake" in _command(each):
            _end(each)
    deadline = time.monotonic() + WAIT_S
    while left := _running(folder):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    names = []
    for each in left:
        said = _command(each).replace(b"\0", b" ").decode(errors="replace").strip()
        state = Path(f"/proc/{each}/wchan")
        names.append(f"{said[:300]} (parent {_parent(Path(f'/proc/{each}'))}, in {_read(state) or '?'})")
        print(f"left: {names[-1]}", flush=True)
        _end(each)
    return names


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _running(folder: Path) -> list[int]:
    """Return the live processes whose working directory is the folder or whose environment marks them as part of a
    run."""
    found, mark = [], f"{MARK}={folder}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            mine = (process / "cwd").resolve() == folder or mark in (process / "environ").read_bytes().split(b"\0")
            state = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            found += [int(process.name)] if mine and state != "Z" else []
    return found
