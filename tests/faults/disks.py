"""Full disks: results lie on a small file system that grows bit by bit; each run goes on from the last one."""

from __future__ import annotations

import random
import shutil
import subprocess

from faults.experiment import Experiment

STEP = 120_000
"""bytes of room that a run gets at most, beside what is there"""


def fill(experiment: Experiment, n: int, rng: random.Random) -> dict:
    """Run out of room ``n`` times and then finish; a finished run before that is compared and forgotten.

    ``sentence``: how many of them said which file, how much is needed and how much there is, without a traceback.
    """
    place = experiment.folder / "disk"
    place.mkdir(exist_ok=True)
    experiment.configure("disk", "disk.yaml")
    figures = {"tries": 0, "survived": 0, "sentence": 0, "finished": 0, "identical": 0, "half_written": 0}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        while figures["tries"] < n:
            _resize(place, shutil.disk_usage(place).used + rng.randrange(STEP))
            done = experiment.finish("disk.yaml")
            if done.returncode == 0:
                _settle(experiment, figures)
                continue
            figures["tries"] += 1
            said = done.stdout
            full = "the disk is full" in said or "are needed" in said or "No space left" in said
            figures["sentence"] += full and "Traceback" not in said
            if not full or "Traceback" in said:
                print(said[-1500:], flush=True)
            figures["survived"] += full
            figures["half_written"] += len(experiment.half_written("disk"))
        _resize(place, 64_000_000)
        if experiment.finish("disk.yaml").returncode == 0:
            _settle(experiment, figures)
    finally:
        subprocess.run(["umount", "-l", place], check=False)
    return figures


def _resize(place, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={max(size, 65_536)}", place], check=True)


def _settle(experiment: Experiment, figures: dict) -> None:
    figures["finished"] += 1
    figures["identical"] += experiment.identical("disk")
    for path in (experiment.folder / "disk").iterdir():
        shutil.rmtree(path)
    shutil.rmtree(experiment.folder / ".snakemake", ignore_errors=True)
