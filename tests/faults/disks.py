"""Full disks: results are written to a small file system, and each run continues from the previous one."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from faults.experiment import Experiment

STEP = 120_000
"""the maximum number of free bytes that a run gets, in addition to the files that exist"""
LATE = ("plots", "tables", "report.md", "report.html", "kv_transition.sqlite", "summary.json", "matched_budget.json")
"""files that are made from the tables: figures, report and exports"""
PLENTY = 64_000_000
FILE, PLACE = "disk.yaml", "disk"


class Disks:
    """Runs that fill their disk.

    The figures are ``sentence``: the number of runs whose message names the file, the bytes needed and the bytes free,
    without a traceback; ``lost``: the number of files that existed before a run and not after it; ``where``: the files
    at which the disk was full.
    """

    def __init__(self, experiment: Experiment, rng: random.Random):
        self.experiment, self.rng = experiment, rng
        self.place: Path = experiment.folder / PLACE
        self.place.mkdir(exist_ok=True)
        experiment.configure(PLACE, FILE)
        keys = ("tries", "survived", "sentence", "finished", "identical", "half_written", "lost")
        self.counts = Counter(dict.fromkeys(keys, 0))
        self.where: Counter[str] = Counter()

    @property
    def figures(self) -> dict:
        return dict(self.counts) | {"where": dict(self.where)}

    def fill(self, n: int, report: Callable[[dict], None], late: bool) -> None:
        """Run out of disk space ``n`` times and then finish the experiment.

        late: if true, the space runs out while figures, report and exports are written, after all other jobs are done;
        if false, from the first file on, with a free space that grows in small steps.
        """
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", self.place], check=True)
        try:
            if late:
                self.experiment.finish(FILE)
            while self.counts["tries"] < n:
                room = self._without_late() if late else STEP
                self._resize(shutil.disk_usage(self.place).used + self.rng.randrange(room))
                self._one()
                report(self.figures)
                if late and self.rng.random() < 0.5:
                    self._finish()
            self._finish()
        finally:
            subprocess.run(["umount", "-l", self.place], check=False)
        report(self.figures)

    def _one(self) -> None:
        before = self._files()
        done = self.experiment.finish(FILE)
        if done.returncode == 0:
            self._settle()
            return
        said, full = done.stdout, _says_full(done.stdout)
        if not full or "Traceback" in said:
            print(said[-1500:], flush=True)
        self.counts["tries"] += 1
        self.counts["survived"] += full
        self.counts["sentence"] += full and "Traceback" not in said
        self.counts["half_written"] += len(self.experiment.half_written(PLACE))
        self.counts["lost"] += len(before - self._files())
        self.where[_where(said)] += 1

    def _finish(self) -> None:
        self._resize(PLENTY)
        if self.experiment.finish(FILE).returncode == 0:
            self._settle()

    def _settle(self) -> None:
        self.counts["finished"] += 1
        self.counts["identical"] += self.experiment.identical(PLACE)

    def _files(self) -> set[str]:
        root = self.experiment.results(PLACE)
        return {str(path) for path in root.rglob("*.parquet") if not path.name.startswith(".")}

    def _without_late(self) -> int:
        """Remove some of the files that are made last; return their size in bytes."""
        before = shutil.disk_usage(self.place).used
        names = self.rng.sample(LATE, self.rng.randrange(1, len(LATE) + 1))
        for name in names:
            path = self.experiment.results(PLACE) / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return max(1, before - shutil.disk_usage(self.place).used)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={max(size, 65_536)}", self.place], check=True)


def _says_full(said: str) -> bool:
    return "the disk is full" in said or "are needed" in said or "No space left" in said


def _where(said: str) -> str:
    found = re.search(r"(\S+): the disk is full", said.replace("\n", " "))
    if found:
        return "".join(c if not c.isdecimal() else "N" for c in Path(found[1]).name)
    return "before the first job" if "are needed" in said else "elsewhere"
