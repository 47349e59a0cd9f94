"""Test that text of an experiment cannot become code of its report, and that the report's figures still work."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from simulated_scores import demo
from test_report import EXPERIMENT, make

from kv_transition.plotting import save
from kv_transition.plotting.pages import script_json, security_policy

HOSTILE = [
    '</script><script>window.hit = 1</script>',
    '"><img src=x onerror="window.hit = 2">',
    "'><svg onload=window.hit=3>",
    "<!--<script>",
    "]]><iframe src=javascript:window.hit=4>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.hit=5",
    "&lt;b&gt;\u2028</style><style>*{display:none}",
    "</title><base href=//evil.example>",
    "datum['x']; window.hit = 6",
]  # fmt: skip


class Elements(HTMLParser):
    """Collect tags with their attributes, and the content of each script element."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.policies, self._script = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("type")
            if self._script is None:
                self.scripts.append("")
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policies.append((dict(attrs)["content"], len(self.scripts)))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self._script is None and self.cdata_elem == "script":
            self.scripts[-1] += data


def hostile_scores():
    """Return the demo's scores with hostile texts and hostile names of policies."""
    table = demo()
    plain = sorted(set(table["policy"].to_pylist()) - {"full"})
    names = {name: name + HOSTILE[i % len(HOSTILE)] for i, name in enumerate(plain)}
    examples = sorted(set(table["example_id"].to_pylist()))
    own = {
        "policy": [names.get(value, value) for value in table["policy"].to_pylist()],
        "example_id": [f"{v} {HOSTILE[examples.index(v) % len(HOSTILE)]}" for v in table["example_id"].to_pylist()],
    }
    for column in ("text", "pred_norm", "gold_norm", "question"):
        own[column] = [HOSTILE[i % len(HOSTILE)] for i in range(table.num_rows)]
    for column, values in own.items():
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(values, pa.string()))
    return table


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the report of harmless scores and the report of hostile scores."""
    made = []
    for name, scores, more in (
        ("plain", demo(), {}),
        ("hostile", hostile_scores(), {
            "title": HOSTILE[0] + HOSTILE[8],
            "warnings": HOSTILE,
            "missing": {HOSTILE[1]: HOSTILE[2]},
            "experiment": EXPERIMENT | {"experiment": HOSTILE[7], "model": {"name": HOSTILE[3], "dtype": HOSTILE[4]}},
        }),
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        make(folder, scores, **more)
        made.append(folder / "report.html")
    return made


def test_hostile_texts_add_no_element_and_no_handler(pages):
    plain, hostile = (Elements(page.read_text()) for page in pages)
    assert len(hostile.scripts) == len(plain.scripts) == 2
    kinds = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in hostile.tags} - kinds <= {"details", "summary", "code", "ul", "li", "wbr"}
    for tag, attributes in hostile.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("href", "src", "xlink:href", "action"):
            assert not (attributes.get(name) or "").strip().lower().startswith(("javascript:", "data:", "http:", "//"))
    assert not {"base", "iframe", "img", "object", "embed", "form"} & ({tag for tag, _ in hostile.tags} - kinds)


def test_the_policy_allows_the_pages_own_scripts_and_nothing_else(pages):
    for path in pages:
        page = Elements(path.read_text())
        ((policy, scripts_before),) = page.policies
        assert scripts_before == 0
        allowed = set(re.findall(r"'sha256-([^']+)'", policy))
        digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts}
        assert allowed == digests
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'"
        assert "unsafe" not in rules["script-src"]
        assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


@pytest.mark.parametrize("text", HOSTILE)
def test_json_stays_in_its_element(text):
    page = Elements(f'<script type="application/json" id="x">{script_json({text: [text]})}</script><p>')
    assert [tag for tag, _ in page.tags] == ["script", "p"]


def test_a_page_of_one_figure_has_the_same_protection(tmp_path):
    spec = {"title": {"text": HOSTILE[0]}, "data": {"values": [{"a": text} for text in HOSTILE]},
            "mark": "point", "encoding": {"x": {"field": "a", "type": "nominal"}}}  # fmt: skip
    save.save_html(spec, tmp_path / "figure.html")
    page = Elements((tmp_path / "figure.html").read_text())
    assert len(page.scripts) == 2
    assert security_policy(page.scripts) in (tmp_path / "figure.html").read_text()


def _browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    return playwright.sync_playwright(), program


def _opened(browser):
    """Return a browser tab, and the list of its console messages, errors and network requests."""
    tab, said = browser.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    return tab, said


@pytest.mark.slow
def test_a_browser_draws_the_figures_and_runs_no_foreign_code(pages):
    """Check the pages in Chromium with playwright, if both are installed."""
    started, program = _browser()
    with started as own:
        browser = own.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for path in pages:
            tab, said = _opened(browser)
            tab.goto(path.as_uri())
            charts = tab.locator("[data-chart]").count()
            assert charts > 0
            tab.wait_for_function(f"document.querySelectorAll('.drawn').length == {charts}", timeout=120_000)
            assert tab.evaluate("window.hit") is None
            assert tab.locator("#answers tbody tr").count() > 0
            assert said == []
            tab.close()
        browser.close()
