"""Run a short version of the fault campaign of tests/faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from project import ROOT


@pytest.mark.slow
def test_killed_runs_go_on_and_end_with_the_same_tables(tmp_path):
    figures = tmp_path / "figures.json"
    cut = {"--kills": 3, "--served-kills": 2, "--disks": 0, "--requests": 200, "--others": "two_on_one"}
    command = [sys.executable, "-m", "tests.faults", *(str(part) for pair in cut.items() for part in pair)]
    command += ["--folder", str(tmp_path / "run"), "--output", str(figures)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())["kinds"]
    assert found["two_on_one"] == {"tries": 1, "survived": 1, "finished": 1, "identical": 1}
    assert found["requests"]["faults"] == 0
    assert found["kill -9"]["tries"] == found["kill -9"]["survived"] == 3
    assert found["kill -9"]["finished"] >= 1
    for kind in ("kill -9", "kill -9 served"):
        assert found[kind]["half_written"] == 0
        assert found[kind]["left"] == []
    assert found["kill -9 served"]["tries"] == found["kill -9 served"]["survived"] == 2
    assert found["kill -9 served"]["finished"] >= 1
