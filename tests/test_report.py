"""Test the report: valid HTML and Markdown, escaped text, and numbers that agree with the answers."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
import shutil
import string
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from simulated_scores import POLICIES, demo

from kv_transition.errors import UserError
from kv_transition.outputs import build
from kv_transition.outputs.build import build_report
from kv_transition.report.page import inline_svg, script_json
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.analysis.aggregate import write_aggregates
from kv_transition.studies.grid.analysis.transition import write_transition
from kv_transition.studies.grid.plots import write_plots
from kv_transition.studies.grid.report import headline as verdict
from kv_transition.studies.grid.results import Results, read_results

EXTRA = ("pairs", "noninferiority", "smallest_budgets", "budget_transition")
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


def data_of(page: str, name: str) -> str:
    """Return the JSON in one of the page's script elements."""
    start = page.index(">", page.index(f'id="{name}"')) + 1
    return page[start : page.index("</script>", start)]


class Page(HTMLParser):
    """Collect ids, links, text and open tags of a page."""

    VOID = frozenset(("meta", "link", "br", "wbr", "img", "hr", "input"))

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
    folder: Path,
    scores: pa.Table,
    *,
    experiment=None,
    warnings=(),
    figures=("acc_vs_len", "failures", "front", "differences"),
    title=None,
    missing=None,
):
    """Write all files from scores to the report into one folder; return the Markdown and the page."""
    paths = {name: str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "comparisons", "transition")}
    extra = {name: str(folder / f"{name}.parquet") for name in EXTRA}
    pq.write_table(scores, paths["scores"])
    write_aggregates(
        paths["scores"], paths["bin_stats"], paths["comparisons"], STATISTICS, pairs_path=extra["pairs"],
        noninferiority_path=extra["noninferiority"], smallest_budgets_path=extra["smallest_budgets"],
    )  # fmt: skip
    write_transition(paths["scores"], paths["transition"], STATISTICS, extra["budget_transition"])
    plots = folder / "plots"
    plots.mkdir()
    write_plots(*paths.values(), {f"{f}_svg": f"{plots}/{f}.svg" for f in figures})
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
        extra=extra,
        missing=missing,
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
    outside_scripts = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", outside_scripts)
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\((?!#)", style)
    assert len(page.encode()) < 6_000_000
    for name in ("charts", "embed", "examples-data"):
        assert json.loads(data_of(page, name))


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
    assert "What the words mean" in first
    assert "saves" in first
    assert re.search(r"<b><span [^>]+>\d+\u00a0% \[\d+, \d+\]</span></b>", first)
    assert len(re.findall(r'class="answer"><strong>[^<]+</strong>', first)) == 2


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
    assert len(figures) == 4
    assert all((folder / figure).is_file() and not figure.startswith("/") for figure in figures)


def test_markdown_tables_are_tables(demo_report):
    _, text, _ = demo_report
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        lines = block.splitlines()
        assert set(lines[1]) <= set("|-")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def load(folder: Path) -> Results:
    return read_results(*(str(folder / f"{n}.parquet") for n in ("scores", "bin_stats", "comparisons", "transition")))


def mean_scores(results: Results, policy: str, budget: str, mode: str = "after_prompt") -> dict[int, float]:
    own = results.scores.filter(policy=policy, budget=budget, mode=mode)
    return dict(own.group_by("bin").agg(pl.col("score").mean()).iter_rows())


def test_findings_name_the_policy_that_keeps_most(demo_report):
    folder, text, _ = demo_report
    results = load(folder)
    means = {p: sum(mean_scores(results, p, "r0.2").values()) for p in POLICIES}
    full = sum(mean_scores(results, "full", "r1").values())
    best = max(means, key=means.get)
    section = text[text.index("## Key findings") : text.index("## Curves")]
    sentence = next(s for s in section.partition("after the prompt")[2].splitlines() if "With 20 %" in s)
    assert f"{best} keeps the most" in sentence
    assert f"{100 * means[best] / full:.0f} %" in sentence


def test_one_word_for_an_outcome_wherever_it_stands(demo_report):
    """Check that the report uses the same word for an outcome in each of its sections."""
    folder, text, page = demo_report
    results = load(folder)
    screen = page[page.index('id="verdict"') : page.index('id="findings"')]
    said = [html.unescape(re.sub(r"<[^>]+>", "", part)).split(maxsplit=1)[1].replace("\u00a0", " ")
            for part in re.findall(r'<span class="holds">(.*?)</span></?(?:small|td)', screen)]  # fmt: skip
    words = {word for word in scale.SCALE if any(text.startswith(word) for text in said)}
    assert len(said) == 2 * 5 * 2
    assert all(any(text.startswith(word) for word in scale.SCALE) for text in said)
    assert {"loss shown", "collapsed"} <= words
    table = pl.from_arrow(pq.read_table(folder / "transition.parquet")).filter(detector="definition")
    assert sorted(table["outcome"]) == sorted(next(w for w in scale.SCALE if t.startswith(w)) for t in said)
    found = text[text.index("## Key findings") : text.index("## Curves")]
    where = text[text.index("## Where answers become unreliable") :]
    for word in words:
        assert f"- {word[0].upper()}{word[1:]}: " in found
        assert f"| {word}" in where
    for word in scale.SCALE:
        assert re.search(rf"<dt>.*{word}</dt>", screen)
        assert f"**{word}**: " in text
    for old in ("stable over", "cliff", "transition zone |", "no loss to", "unreliable from", "without collapse"):
        assert old not in text
    assert results.transition.height == 2 * table.height


def test_a_headline_tells_a_loss_from_too_few_examples(demo_report):
    folder, _, _ = demo_report
    results = load(folder)
    definition = pl.col("detector") == "definition"

    def lead(**changes) -> tuple[str, str]:
        table = results.transition.with_columns(**{k: pl.when(definition).then(v) for k, v in changes.items()})
        return verdict.answer(replace(results, transition=table), "reader_qa", "after_prompt")

    few = lead(outcome=pl.lit("undecided"), n_decides=pl.lit(340))
    assert few[0] == "No budget is shown to be enough: there are too few examples to show that nothing is lost."
    assert "because n = 100; about 340 would decide" in few[1]
    assert lead(outcome=pl.lit("loss shown"))[0] == "Every policy and budget shows a loss."
    assert lead(outcome=pl.lit("no loss shown"))[0].startswith("20 % of the cache is enough")


def test_every_shown_interval_has_an_n(demo_report):
    _, text, page = demo_report
    body = page[page.index("<main") : page.index("</main>")]
    sources = re.findall(r'<span data-from="([^"]+)" data-n="(\d+)"', body)
    assert len(sources) > 200
    assert all(int(n) > 0 and source.count("/") >= 5 for source, n in sources)
    # an interval outside these spans is in a sentence, which must give its n
    rest = re.sub(r"<svg.*?</svg>|<span data-from=.*?</span>", "", body, flags=re.DOTALL)
    for paragraph in re.findall(r"<(?:p|li|td)[^>]*>(.*?)</(?:p|li|td)>", rest, flags=re.DOTALL):
        if re.search(r"\d \[", paragraph):
            assert "n\u00a0=" in paragraph, paragraph
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        if re.search(r"\d \[", block):
            assert re.search(r"\| n \||n = \d", block), block.splitlines()[0]


# The definition of each traced number, from one policy's rows and the full cache's on the same examples.
def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _median(values):
    values = sorted(values)
    return _mean(values[(len(values) - 1) // 2 : len(values) // 2 + 1])


def _by_example(rows):
    return {(r["bin"], r["example_id"]): r for r in rows}


def _held(r):
    """Return the bytes held over those of a full cache, averaged over the answer if the entries per step are known."""
    share = r["cache_bytes"] / r["full_bytes"]
    if r.get("full_mean") is None:
        return share
    return share * (r["kept_mean"] / r["kept_final"]) / (r["full_mean"] / r["full_final"])


DEFINITIONS = {
    "score_mean": (1, lambda own, full: _mean(r["score"] for r in own)),
    "failure_rate": (1, lambda own, full: _mean(r["failure"] is not None for r in own)),
    "footprint": (100, lambda own, full: _mean(_held(r) for r in own)),
    "saved": (100, lambda own, full: 1 - _mean(_held(r) for r in own)),
    "cache_bytes": (1 / 2**20, lambda own, full: _mean(r["cache_bytes"] for r in own)),
    "latency_p50": (1, lambda own, full: _median(r["latency_s"] for r in own)),
    "ttft_p50": (1, lambda own, full: _median(r["ttft_s"] for r in own)),
    "score_ratio": (100, lambda own, full: _mean(r["score"] for r in own) / _mean(r["score"] for r in full)),
    "score": (1, lambda own, full: _mean(
        r["score"] - _by_example(full)[r["bin"], r["example_id"]]["score"] for r in own)),
}  # fmt: skip


def check_traced_numbers(page: str, rows: list[dict], seed: int, wanted: int) -> set[str]:
    """Recompute ``wanted`` numbers of the page, at least one of each kind on the page; return the kinds."""
    body = page[page.index("<main") : page.index("</main>")]
    found = re.findall(r'<span data-from="([^"]+)" data-n="(\d+)"[^>]*>([^<]+)</span>', body)
    kinds: dict[str, list] = {}
    for source, n, text in found:
        table, *key, bin, statistic = source.split("/")
        if table in ("bin_stats", "comparisons", "scores") and statistic in DEFINITIONS:
            kinds.setdefault(statistic, []).append((key, bin, int(n), text))
    draw = random.Random(seed)
    chosen = [(kind, draw.choice(entries)) for kind, entries in sorted(kinds.items())]
    every = [(kind, entry) for kind, entries in sorted(kinds.items()) for entry in entries]
    chosen += draw.sample(every, max(0, wanted - len(chosen)))
    for kind, (key, bin, n, text) in chosen:
        task, mode, policy, budget = key
        cells = [r for r in rows if r["task"] == task and r["mode"] == mode]
        cells = [r for r in cells if bin == "all" or r["bin"] == int(bin.removeprefix("bin"))]
        own = [r for r in cells if (r["policy"], r["budget"]) == (policy, budget)]
        full = [r for r in cells if r["policy"] == "full"]
        scale, definition = DEFINITIONS[kind]
        shown = text.replace("\u00a0", " ").replace("−", "-").split(" ")[0].rstrip("×%")
        digits = len(shown.partition(".")[2])
        assert abs(float(shown) - scale * definition(own, full)) <= 0.5 * 10**-digits + 1e-9, (kind, key, bin, text)
        assert n == len({(r["bin"], r["example_id"]) for r in own}), (kind, key, bin)
    return set(kinds)


def test_numbers_can_be_traced_to_the_answers(demo_report):
    folder, _, page = demo_report
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    assert check_traced_numbers(page, rows, seed=0, wanted=40) == set(DEFINITIONS)


def word_f1(text: str, answers: list[str]) -> float:
    """Return LongBench's F1 over words for the best gold answer, implemented a second time."""

    def words(value: str) -> list[str]:
        value = "".join(c for c in value.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", value).split()

    def one(gold: str) -> float:
        a, b = words(text), words(gold)
        common = sum(min(a.count(w), b.count(w)) for w in set(a))
        return 2 * common / (len(a) + len(b)) if common else 0.0

    return max(one(gold) for gold in answers)


@pytest.mark.slow
def test_ten_numbers_of_a_real_report_from_the_cells_alone(finished):
    cells = [
        r for f in finished.results.glob("cells/**/*.parquet") for r in pq.read_table(f, partitioning=None).to_pylist()
    ]
    gold = {}
    for file in finished.results.glob("data/*/bin*.parquet"):
        gold |= {r["example_id"]: r["answers"] for r in pq.read_table(file, partitioning=None).to_pylist()}
    rows = [r | {"score": word_f1(r["text"], gold[r["example_id"]]), "failure": None} for r in cells]
    page = (finished.results / "report.html").read_text()
    body = re.sub(r'<span data-from="[^"]+/failure_rate"', "<span", page)  # failure labels are tested with their rules
    assert len(check_traced_numbers(body, rows, seed=1, wanted=12)) >= 5


def changed(rows: list[dict], policy: str, values: dict, bins=range(5), budget: str = "r0.2") -> list[dict]:
    return [r | values if (r["policy"], r["budget"]) == (policy, budget) and r["bin"] in bins else r for r in rows]


def as_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=demo(n=1).schema)


ODD = {
    "an all-failed bin": (
        lambda rows: changed(rows, "h2o", {"score": 0.0, "failure": "EMPTY_OUTPUT"}, bins=[2]),
        "h2o at 20 % after the prompt, 1.0k tokens (n = 4)",
    ),
    "no score": (
        lambda rows: changed(rows, "tova", {"score": None, "em": None, "f1": None, "contains": None, "failure": "OOM"}),
        "answers have no score",
    ),
    "not a number": (
        lambda rows: changed(rows, "tova", {"score": float("nan")}, bins=[0]),
        "answers have no score",
    ),
    "identical scores": (
        lambda rows: changed(changed(rows, "snapkv", {"score": 1.0}), "full", {"score": 1.0}, budget="r1"),
        "scores exactly like the full cache on all 20 examples",
    ),
    "one bin": (lambda rows: [r for r in rows if r["bin"] == 0], "one length bin only"),
    "bytes unknown": (
        lambda rows: [r | {"cache_bytes": None} for r in rows],
        "bytes of the cache could not be measured",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_peculiar_data_are_said_in_words(tmp_path, name):
    """Check that unusual data are described in words, without nan, None or inf."""
    change, words = ODD[name]
    rows = [r for r in demo(n=4).to_pylist() if r["mode"] == "after_prompt" or name == "an all-failed bin"]
    text, page = make(tmp_path, as_table(change(rows)))
    assert words in text
    assert not Page(page).open
    for shown in (text, page[: page.index("<script")]):
        assert not re.search(r"\b(nan|NaN|None|inf)\b", shown)


def test_one_example_is_reported_as_what_it_is(tmp_path):
    """Check the report of an experiment with one example per bin."""
    text, page = make(tmp_path, demo(n=1))
    assert "cells have n = 1" in text
    assert not Page(page).open


def test_a_partial_report_says_what_is_missing(tmp_path):
    rows = [r for r in demo(n=4).to_pylist() if not (r["policy"] == "tova" and r["bin"] > 1)]
    rows = [r for r in rows if (r["policy"], r["budget"]) != ("random", "r0.2")]
    missing = {"cells/reader_qa/after_prompt/tova/r0.2/bin4.parquet": "not run yet"}
    text, page = make(tmp_path, as_table(rows), missing=missing)
    assert "**Unfinished.** 1 cells are not in this report" in text
    assert "2 of 5 bins only" in text
    assert "not run" in text
    assert "tova/r0.2/bin4.parquet" in page
    assert not Page(page).open


def test_a_section_stands_where_it_was_run(tmp_path, monkeypatch):
    section = build.Section("tiny", "A section of its own", lambda source: source.experiment.get("tiny"))
    monkeypatch.setattr(build, "SECTIONS", (section,))
    templates = {"tiny.html.jinja": "<p>{{ section.words }}</p>", "tiny.md.jinja": "{{ section.words }}"}
    original = build.page.environment

    def with_templates(html):
        from jinja2 import ChoiceLoader, DictLoader

        made = original(html)
        made.loader = ChoiceLoader([DictLoader(templates), made.loader])
        return made

    monkeypatch.setattr(build.page, "environment", with_templates)
    rows = demo(n=2)
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    shown, page = make(tmp_path / "with", rows, experiment=EXPERIMENT | {"tiny": {"words": "Seven swans."}})
    assert "## A section of its own\n\nSeven swans." in shown
    assert '<a href="#tiny">' in page
    assert "A section of its own" not in make(tmp_path / "without", rows)[0]


def test_text_of_answers_cannot_leave_its_script(tmp_path):
    evil = "</script><script>alert(1)</script>"
    rows = [r | {"text": evil, "question": evil} for r in demo(n=2).to_pylist()]
    _, page = make(tmp_path, as_table(rows))
    assert "alert(1)</script>" not in page
    assert json.loads(data_of(page, "examples-data"))["rows"][0]["question"] == evil
    assert json.loads(script_json({"a": "<&>\u2028"})) == {"a": "<&>\u2028"}


# Actions of a reader and the resulting state of the page; this runs in the page after it is drawn.
ASK = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const root = document.getElementById("answers");
  const count = () => root.querySelectorAll("tbody tr").length;
  const set = (name, value) => {
    root.querySelector(`[name=${name}]`).value = value;
    root.querySelector("form").dispatchEvent(new Event("input"));
    return count();
  };
  const found = {
    first: count(), none: set("search", "no such words"), one: set("search", "needle"), all: set("search", ""),
    failed: set("which", "failed"),
    more: (set("which", ""), root.querySelector("[data-more]").click(), count()),
    drawn: document.querySelectorAll(".drawn > .live svg.marks").length,
    wide: document.documentElement.scrollWidth <= window.innerWidth,
    named: [...document.querySelectorAll("select, input, button")].every(
      (e) => e.labels?.length || e.textContent.trim() || e.closest("label")),
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
}, 1500));
</script></body>
"""


def browse(page: Path, width: int) -> tuple[dict, str]:
    """Return the results of `ASK` and the browser's console output, from a headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("browser test: no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               "--virtual-time-budget=8000", f"--window-size={width},900", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(found[1]), console


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser(tmp_path, width):
    rows = [r | {"text": r["answers"][0] if r["score"] == 1 else "unknown"} for r in demo(n=8).to_pylist()]
    rows = [r | {"question": "Where is the needle?"} if r["example_id"] == "reader_qa-0-0" else r for r in rows]
    _, page = make(tmp_path, as_table(rows))
    own = ASK.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert page.count("script-src '") == 1
    page = page.replace("script-src '", f"script-src 'sha256-{allowed}' '")
    (tmp_path / "asked.html").write_text(page.rpartition("</body>")[0] + ASK)
    found, console = browse(tmp_path / "asked.html", width)
    assert console == ""
    assert found["drawn"] == 3
    assert (found["first"], found["none"], found["one"], found["all"], found["more"]) == (20, 0, 1, 20, 40)
    assert 0 < found["failed"] <= 20
    assert found["wide"], "the page itself must not scroll sideways"
    assert found["named"]


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
    assert "makes no statement about speed" in text
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
    with pytest.raises(UserError, match=r"broken\.json: malformed JSON"):
        build_report(**arguments, manifests=[str(broken)])
    with pytest.raises(UserError, match="there is no resolved experiment"):
        build_report(**arguments | {"config": str(tmp_path / "none.yaml")}, manifests=[])
    assert not list(tmp_path.glob("r.*"))


def test_drawings_keep_their_ids_apart():
    svg = '<svg xmlns="x" width="10" height="5" viewBox="0 0 10 5"><clipPath id="c"/><g clip-path="url(#c)"/></svg>'
    found = inline_svg(svg, "one", "A & B")
    assert 'id="one-c"' in found
    assert "url(#one-c)" in found
    assert 'aria-label="A &amp; B"' in found
    assert 'width="10"' not in found
