"""Write figures as SVG, PNG and HTML, without a browser and without the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import altair as alt
import vl_convert
from altair.utils import schemapi
from markupsafe import escape

from kv_transition.errors import UserError
from kv_transition.plotting import bundle
from kv_transition.plotting.pages import script_json, security_policy
from kv_transition.plotting.panels import Spec
from kv_transition.plotting.theme import EMBED, PAGE_STYLE
from kv_transition.provenance import atomic_path, write_text

_VEGA_LITE = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
_DRAW = (
    '"use strict";\n'
    'const [spec, options] = ["spec", "embed"].map((id) => JSON.parse(document.getElementById(id).textContent));\n'
    'vegaEmbed("#chart", fitTitle(spec, document.getElementById("chart").clientWidth), options);\n'
)
"""script that draws the figure of a page"""

_FIT = """
window.fitTitle = (figure, width) => {
  const pen = document.createElement("canvas").getContext("2d");
  const room = width - 2 * figure.config.padding;
  const broken = (text, font) => {
    pen.font = `${font} ${figure.config.font}`;
    return [text].flat().flatMap((line) => line.replaceAll(" %", "\u00a0%").split(" ").reduce((lines, word) => {
      const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
      const fits = !lines.length || pen.measureText(longer).width <= room;
      return fits ? [...lines.slice(0, -1), longer] : [...lines, word];
    }, []));
  };
  const { text, fontSize, subtitle, subtitleFontSize } = figure.title;
  const lines = { text: broken(text, `bold ${fontSize}px`), subtitle: broken(subtitle, `${subtitleFontSize}px`) };
  return { ...figure, title: { ...figure.title, ...lines } };
};
"""
"""script that breaks the title of a figure into lines of at most ``width`` pixels, because Vega cuts off what is wider
than the chart"""

PIXELS = 2  # pixels of a PNG for each pixel of the drawing


def svg(spec: Spec) -> str:
    """Return the figure as an SVG drawing."""
    return vl_convert.vegalite_to_svg(spec, vl_version=_VEGA_LITE)


def png(drawing: str) -> bytes:
    """Return an SVG drawing as PNG."""
    return vl_convert.svg_to_png(drawing, scale=PIXELS)


def scripts() -> str:
    """Return Vega, Vega-Lite, Vega-Embed and ``fitTitle`` as one script for a page that works offline."""
    # an HTML parser ends a script at the first closing tag, even inside a string
    return bundle.javascript(_VEGA_LITE).replace("</script", "<\\/script") + _FIT


def save_html(spec: Spec, path: str | Path) -> None:
    """Write the figure as a page that needs no other file and no network."""
    own = [scripts(), _DRAW]
    data = {"spec": spec, "embed": EMBED}
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        security_policy(own),
        f"<title>{escape(spec['title']['text'])}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>",
        '<div id="chart"></div>',
        *(f'<script type="application/json" id="{name}">{script_json(value)}</script>' for name, value in data.items()),
        *(f"<script>{script}</script>" for script in own),
        "</body>\n</html>\n",
    ]
    write_text(path, "\n".join(parts))


def save_figures(
    figures: Mapping[str, Callable[[], Spec]],
    outputs: Mapping[str, str],
    pages: Mapping[str, Callable[[], Spec]] | None = None,
) -> None:
    """Write each output; a figure is drawn once, and only if an output needs it.

    figures, pages: functions that draw a figure or an interactive page, by name. outputs: path by ``{figure}_svg``,
    ``{figure}_png`` or the name of a page. Raises UserError for another name.
    """
    pages = pages or {}
    drawn: dict[str, str] = {}
    for name, path in outputs.items():
        if name in pages:
            save_html(_without_checks(pages[name]), path)
            continue
        figure, _, ext = name.rpartition("_")
        if figure not in figures or ext not in ("svg", "png"):
            known = ", ".join((f"{', '.join(figures)} (with _svg or _png)", *pages))
            raise UserError(f"plots: no figure is called {name!r}; known are {known}")
        if figure not in drawn:
            drawn[figure] = svg(_without_checks(figures[figure]))
        save_drawing(drawn[figure], path, ext)


def _without_checks(figure: Callable[[], Spec]) -> Spec:
    """Return the figure; Altair does not validate its parts, because that takes long and the tests validate figures."""
    with schemapi.debug_mode(False):
        return figure()


def save_drawing(drawing: str, path: str | Path, ext: str) -> None:
    """Write an SVG drawing unchanged (``ext`` svg) or as pixels (png)."""
    if ext == "png":
        with atomic_path(path) as temporary:
            temporary.write_bytes(png(drawing))
    else:
        write_text(path, drawing)
