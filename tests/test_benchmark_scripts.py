"""Check that each script in benchmarks/ finds what it imports: nothing else runs most of them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_finds_its_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    try:
        runpy.run_path(str(script), run_name="imported")
    finally:
        for name in own & set(sys.modules):
            del sys.modules[name]
