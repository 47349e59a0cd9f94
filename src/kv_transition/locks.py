"""Locks of the folder of a workflow: distinguish the lock of a killed Snakemake process from one in use.

Snakemake writes lock files into ``.snakemake/locks`` and removes them at the end of a run, but does not record which
process wrote them. Therefore each run writes a file of its own into ``.snakemake/kvt_runs`` before Snakemake locks
anything, and removes it at its end. The file names the process and the results that it works on.
"""

from __future__ import annotations

import atexit
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kv_transition.errors import UserError
from kv_transition.worker import runs

RUNS, LOCKS = ".snakemake/kvt_runs", ".snakemake/locks"


@dataclass(frozen=True)
class Run:
    """A run whose file still exists: its process as in `runs.own`, its results, and that file."""

    process: str
    results: str
    file: Path

    @property
    def host(self) -> str:
        return self.process.partition(":")[0]

    @property
    def pid(self) -> str:
        return self.process.split(":")[1]


def enter(results: str, folder: str = ".") -> None:
    """Record until the end of this process that it works on ``results`` (a path). If the folder is not writable, do
    nothing.
    """
    own = runs.own()
    file = Path(folder, RUNS, own.replace(":", "-") + ".json").absolute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"process": own, "results": str(Path(results).absolute())}), encoding="utf-8")
        temporary.replace(file)
        atexit.register(_leave, file, own)


def _leave(file: Path, own: str) -> None:
    if runs.own() == own:  # a forked child inherits this handler, but is not the run
        file.unlink(missing_ok=True)


def left(folder: str = ".") -> list[Run]:
    """Return the runs of a folder whose files exist: those that are active and those that were killed."""
    found = []
    for file in sorted(Path(folder, RUNS).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            said = json.loads(file.read_text(encoding="utf-8"))
            found.append(Run(said["process"], said["results"], file))
    return found


def clear(results: str, unlock: str, folder: str = ".") -> bool:
    """Remove the locks and files of killed runs, so that a new run can work on ``results``; return whether there was a
    lock.

    unlock: the command that removes the lock by hand.

    Raises UserError if another run works on these results, or if that cannot be determined from this machine.
    """
    here = runs.own().partition(":")[0]
    others = left(folder)
    alive = [run for run in others if runs.is_alive(run.process)]
    same = [run for run in alive if run.results == str(Path(results).absolute())]
    if same:
        raise UserError(f"{results}: another run works on these results (process {same[0].pid}); wait for it or end it")
    locks = Path(folder, LOCKS)
    locked = locks.is_dir() and any(locks.iterdir())
    if locked and not alive:
        away = [run for run in others if run.host != here]
        if away or not others:
            who = f"process {away[0].pid} on {away[0].host}" if away else "an unknown Snakemake process"
            raise UserError(f"{who} has locked {Path(folder).absolute()}; when it has ended, run: {unlock}")
        shutil.rmtree(locks, ignore_errors=True)
    for run in others:
        if run.host == here and run not in alive:
            with suppress(OSError):
                run.file.unlink(missing_ok=True)
    return locked and not alive
