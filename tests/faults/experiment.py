"""Very small experiments in a separate checkout: run them and compare their tables with those of undisturbed runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from project import SMALL, Project

from kv_transition import preflight

TINY = SMALL | {
    "dataset": SMALL["dataset"] | {"lengths": [128], "n_per_length": 2},
    "binning": {"n_bins": 1, "n_per_bin": 2},
    "kv": {"modes": ["before_question"], "policies": {"full": {}, "h2o": {}}, "budgets": [0.5]},
    "prefill": {"store": "always"},
}
MARK = "KVT_FAULTS"
"""environment variable of all processes of a run, in any working directory: the folder of the campaign"""
MEASURED = ("load_s", "prefill_s", "compress_s", "ttft_s", "decode_s", "latency_s", "peak_mem_mb")
"""measured columns, which differ between any two runs"""
TIMED = ("latency", "ttft", "tokens_per_s", "speedup", "peak_mem")
"""statistics of the measured columns"""


class Experiment:
    """The experiment ``small`` of TINY in ``folder``.

    step: the subcommand of the command line that is run. truth: the tables after an undisturbed run, by experiment
    file.
    """

    def __init__(self, folder: Path, step: str = "all"):
        self.step = step
        folder.mkdir(parents=True, exist_ok=True)
        self.project = Project(folder)
        self.folder = folder
        self.truth: dict[str, dict[str, str]] = {}
        self.configure("results")
        self.learn()

    def learn(self, place: str = "results", name: str = "small.yaml") -> None:
        """Run an experiment file undisturbed and store the digests of its tables."""
        done = self.finish(name)
        if done.returncode:
            raise SystemExit(f"the undisturbed run failed:\n{done.stdout}\n{done.stderr}")
        self.truth[name] = tables(self.results(place))
        self.reset(place)

    def results(self, place: str = "results") -> Path:
        return self.folder / place / "small"

    def configure(self, place: str, name: str = "small.yaml", **sections: object) -> None:
        """Write an experiment file whose results go to ``place``."""
        import yaml

        (self.folder / name).write_text(yaml.safe_dump(TINY | {"output": {"dir": place}} | sections, sort_keys=False))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.folder / "src"), "KVT_WORKER_IDLE_S": "5"}

    def start(self, name: str = "small.yaml") -> subprocess.Popen:
        """Start the command line in its own process session; its output goes to screen.txt."""
        command = [sys.executable, "-m", "kv_transition", self.step, "-c", name, "--cores", "2"]
        known = self.environment | {MARK: str(self.folder)}
        with (self.folder / f"{name}.screen.txt").open("wb") as screen:
            return subprocess.Popen(
                command, cwd=self.folder, env=known, stdout=screen, stderr=screen, start_new_session=True
            )

    def screen(self, name: str = "small.yaml") -> str:
        return (self.folder / f"{name}.screen.txt").read_text(errors="replace")

    def finish(self, name: str = "small.yaml") -> subprocess.CompletedProcess:
        """Run the command line until it ends."""
        process = self.start(name)
        process.wait(timeout=900)
        return subprocess.CompletedProcess(process.args, process.returncode, self.screen(name), "")

    def reset(self, place: str = "results") -> None:
        """Remove the results and Snakemake's state."""
        shutil.rmtree(self.folder / place, ignore_errors=True)
        shutil.rmtree(self.folder / ".snakemake", ignore_errors=True)

    def identical(self, place: str = "results", name: str = "small.yaml") -> bool:
        """Return whether the tables are those of the undisturbed run of an experiment file."""
        found, truth = tables(self.results(place)), self.truth[name]
        if found == truth:
            return True
        names = [name for name in found.keys() | truth.keys() if found.get(name) != truth.get(name)]
        print(f"different: {', '.join(sorted(names))}", flush=True)
        return False

    def half_written(self, place: str = "results") -> list[str]:
        """Return the files that have their final name and are truncated."""
        root = self.results(place)
        broken = [str(path) for path in preflight.damaged_tables(root)]
        for path in root.rglob("*.json"):
            try:
                json.loads(path.read_text())
            except ValueError:
                broken.append(str(path))
        return broken


def tables(root: Path) -> dict[str, str]:
    """Return the digest of each Parquet table without measured times and memory."""
    return {
        str(path.relative_to(root)): _content(path)
        for path in sorted(root.rglob("*.parquet"))
        if not path.name.startswith(".")
    }


def _content(path: Path) -> str:
    table = pq.read_table(path, partitioning=None).replace_schema_metadata(None)
    table = table.drop_columns([name for name in table.column_names if name in MEASURED])
    if "statistic" in table.column_names:
        timed = pa.array([str(name).startswith(TIMED) for name in table["statistic"].to_pylist()], pa.bool_())
        table = table.filter(pc.invert(timed))
    rows = table.to_pylist()
    for row in rows:
        if row.get("raw"):  # how a request was sent: attempts, seconds
            row["raw"] = {key: value for key, value in json.loads(row["raw"]).items() if key != "http"}
    return sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
