"""Test that the notebook and every example of docs/python.md run; an example has at most ten lines."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import kv_transition as kvt

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/python.md"
LONGEST = 10
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks():
    """Return the Python blocks of the page, in order."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_notebook_runs_in_a_fresh_kernel(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT / "examples"}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [o for o in shown if "vega-lite" in str(o.get("data", {}))]
    assert len(figures) == 2  # the heat map, and the score against the budget
    answered = next(o["text"] for o in shown if "right:" in o.get("text", ""))
    for line in answered.splitlines():
        _, full, _, right = line.split(" | ")
        assert right == f"right: {full}"  # with its full cache, the embedded model answers every question correctly


def test_examples_are_short():
    assert blocks()
    for code in blocks():
        assert len([line for line in code.splitlines() if line.strip()]) <= LONGEST, code


def test_the_page_names_all_that_is_public():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in kvt.__all__ if f"`{name}`" not in text and f"kvt.{name}" not in text] == []


@pytest.mark.slow
def test_an_answer_and_a_grid_with_its_plot_take_ten_lines_each(monkeypatch):
    """Check that each example runs alone, without names from other examples."""
    monkeypatch.chdir(ROOT)
    for heading, names in (("One answer", {"reply"}), ("Policies and budgets", {"table", "chart"})):
        part = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
        code, space = BLOCK.search(part).group(1), {"__name__": "__main__"}
        assert len([line for line in code.splitlines() if line.strip()]) <= LONGEST
        exec(compile(code, str(PAGE), "exec"), space)
        assert names <= space.keys()


@pytest.mark.slow
def test_the_examples_of_the_page_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    space = {"__name__": "__main__"}
    for code in blocks():
        exec(compile(code, str(PAGE), "exec"), space)
    assert str(space["reply"]) == space["right"]
    assert len(space["table"]) == 3 * (1 + 3 * 2)
    assert space["generated"].strip()
