"""The cost of the analysis of the demo: everything from the scores to the report, with one core.

    python benchmarks/tail.py [--checkout FOLDER] [--folder FOLDER] [--repeats 3] [--output FILE.json]

The workflow runs the demo up to its last answer (not measured). Then it runs to the end in a copy of that folder; CPU
seconds are those of all processes, including the worker; medians. The cache folder of the user is empty each time.
``again`` is the same command once more, when nothing is left to do: Snakemake's own time.

--checkout: another checkout of this project, whose older versions have the same rules. --folder: a folder to run in;
what is finished there is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from workload import ROOT, Cost, run

MODEL_RULES = ("cell", "observe")
"""rules of the demo that run the model; the analysis follows them"""


def snakemake(checkout: Path, folder: Path, *options: str, **environment: str) -> Cost:
    command = [sys.executable, "-m", "snakemake", "--snakefile", checkout / "Snakefile", "--cores", "1", "--quiet"]
    command += ["all", "--configfile", checkout / "config" / "config.yaml", *options]
    return run(command, folder, PYTHONPATH=str(checkout / "src"), **environment)


def answered(checkout: Path, folder: Path) -> Path:
    """Run the demo up to its last answer in the folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "resources").exists():  # the demo's model is named relative to the checkout
        (folder / "resources").symlink_to(checkout / "resources")
    snakemake(checkout, folder, "--until", *MODEL_RULES)
    return folder


def tail(checkout: Path, folder: Path) -> tuple[Cost, Cost]:
    """Return the cost of the analysis in a copy of a folder, and of a run with nothing to do."""
    with tempfile.TemporaryDirectory() as name:
        copy, cache = Path(name) / "run", Path(name) / "cache"
        # stored prefills are large, and the analysis does not read them
        shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors"))
        costs = [snakemake(checkout, copy, XDG_CACHE_HOME=str(cache)) for _ in range(2)]
    return costs[0], costs[1]


def measure(checkout: Path, folder: Path, repeats: int) -> dict[str, Any]:
    found = [tail(checkout, answered(checkout, folder)) for _ in range(repeats)]
    figures: dict[str, Any] = {"n": repeats}
    for name, costs in zip(("tail", "again"), zip(*found, strict=True), strict=True):
        figures[name] = {
            key: {"median": round(median(values), 2), "all": [round(value, 2) for value in values]}
            for key in ("cpu_s", "wall_s")
            for values in [[getattr(cost, key) for cost in costs]]
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--folder", type=Path, help="a folder to run in (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.folder or Path(name) / "demo").resolve()
        figures = measure(arguments.checkout.resolve(), folder, arguments.repeats)
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
