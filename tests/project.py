"""Make a copy of the project with a small experiment, and run it through Snakemake as a user does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PARTS = ["Snakefile", "workflow", "profiles", "scripts", "src", "envs", "config", "resources"]

SMALL = {
    "experiment": "small",
    "dataset": {"name": "synthetic", "tasks": ["reader_qa"], "lengths": [128, 256], "n_per_length": 3},
    "binning": {"n_bins": 2, "n_per_bin": 3},
    "model": {"name": "resources/tiny-reader", "max_length": 1024, "device": "cpu"},
    "kv": {
        "modes": ["before_question"],
        "policies": {"full": {}, "h2o": {}, "h2o_heavy": {}, "snap": {"kind": "snapkv", "window": 16}},
        "budgets": [1.0, 0.5],
    },
    "statistics": {"resamples": 200},
}


class Project:
    """A separate checkout whose sources a test may edit."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part in PARTS:
            source = ROOT / part
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=ignore)
            else:
                shutil.copy2(source, folder / part)
        self.configure(SMALL)

    @property
    def results(self) -> Path:
        return self.folder / "results" / "small"

    def configure(self, config: dict) -> None:
        (self.folder / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def snakemake(self, *arguments: str, configfile: str | None = "small.yaml") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores", "2"]
        if configfile:
            command += ["--configfile", configfile]
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        return subprocess.run(
            [*command, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )

    def run(self, *arguments: str) -> str:
        done = self.snakemake("--quiet", "rules", *arguments)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        return output

    def planned(self, *arguments: str) -> Counter[str]:
        """Return the number of jobs that a run would execute, by rule."""
        done = self.snakemake("--dry-run", "--quiet", "rules", *arguments)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        table = re.findall(r"^([a-z_]+) +(\d+)$", output, flags=re.MULTILINE)
        return Counter({rule: int(count) for rule, count in table if rule not in ("total", "default", "all")})

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text()
        assert old in text, f"{path} no longer holds {old!r}"
        file.write_text(text.replace(old, new, 1))
