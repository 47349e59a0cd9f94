"""The report can be read with a keyboard, with little contrast vision, and on a narrow screen."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from simulated_scores import demo
from test_palette import contrast
from test_report import Page, make
from test_report_security import _browser, _opened

from kv_transition.report.section import template_folders
from kv_transition.studies.grid.analysis import scale

STYLE = (template_folders()[0] / "style.css").read_text()
TEXT = 4.5  # contrast of text that WCAG 2 asks for at level AA


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("access")
    make(folder, demo())
    return folder / "report.html"


def colours(scheme: str) -> dict[str, str]:
    """The named colours of a scheme; the dark one changes some of the light one's."""
    light, dark = (dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", part)) for part in STYLE.split("@media", 2)[:2])
    return light if scheme == "light" else light | dark


def mixed(colour: str, share: float, paper: str) -> str:
    """``share`` of a colour on paper, as color-mix in sRGB."""
    pairs = ((int(colour[i : i + 2], 16), int(paper[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_contrast_is_that_of_wcag():
    """Black on white has the largest possible contrast, and #767676 is the palest grey that is enough."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") > TEXT > contrast("#777777", "#ffffff")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme):
    named = colours(scheme)
    tint = re.search(r"color-mix\(in srgb, var\(--accent\) calc\(var\(--share\) \* ([.\d]+)\)", STYLE)
    cell = mixed(named["accent"], float(tint.group(1)), named["paper"])
    states = ("sound", "unsure", "loss", "unstable", "collapsed")
    behind = {"paper": ("ink", "soft", "accent", *states), "wash": ("ink", "soft"), "cell": ("ink", *states)}
    for ground, texts in behind.items():
        for text in texts:
            assert contrast(named[text], (named | {"cell": cell})[ground]) >= TEXT, (scheme, text, ground)


def test_no_outcome_is_told_by_colour_alone(report):
    """Each coloured sign has a word beside it or as its name, and no two words have one sign."""
    page = report.read_text()
    words = "|".join(scale.SCALE)
    kinds = "|".join(word.replace(" ", "-") for word in scale.SCALE)
    coloured = re.findall(rf'<span class="({kinds})"', page)
    beside = re.findall(rf'<span class="(?:{kinds})" aria-hidden="true">(.)</span> ({words})', page)
    named = re.findall(rf'<span class="(?:{kinds})"[^>]* role="img" aria-label="[^"]+: ({words})">(.)<', page)
    assert len(beside) > 20
    assert len(named) > 50
    assert len(coloured) == len(beside) + len(named)
    pairs = {(sign, word) for sign, word in beside} | {(sign, word) for word, sign in named}
    assert len(pairs) == len({sign for sign, _ in pairs}) == len({word for _, word in pairs}) == len(scale.SCALE)


class Boxes(HTMLParser):
    """Elements that may be wider than the page, and the cells of rows with a sentence."""

    def __init__(self, text):
        super().__init__()
        self.boxes, self.sentences, self._row = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "pre" or {"scroll", "drawing"} & set((named.get("class") or "").split()):
            self.boxes.append(named)
        if self._row == "td":
            self.sentences.append(tag)
        self._row = "tr" if (tag, named.get("class")) == ("tr", "reason") else "td" if self._row == "tr" else None


def test_what_may_be_scrolled_is_reached_by_keyboard_and_has_a_name(report):
    found = Boxes(report.read_text())
    assert len(found.boxes) > 10
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in found.boxes)
    names = [box["aria-label"] for box in found.boxes]
    assert len(set(names)) == len(names)


def test_sentences_of_tables_have_a_row_of_their_own(report):
    """Their text is in an element that the style sheet keeps within the width of the screen."""
    found = Boxes(report.read_text())
    assert len(found.sentences) >= 2 * 5 * (2 + 5 + 1)  # by budget, by length, the smallest budget
    assert set(found.sentences) == {"span"}


def test_the_skip_link_leads_to_the_results(report):
    page = report.read_text()
    target = re.search(r'<a class="skip" href="#([^"]+)"', page).group(1)
    assert target in Page(page).ids
    assert page.index('<a class="skip"') < page.index("<h1>") < page.index(f'id="{target}"')


WIDER = """() => [...document.querySelectorAll('body :not(svg *)')].filter(e => {
  const box = e.closest('.scroll, .drawing, pre, .skip, details:not([open])');
  return (!box || box === e) && e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 120))"""
CUT = """() => [...document.querySelectorAll('.live svg')].flatMap(svg => {
  const [room, all] = [svg.getBoundingClientRect(), [...svg.querySelectorAll('text')]];
  const [left, right] = [room.left - 1, room.right + 1];
  return all.filter(t => t.getBoundingClientRect().left < left || t.getBoundingClientRect().right > right)
    .map(t => t.textContent);
})"""


def _drawn(tab) -> None:
    """Wait until all interactive figures are drawn."""
    charts = tab.locator("[data-chart]").count()
    tab.locator(".drawn").nth(charts - 1).wait_for(state="attached", timeout=120_000)


PLOTS = """() => [...document.querySelectorAll('.live svg .role-frame.root > g > path.background')].map(e =>
  e.getBoundingClientRect().height)"""


# numbers what can be focused and is shown, in the order of the page
STOPS = """() => [...document.querySelectorAll('a[href], button, input, select, summary, [tabindex]')].filter(e =>
  e.tabIndex >= 0 && e.checkVisibility({ contentVisibilityAuto: true, visibilityProperty: true })
).map((e, i) => { e.dataset.stop = i; }).length"""
FOCUSED = """() => {
  const e = document.activeElement;
  const name = e.ariaLabel || (e.labels && e.labels[0] ? e.labels[0].textContent : e.textContent);
  return [Number(e.dataset.stop), name.trim(), getComputedStyle(e).outlineStyle];
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_in_a_browser(report, scheme):
    """Where Chromium and playwright are installed: on a desktop, a tablet, a phone, and with a zoom of 400 %."""
    started, program = _browser()
    with started as own:
        browser = own.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width in (1280, 768, 390, 320):
            tab, said = _opened(browser)
            tab.emulate_media(color_scheme=scheme)
            tab.set_viewport_size({"width": width, "height": 900})
            tab.goto(report.as_uri())
            _drawn(tab)
            assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
            assert tab.evaluate(WIDER) == []
            assert width < 390 or tab.evaluate(CUT) == []
            assert all(height >= 150 for height in tab.evaluate(PLOTS)), "title and legend take the plot's height"
            assert said == []
            tab.close()
        browser.close()


@pytest.mark.slow
def test_the_keyboard_reaches_everything_and_saves_a_figure(report):
    """Where Chromium and playwright are installed: Tab visits each element once, in order, and Enter saves."""
    started, program = _browser()
    with started as own:
        browser = own.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab, _ = _opened(browser)
        tab.set_viewport_size({"width": 390, "height": 844})
        tab.goto(report.as_uri())
        _drawn(tab)
        tab.evaluate("document.querySelectorAll('main details').forEach(d => { d.open = !d.closest('.live'); })")
        tab.wait_for_timeout(300)
        stops = tab.evaluate(STOPS)
        visited = []
        for _ in range(stops):
            tab.keyboard.press("Tab")
            visited.append(tab.evaluate(FOCUSED))
        assert [number for number, _, _ in visited] == list(range(stops))
        assert all(name and outline not in ("none", "") for _, name, outline in visited)
        tab.locator(".live summary").first.focus()
        tab.keyboard.press("Enter")
        tab.keyboard.press("Tab")
        tab.locator(".vega-actions a:focus:not([href='#'])").wait_for(state="attached")
        with tab.expect_download() as saved:
            tab.keyboard.press("Enter")
        assert saved.value.suggested_filename.endswith(".svg")
        browser.close()
