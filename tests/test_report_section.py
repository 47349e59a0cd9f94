"""Test a report section without templates of its own."""

from __future__ import annotations

from kv_transition.report.numbers import Number
from kv_transition.report.page import environment
from kv_transition.report.section import Section

SECTION = Section("mine", "My study", lambda source: None)
CONTENT = {
    "sentences": ["Two < three."],
    "figures": ["curve"],
    "tables": [{
        "heading": "Distances", "columns": ["Layer", "Distance"],
        "rows": [[0, Number("7.8 [0.1, 15.9]", 4, "mine/0", "Student t")]],
    }],
}  # fmt: skip
FIGURE = {"name": "curve", "title": "Curve", "caption": "A curve.", "path": "plots/curve.svg", "svg": "<svg></svg>"}


def rendered(ext: str, content: dict, figures: dict) -> str:
    template = environment(html=ext == "html").get_template(f"section.{ext}.jinja")
    return template.render(s=SECTION, section=content, figures=figures)


def test_it_shows_sentences_figures_and_tables():
    text = rendered("md", CONTENT, {"curve": FIGURE})
    assert "Two < three." in text
    assert "![A curve.](plots/curve.svg)" in text
    assert "| Layer | Distance |\n|---|---|\n| 0 | 7.8 [0.1, 15.9] |" in text


def test_numbers_of_the_page_name_their_row_and_n():
    page = rendered("html", CONTENT, {"curve": FIGURE})
    assert 'data-from="mine/0" data-n="4"' in page
    assert "Two &lt; three." in page
    assert 'id="figure-curve"' in page


def test_each_part_may_be_left_out():
    for ext in ("md", "html"):
        assert "7.8" not in rendered(ext, {}, {})
        assert "curve" not in rendered(ext, {"figures": ["curve"]}, {}), "a figure that was not drawn"
