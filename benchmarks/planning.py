"""The cost of planning: dry runs of experiments of about 100, 1,000 and 10,000 cells, before and after they are run.

    python benchmarks/planning.py [--sizes 100 1000 10000] [--times 3] [--output FILE.json]
    python benchmarks/planning.py --render FILE.json

A plan is the work of a run before its first job starts (``snakemake --dry-run --quiet``). An ordinary dry run also
formats a description of each job, even if it is not printed. The floor is Snakemake's own cost: a bare workflow with
the same number of cells, without parameters, logs and environments; each job has one input and one output.

No answer is computed. For the plan of a finished experiment its files are created empty, and Snakemake records all of
them as its own with --touch. A figure is the median of several processes: wall-clock time, CPU time and peak memory.
The first plan of a checkout, which compiles and hashes all modules, is not among them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from document import put, table
from run import conditions

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cluster.md"
PARTS = ("Snakefile", "workflow", "profiles", "scripts", "src", "envs", "resources/tiny-reader")
TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking", "common_words")
# tasks, modes, policies beside full, budgets, bins: the shapes of experiments that people run
SHAPES = {
    100: (1, 1, 4, 5, 5),
    1_000: (2, 2, 5, 5, 10),
    10_000: (5, 2, 10, 10, 10),
}


def experiment(size: int, results: str = "results") -> dict[str, Any]:
    tasks, modes, policies, budgets, bins = SHAPES[size]
    return {
        "experiment": "plan",
        "dataset": {"name": "ruler", "tasks": list(TASKS[:tasks]), "lengths": [256, 1024], "n_per_length": 20},
        "binning": {"n_bins": bins},
        "model": {"name": "resources/tiny-reader", "device": "auto"},
        "kv": {
            "modes": ["before_question", "after_prompt"][:modes],
            "policies": {"full": {}} | {f"snap{i}": {"kind": "snapkv", "window": i + 1} for i in range(policies)},
            "budgets": [round(0.9 - 0.08 * i, 2) for i in range(budgets)],
        },
        "output": {"dir": results},
    }


FLOOR = """
FILE = "results/cells/{{task}}/{{mode}}/{{policy}}/{{budget}}/bin{{bin}}.parquet"
BINS = dict(task=range({tasks}), mode=range({modes}), bin=range({bins}))
CELLS = expand(FILE, policy=range({policies}), budget=range({budgets}), **BINS)
CELLS += expand(FILE, policy="full", budget="r1", **BINS)


rule all:
    input:
        CELLS,
        "results/scores.parquet",


rule score:
    input:
        lambda wildcards: CELLS,
    output:
        "results/scores.parquet",
    shell:
        "touch {{output}}"


rule cell:
    input:
        "results/data/{{task}}/bin{{bin}}.parquet",
    output:
        FILE,
    shell:
        "touch {{output}}"


rule bin:
    output:
        "results/data/{{task}}/bin{{bin}}.parquet",
    shell:
        "touch {{output}}"
"""


def checkout(folder: Path) -> None:
    """Copy the project and return the copy, so that Snakemake's records stay out of this one."""
    for part in PARTS:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, target)


_MEASURED = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
wall = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_CHILDREN)
figures = {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}
print(json.dumps({"returncode": done.returncode, "output": done.stdout + done.stderr, "figures": figures}))
"""


SNAKEMAKE = ("-m", "snakemake")


def snakemake(
    folder: Path, *arguments: str, program: Sequence[str] = SNAKEMAKE, cores: int = 2
) -> tuple[dict[str, float], str]:
    """Run it and measure it: a parent of its own a call, for the peak is the largest of all children."""
    config = ["--configfile", "plan.yaml"] if (folder / "plan.yaml").exists() else []
    command = [sys.executable, *program, *config, "--cores", str(cores), *arguments]
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(folder / "src"), "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(measured.stdout)
    if found["returncode"]:
        raise RuntimeError(found["output"][-3000:])
    return {name: round(value, 2) for name, value in found["figures"].items()}, found["output"]


def jobs(output: str) -> int:
    return int(re.findall(r"^total +(\d+)", output, flags=re.MULTILINE)[0])


def make_files(folder: Path, summary: str) -> int:
    """Create every file of the plan, without content, and the folders that are outputs themselves; return how many."""
    made = 0
    for line in summary.splitlines():
        name = line.split("\t")[0]
        if not name.startswith("results/"):
            continue
        made += 1
        path = folder / name
        if path.suffix or "." in path.name:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}" if path.suffix == ".json" else "")  # manifests are read before a run
        else:
            path.mkdir(parents=True, exist_ok=True)
    return made


PLAN = ("--dry-run", "--quiet", "rules", "progress")
LISTED = ("--dry-run", "--quiet", "rules")


# Snakemake waits 0.1 s for each file that it touches: 17 minutes for 10,000 of them.
TOUCH = """
import sys
from snakemake.cli import main
from snakemake.executors import touch

touch.Executor.SLEEPING_TIME = 0
main(sys.argv[1:])
"""


def finish(folder: Path) -> int:
    """Create every file of the plan and Snakemake's record of each; return the number of records.

    All jobs are forced, because a job whose file is there would have no record otherwise. The scheduler's time grows
    with the square of the jobs that it chooses from, so it chooses from a sample.
    """
    _, summary = snakemake(folder, "--summary")
    made, many = make_files(folder, summary), 1_000_000
    limits = ("--resources", f"gpu={many}", f"endpoint={many}")
    scheduler = ("--scheduler", "greedy", "--scheduler-subsample", "500")
    forced = ("--touch", "--forceall", "--quiet", "all")
    snakemake(folder, *forced, *scheduler, *limits, program=("-c", TOUCH), cores=many)
    found = sum(1 for path in (folder / ".snakemake" / "metadata").rglob("*") if path.is_file())
    if found != made:
        raise RuntimeError(f"Snakemake recorded {found} of {made} files")
    return found


def measured(folder: Path, *arguments: str, times: int) -> tuple[dict[str, float], str]:
    """Return the median cost of several runs, and the output of the last one."""
    runs = [snakemake(folder, *arguments) for _ in range(times)]
    costs = [cost for cost, _ in runs]
    return {name: round(median(cost[name] for cost in costs), 2) for name in costs[0]}, runs[-1][1]


def plans(folder: Path, times: int) -> tuple[dict[str, Any], str]:
    """Return the cost of planning before and after the jobs are done, and the job counts that Snakemake printed."""
    snakemake(folder, *PLAN)
    fresh, _ = measured(folder, *PLAN, times=times)
    listed, output = snakemake(folder, *LISTED)
    records = finish(folder)
    finished, after = measured(folder, *LISTED, times=times)
    if "Nothing to be done" not in after:
        raise RuntimeError("a finished experiment has something to do:\n" + after[-3000:])
    return {"fresh": fresh, "listed": listed, "finished": finished, "records": records}, output


def floor(size: int, times: int) -> dict[str, Any]:
    """Return the cost of planning a bare workflow of the same shape."""
    names = ("tasks", "modes", "policies", "budgets", "bins")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Snakefile").write_text(FLOOR.format(**dict(zip(names, SHAPES[size], strict=True))))
        return plans(folder, times)[0]


def measure(size: int, times: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout(folder)
        (folder / "plan.yaml").write_text(yaml.safe_dump(experiment(size)))
        costs, output = plans(folder, times)
        one_job, _ = snakemake(folder, "--dry-run", "--quiet", "all", "--force", one_cell(folder))
        files = [path for path in (folder / "results").rglob("*") if path.is_file()]
    return {
        "size": size,
        "cells": int(re.findall(r"^cell +(\d+)", output, flags=re.MULTILINE)[0]),
        "jobs": jobs(output),
        **costs,
        "floor": floor(size, times),
        "one_job": one_job,
        "files": sum(path.suffix != ".log" for path in files),
        "logs": jobs(output),
    }


def one_cell(folder: Path) -> str:
    return str(next((folder / "results").rglob("cells/**/*.parquet")).relative_to(folder))


def render(figures: dict[str, Any]) -> None:
    rows = [
        [
            f"{r['cells']:,}",
            f"{r['jobs']:,}",
            f"{r['fresh']['cpu_s']:.1f} s",
            f"{r['floor']['fresh']['cpu_s']:.1f} s",
            f"{r['listed']['cpu_s']:.1f} s",
            f"{r['fresh']['peak_mb']:,.0f} MB",
            f"{r['finished']['cpu_s']:.1f} s",
            f"{r['floor']['finished']['cpu_s']:.1f} s",
            f"{r['one_job']['cpu_s']:.1f} s",
            f"{r['files']:,}",
            f"{r['logs']:,}",
            f"{r['records']:,}",
        ]
        for r in figures["plans"]
    ]
    heads = [
        "cells",
        "jobs",
        "plan, nothing there",
        "its floor",
        "dry run",
        "memory",
        "plan, all there",
        "its floor",
        "start of one job",
        "files",
        "logs",
        "records",
    ]
    facts = figures["conditions"]
    line = (
        f"CPU seconds, medians of {figures['times']} processes. Measured on {facts['date']}, {facts['host']}, Python "
        f"{facts['python']}, Snakemake {figures['snakemake']}, commit {facts['git_commit']}."
    )
    put(PAGE, "planning", f"{table(heads, rows)}\n\n{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--times", type=int, default=3, help="processes of which a figure is the median")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--render", type=Path, help="write the table of this file and run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        render(json.loads(arguments.render.read_text(encoding="utf-8")))
        return
    found = []
    for size in arguments.sizes:
        found.append(measure(size, arguments.times))
        print(json.dumps(found[-1]), flush=True)
        if arguments.output:  # each size as it is measured
            figures = {
                "conditions": conditions(),
                "snakemake": version("snakemake"),
                "times": arguments.times,
                "plans": found,
            }
            arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
