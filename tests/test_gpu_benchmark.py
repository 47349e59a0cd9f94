"""Test benchmarks/gpu.py on a CPU with a tiny model: every part, figures written at once, and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "prefill", "decode", "limit", "kernels", "studies", "serve")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Return the file of a whole rehearsal, and its output."""
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    done = run("--device", "cpu", "--tiny", "--output", path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path, done


def test_every_part_has_figures_or_the_reason_why_not(rehearsed):
    figures = json.loads(rehearsed[0].read_text())["figures"]
    assert set(figures) == set(PARTS)
    measured = ("s", "tokens_per_s", "ms_per_step", "largest_n", "status")
    for part in PARTS:
        for figure in figures[part]:
            assert "skipped" in figure or any(key in figure for key in measured), (part, figure)
    # a CPU can run all of these
    for part in ("prefill", "decode", "kernels", "serve"):
        assert not [figure for figure in figures[part] if "skipped" in figure]
    loops = {figure["loop"] for figure in figures["decode"]}
    assert {"plain", "compiled", "h2o, acts each step", "streaming_llm, acts each step"} == loops


def test_served_answers_are_decoded_alone_and_together(rehearsed):
    served = json.loads(rehearsed[0].read_text())["figures"]["serve"]
    assert {figure["at_once"] for figure in served} == {1, 8}
    for figure in served:
        # prompts are read one between two steps, so the first of short answers may end before the last begins
        assert figure["most_at_once"] == 1 if figure["at_once"] == 1 else 1 < figure["most_at_once"] <= 8
        assert figure["tokens_per_s"] == pytest.approx(4 * figure["answers_per_s"])


def test_skip_done_measures_what_is_missing_and_nothing_else(rehearsed, tmp_path):
    known = json.loads(rehearsed[0].read_text())
    prefill = known["figures"]["prefill"]
    prefill[0]["s"] = 123.0
    prefill[1] = {key: prefill[1][key] for key in ("n", "read")} | {"skipped": "no time left"}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(known))
    done = run("--device", "cpu", "--tiny", "--part", "prefill", "--skip-done", "--output", path)
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(path.read_text())["figures"]
    assert again["prefill"][0]["s"] == 123.0
    assert again["prefill"][1]["s"] != 123.0
    assert "skipped" not in again["prefill"][1]
    assert again["decode"] == known["figures"]["decode"]


def test_the_page_is_written_from_the_file(rehearsed, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- gpu -->\nnot measured\n<!-- /gpu -->\n\nafter\n")
    assert run("--render", rehearsed[0], "--page", page).returncode == 0
    text = page.read_text()
    assert "not measured" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    first = json.loads(rehearsed[0].read_text())["figures"]["prefill"][0]
    assert f"| {first['n']} | {first['read']} |" in text


def test_without_a_card_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = run("--output", tmp_path / "figures.json")
    assert done.returncode == 2
    assert "there is no CUDA device; --device cpu --tiny tries the script out" in done.stderr
    assert not (tmp_path / "figures.json").exists()


def test_it_needs_no_package_that_a_bare_machine_lacks(tmp_path):
    # transformers imports every package that it finds, so the packages are hidden instead of checked afterwards
    code = """
import sys
from importlib.machinery import PathFinder

path, *hidden = sys.argv[1:]
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in hidden else find(name, *more)
)
import gpu, gpu_bench, gpu_parts
sys.argv = ["gpu.py", "--device", "cpu", "--tiny", "--part", "studies", "serve", "--output", path]
gpu.main()
assert not set(hidden) & {name.partition(".")[0] for name in sys.modules}
"""
    lacking = ["pydantic", "polars", "scipy", "statsmodels", "altair", "snakemake", "fastapi", "typer", "jinja2"]
    lacking += ["starlette", "uvicorn", "openai", "tenacity"]
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-c", code, path, *lacking],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())["figures"]
    skipped = {figure["what"] for part in figures.values() for figure in part if "skipped" in figure}
    assert skipped <= {"attention by flash-attn", "load in nf4"}
    assert figures["serve"]
