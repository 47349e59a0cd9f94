"""Test the jobs of cheap rules in a worker and alone: same files, same log, same exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RULE = """
import json, sys
from kv_transition.worker import rules
rules.IMPORTS = ("script_jobs",)
rules.carry_out(**json.loads(sys.argv[1]))
"""


@pytest.fixture(params=["auto", "never"])
def rule(request, tmp_path):
    """Return a function that runs a rule's job and returns its exit status, its log and its screen output."""
    # the path of a socket must be short
    with tempfile.TemporaryDirectory(prefix="kvt", dir="/tmp") as meeting:
        own = {"KVT_WORKER": request.param, "XDG_RUNTIME_DIR": meeting, "KVT_WORKER_IDLE_S": "3"}
        own["PYTHONPATH"] = f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"

        def carry_out(function: str, **params: object) -> tuple[int, str, str]:
            log = tmp_path / "rule.log"
            job = {
                "function": f"script_jobs:{function}",
                "inputs": {"tables": ["a", "b"], "needs": ["c"]},
                "outputs": {"output": str(tmp_path / "output.json")},
                "params": {"function": "is no argument", "code": "0", **params},
                "log": str(log),
            }
            done = subprocess.run(
                [sys.executable, "-c", RULE, json.dumps(job)], env=os.environ | own, capture_output=True, text=True
            )
            said = [line for line in log.read_text().splitlines(keepends=True) if not line.startswith("worker ")]
            return done.returncode, "".join(said), done.stderr

        yield carry_out


def test_a_rule_s_files_and_params_are_the_arguments_of_its_function(rule, tmp_path):
    status, log, screen = rule("write", pairs=[["h2o", "r1"]], options={"a": 1})
    assert (status, log, screen) == (0, "said by the function\nsaid by a library\n", "")
    written = json.loads((tmp_path / "output.json").read_text())
    assert written == {"tables": ["a", "b"], "pairs": [["h2o", "r1"]], "options": {"a": 1}}


def test_bad_input_is_one_sentence_in_the_log_and_on_the_screen(rule):
    status, log, screen = rule("refuse")
    assert (status, log) == (2, "scores.parquet: row 3 has no answer\n")
    assert log in screen


def test_a_bug_leaves_its_traceback_in_the_log_and_on_the_screen(rule):
    status, log, screen = rule("break_down")
    assert status == 1
    assert log.startswith("Traceback")
    assert log.endswith("ZeroDivisionError: a bug\n")
    assert log in screen


def test_a_param_that_the_function_does_not_know_is_an_error(rule):
    status, log, _ = rule("refuse", unknown=1)
    assert status == 1
    assert "script_jobs:refuse has no parameter for unknown" in log
