from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from simulated_scores import POLICIES, demo

from kv_transition.analysis.aggregate import write_aggregates
from kv_transition.analysis.plots import write_plots
from kv_transition.analysis.transition import write_transition
from kv_transition.errors import UserError
from kv_transition.report import findings
from kv_transition.report.build import build_report, inline_svg

STATISTICS = {"confidence": 0.95, "resamples": 300, "seed": 0}
EXPERIMENT = {
    "experiment": "demo",
    "dataset": {"name": "synthetic", "tasks": ["reader_qa"]},
    "model": {"name": "resources/tiny-reader", "dtype": "float32", "device": "cpu"},
    "kv": {"policies": {"full": {}, "snapkv": {"window": 16}}},
    "decoding": {"temperature": 0.0, "repeats": 1},
    "statistics": STATISTICS,
    "provenance": {"git_commit": "0123456789ab", "package_versions": {"torch": "2.13.0"}},
}


class Page(HTMLParser):
    """Ids, links and open tags of a page."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.open, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make(
    folder: Path, scores: pa.Table, *, experiment=None, warnings=(), figures=("acc_vs_len", "failures"), title=None
):
    """Everything from scores to the report in one folder; returns the Markdown and the page."""
    paths = {name: str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "comparisons", "transition")}
    pq.write_table(scores, paths["scores"])
    write_aggregates(paths["scores"], paths["bin_stats"], paths["comparisons"], STATISTICS)
    write_transition(paths["scores"], paths["transition"], STATISTICS)
    plots = folder / "plots"
    plots.mkdir()
    write_plots(
        paths["scores"], paths["bin_stats"], paths["transition"], {f"{f}_svg": f"{plots}/{f}.svg" for f in figures}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment or EXPERIMENT))
    (folder / "manifest.json").write_text(json.dumps({"task": "reader_qa", "warnings": list(warnings)}))
    build_report(
        **paths,
        manifests=[str(folder / "manifest.json")],
        config=str(folder / "config.yaml"),
        plots_dir=str(plots),
        output_md=str(folder / "report.md"),
        output_html=str(folder / "report.html"),
        title=title,
    )
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def demo_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    text, page = make(folder, demo(), warnings=["Bin 4 has 18 of 20 wanted examples."], title="A <b>title</b> & more")
    return folder, text, page


def test_the_page_is_well_formed_and_needs_nothing_else(demo_report):
    _, _, page = demo_report
    parsed = Page(page)
    assert not parsed.open
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert "@import" not in page
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 600_000


def test_text_from_outside_is_escaped(demo_report):
    _, _, page = demo_report
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in page
    assert "<b>title</b>" not in page


def test_the_first_screen_answers_the_question(demo_report):
    _, _, page = demo_report
    first = page[page.index('id="verdict"') : page.index('id="findings"')]
    for policy in POLICIES:
        assert policy in first
    assert first.count("<td") == 2 * 5 * 2
    assert "holds to" in first
    assert re.search(r"<b>\d+\u00a0% \[\d+, \d+\]</b>", first)


def test_both_reports_say_what_was_run_and_what_is_not_known(demo_report):
    _, text, page = demo_report
    for part in ("0123456789ab", "torch 2.13.0", "Bin 4 has 18 of 20 wanted examples.", "not findings about language"):
        assert part in text
        assert part in page
    assert "never mixed" in text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())
    assert "None" not in text


def test_markdown_refers_to_figures_that_are_there(demo_report):
    folder, text, _ = demo_report
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(figures) == 2
    assert all((folder / figure).is_file() and not figure.startswith("/") for figure in figures)


def test_markdown_tables_are_tables(demo_report):
    _, text, _ = demo_report
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        lines = block.splitlines()
        assert set(lines[1]) <= set("|-")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def load(folder: Path) -> findings.Tables:
    frames = (pl.read_parquet(folder / f"{n}.parquet") for n in ("scores", "bin_stats", "comparisons", "transition"))
    return findings.Tables(*frames, confidence=0.95)


def test_findings_come_from_the_tables(demo_report):
    folder, _, _ = demo_report
    tables = load(folder)
    group = findings.findings(tables)[1]
    assert group["name"] == "after the prompt"
    best = max(
        (tables.compared("reader_qa", "after_prompt", p, "r0.2", None, "score_ratio") for p in POLICIES),
        key=lambda row: row["estimate"],
    )
    sentence = next(s for s in group["sentences"] if s.startswith("With 20 %"))
    assert f"{best['policy']} keeps most" in sentence
    assert f"{100 * best['estimate']:.0f} %" in sentence


def test_a_policy_holds_until_its_first_loss(demo_report):
    folder, _, _ = demo_report
    tables = load(folder)
    for policy in POLICIES:
        held = findings.holds(tables, "reader_qa", "after_prompt", policy, "r0.2")
        means = {}
        for name, budget in ((policy, "r0.2"), ("full", "r1")):
            own = tables.scores.filter(policy=name, budget=budget, mode="after_prompt")
            means[name] = dict(own.group_by("bin").agg(pl.col("score").mean()).iter_rows())
        poor = [b for b in range(5) if means[policy][b] < 0.95 * means["full"][b]]
        if poor:
            assert held.first_loss is not None
            assert held.first_loss["bin"] <= poor[0]
        else:
            assert held.last is not None


def test_another_model_is_not_called_the_tiny_reader_and_an_endpoint_is_not_trusted(tmp_path):
    scores = demo(n=2).to_pylist()
    scores = pa.Table.from_pylist(
        [row | {"base_url": "http://host/v1", "co_running": True} for row in scores], schema=demo(n=1).schema
    )
    experiment = EXPERIMENT | {"model": {"name": "org/model", "revision": "abc"}}
    text, page = make(tmp_path, scores, experiment=experiment, figures=("latency_vs_len",))
    assert "tiny reader" not in text
    assert "org/model @ abc" in page
    assert "was not verified" in text
    assert "exploratory" in text
    assert "nothing is said about speed" in text
    assert "speed" not in page[page.index('id="verdict"') : page.index('id="findings"')].lower()


@pytest.mark.parametrize("keep", ["full", "snapkv"])
def test_experiments_without_a_comparison_have_a_report(tmp_path, keep):
    rows = [row for row in demo(n=1).to_pylist() if row["policy"] == keep]
    text, page = make(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema), figures=("acc_vs_len",))
    assert not Page(page).open
    assert "## Verdict" in text


def test_the_same_tables_give_the_same_report(tmp_path):
    pages = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        pages.append(make(tmp_path / run, demo(n=2)))
    assert pages[0] == pages[1]


def test_unreadable_inputs_are_named(demo_report, tmp_path):
    folder, _, _ = demo_report
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    arguments = {
        **{n: str(folder / f"{n}.parquet") for n in ("scores", "bin_stats", "comparisons", "transition")},
        "config": str(folder / "config.yaml"), "plots_dir": str(folder / "plots"),
        "output_md": str(tmp_path / "r.md"), "output_html": str(tmp_path / "r.html"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"broken\.json: the manifest cannot be read"):
        build_report(**arguments, manifests=[str(broken)])
    with pytest.raises(UserError, match="resolved experiment cannot be read"):
        build_report(**arguments | {"config": str(tmp_path / "none.yaml")}, manifests=[])
    assert not list(tmp_path.glob("r.*"))


def test_drawings_keep_their_ids_apart():
    svg = '<svg xmlns="x" width="10" height="5" viewBox="0 0 10 5"><clipPath id="c"/><g clip-path="url(#c)"/></svg>'
    found = inline_svg(svg, "one", "A & B")
    assert 'id="one-c"' in found
    assert "url(#one-c)" in found
    assert 'aria-label="A &amp; B"' in found
    assert 'width="10"' not in found
