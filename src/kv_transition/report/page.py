"""Jinja environments and self-contained HTML pages with drawings, charts and data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kv_transition.errors import UserError
from kv_transition.plotting import save, theme
from kv_transition.plotting.pages import script_json, security_policy
from kv_transition.provenance import write_text
from kv_transition.report.section import template_folders


def environment(html: bool) -> Environment:
    """Return the Jinja environment of the report's templates; ``html``: values are escaped."""
    return Environment(
        loader=FileSystemLoader(template_folders()),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_markdown(path: str, template: str, context: Mapping[str, Any]) -> None:
    text = environment(html=False).get_template(template).render(context)
    write_text(path, re.sub(r"\n{3,}", "\n\n", text))


def write_page(path: str, template: str, context: Mapping[str, Any]) -> None:
    """Write a page that needs no other file. ``context["charts"]``: Vega-Lite specifications by name."""
    charts = {name: spec for name, spec in context["charts"].items() if spec is not None}
    jinja = environment(html=True)
    behaviour = jinja.loader.get_source(jinja, "page.js")[0]
    scripts = [save.scripts(), behaviour] if charts else [behaviour]
    own = {"charts": charts, "embed": theme.EMBED, "scripts": [Markup(script) for script in scripts]}
    own |= {"script_json": script_json, "security_policy": security_policy(scripts)}
    body = jinja.get_template(template).render({**context, **own})
    head, marker, data = body.partition("<script")
    # non-breaking spaces keep percent signs, n and p on one line with their numbers
    for pattern, bound in ((r" %", "\u00a0%"), (r"\b([np]) = ", "\\1\u00a0=\u00a0")):
        head = re.sub(pattern, bound, head)
    write_text(path, head + marker + data)


def read_svg(path: Path, name: str, alt: str) -> Markup:
    return inline_svg(path.read_text(encoding="utf-8"), name, alt)


def inline_svg(svg: str, name: str, alt: str) -> Markup:
    """Return a drawing for use inside a page, with unique ids and a name for screen readers."""
    start = svg.find("<svg")
    if start < 0:
        raise UserError(f"plots: {name}.svg is not an SVG drawing; draw the plots again")
    svg = svg[start:]
    for pattern, replacement in (
        (r'\bid="', rf'id="{name}-'),
        (r"url\(#", rf"url(#{name}-"),
        (r'href="#', rf'href="#{name}-'),
    ):
        svg = re.sub(pattern, replacement, svg)
    # The style sheet limits its width to the page and to slightly more than its original width.
    svg = re.sub(r"^<svg([^>]*?) width=\"([\d.]+)\" height=\"[\d.]+\"", r'<svg\1 style="--drawn:\2px"', svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))
