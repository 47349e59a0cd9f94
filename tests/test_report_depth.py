"""Test score by depth and length: each example is counted at the depth of its needle."""

from __future__ import annotations

import json
from types import SimpleNamespace

import polars as pl

from kv_transition.report import page
from kv_transition.studies.grid.report import depth

ROWS = [  # policy, depth, length, score
    ("snapkv", 0.0, 256, 1.0),
    ("snapkv", 0.19, 256, 0.0),
    ("snapkv", 0.2, 256, 1.0),
    ("snapkv", 0.999, 512, 0.25),
    ("full", 0.5, 512, 1.0),
]


def scores(rows=ROWS) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"task": "niah_single", "mode": "before_question", "policy": policy,
             "budget": "r1" if policy == "full" else "r0.2", "score": score,
             "meta": json.dumps({"depths": [at], "length": length})}
            for policy, at, length, score in rows
        ]
    )  # fmt: skip


def test_each_example_counts_where_its_needle_lies():
    full, snapkv = depth.heat_maps(scores())
    assert (snapkv["lengths"], full["lengths"]) == ([256, 512], [512])
    shown = [[cell and (cell["text"], cell["n"]) for cell in row] for row in snapkv["cells"]]
    empty = [None, None]
    assert shown == [[("0.50", 2), None], [("1.00", 1), None], empty, empty, [None, ("0.25", 1)]]
    assert snapkv["cells"][1][0]["colour"] == "hsl(120 65% 72%)"
    assert full["cells"][2][0]["text"] == "1.00"


def test_without_depths_there_is_no_section():
    plain = scores().with_columns(meta=pl.lit("{}"))
    assert depth.build(SimpleNamespace(results=SimpleNamespace(scores=plain))) is None
    assert depth.build(SimpleNamespace(results=None)) is None


def test_the_tables_of_the_markdown_are_tables():
    section = depth.build(SimpleNamespace(results=SimpleNamespace(scores=scores())))
    text = page.environment(html=False).get_template("depth.md.jinja").render(section=section)
    tables = [block.splitlines() for block in text.split("**")[2::2]]
    for table, columns in zip(tables, (1, 2), strict=True):
        lines = [line for line in table if line]
        assert len(lines) == 2 + depth.ROWS
        assert {line.count("|") for line in lines} == {columns + 2}
        assert "" not in table[2 : 2 + len(lines)]
    html = page.environment(html=True).get_template("depth.html.jinja").render(section=section)
    assert html.count("<table") == html.count("<h4>") == 2
    assert "hsl(60 65% 72%)" in html
