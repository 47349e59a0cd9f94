"""Faults of the file system and the clock, and concurrent runs. Each function tries one kind and returns its
figures."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from faults.experiment import Experiment
from faults.kills import clear

Figures = dict[str, int]


def _finish(experiment: Experiment) -> bool:
    return experiment.finish().returncode == 0


def _figures(experiment: Experiment, tries: int, survived: int, place: str = "results") -> Figures:
    found = {"tries": tries, "survived": survived, "finished": 1, "identical": int(experiment.identical(place))}
    experiment.reset(place)
    return found


def read_only(experiment: Experiment) -> Figures:
    """Make the disk of the results read-only: the run ends with one sentence, and a rerun on a writable disk
    finishes."""
    place = experiment.folder / "locked"
    place.mkdir(exist_ok=True)
    experiment.configure("locked", "locked.yaml")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    try:
        _interrupt(experiment, "locked.yaml")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        done = experiment.finish("locked.yaml")
        refused = done.returncode == 2 and "cannot be written to" in done.stdout and "Traceback" not in done.stdout
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        finished = experiment.finish("locked.yaml").returncode == 0
        identical = int(finished and experiment.identical("locked"))
        return {"tries": 1, "survived": int(refused), "finished": 1, "identical": identical}
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def _interrupt(experiment: Experiment, name: str = "small.yaml") -> None:
    """Start a run and kill all its processes after half a minute."""
    process = experiment.start(name)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        clear(experiment.folder)


def clock_goes_back(experiment: Experiment) -> Figures:
    """Interrupt a run and date its files to tomorrow, as after a clock correction: nothing is lost or mixed up."""
    _interrupt(experiment)
    tomorrow = time.time() + 86_400
    for path in experiment.results().rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    return _figures(experiment, 1, int(_finish(experiment)))


def two_on_one(experiment: Experiment) -> Figures:
    """Start two runs on the same results: the second is refused with one sentence, and the first finishes."""
    first = experiment.start()
    while first.poll() is None and not any((experiment.folder / ".snakemake/kvt_runs").glob("*.json")):
        time.sleep(0.05)
    experiment.configure("results", "second.yaml")
    second = experiment.finish("second.yaml")
    refused = second.returncode == 2 and "another run works on these results" in second.stdout
    return _figures(experiment, 1, int(refused and first.wait(timeout=900) == 0))


def two_side_by_side(experiment: Experiment) -> Figures:
    """Start two runs from the same folder with separate results: both finish with the same tables."""
    experiment.configure("beside", "beside.yaml")
    first, second = experiment.start(), experiment.start("beside.yaml")
    ended = [first.wait(timeout=900), second.wait(timeout=900)] == [0, 0]
    identical = experiment.identical() + experiment.identical("beside")
    experiment.reset("beside")
    experiment.reset()
    return {"tries": 1, "survived": int(ended), "finished": 2, "identical": identical}


_PATCH = """
import os, pathlib, random, shutil, subprocess, sys
_replace = pathlib.Path.replace
def replace(self, target):
    if {root!r} not in str(pathlib.Path(target).absolute()):
        return _replace(self, target)
{body}
pathlib.Path.replace = replace
"""


@contextmanager
def _patched(experiment: Experiment, body: str) -> Iterator[None]:
    """Patch how every Python process of the run replaces files, for files in the results only."""
    code = _PATCH.format(root=str(experiment.results()), body=textwrap.indent(textwrap.dedent(body), "    "))
    # next to the package, because this folder is on the path of each job
    patch = experiment.folder / "src/sitecustomize.py"
    patch.write_text(code)
    try:
        yield
    finally:
        patch.unlink()


def rename_not_atomic(experiment: Experiment) -> Figures:
    """Run on a file system that copies instead of renaming, where a process dies in the middle of one copy in six.

    tries: the number of processes that died.
    """
    log = experiment.folder / "deaths.txt"
    log.write_text("")
    body = f"""
        content = self.read_bytes()
        with open(target, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            if random.random() < 0.17:
                with open({str(log)!r}, "a") as deaths:
                    deaths.write(str(target) + "\\n")
                os._exit(137)
            file.write(content[len(content) // 2 :])
        self.unlink()
        return pathlib.Path(target)
    """
    with _patched(experiment, body):
        for _ in range(6):
            _finish(experiment)
            if log.read_text():
                break
            experiment.reset()
    tries = len(log.read_text().splitlines())
    return _figures(experiment, tries, tries * int(_finish(experiment)))


def seen_a_second_late(experiment: Experiment) -> Figures:
    """Run on a network file system on which a new file becomes visible one second after it was written."""
    body = """
        shutil.copy2(self, str(self) + ".late")
        self.unlink()
        subprocess.Popen(["sh", "-c", 'sleep 1; mv "$0" "$1"', str(self) + ".late", str(target)],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        return pathlib.Path(target)
    """
    with _patched(experiment, body):
        survived = _finish(experiment)
    return _figures(experiment, 1, int(survived))


KINDS: dict[str, Callable[[Experiment], Figures]] = {
    kind.__name__: kind
    for kind in (two_on_one, two_side_by_side, clock_goes_back, read_only, rename_not_atomic, seen_a_second_late)
}
