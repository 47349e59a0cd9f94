"""Colours, shapes and fonts of every figure, and the scales that assign a colour and a shape to a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt

from kv_transition.stats.examples import FULL

# Six colours of Okabe and Ito (2008), then two dark ones: distinguishable with each colour-vision deficiency, which
# tests/test_palette.py simulates. Shapes repeat the information.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#331199", "#773311")
# One shape fewer than colours, so that a pair of colour and shape repeats only after 56 policies.
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
NEUTRAL, INK, FAINT, MUTED = "#6B7280", "#1F2937", "#E5E7EB", "#4B5563"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

CONFIG = {
    "font": FONT,
    "background": "#FFFFFF",
    "padding": 14,
    "view": {"stroke": None},
    "mark": {"aria": False},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": FAINT,
        "domainColor": "#9CA3AF",
        "tickColor": "#9CA3AF",
        "titlePadding": 8,
    },
    "title": {"color": INK, "subtitleColor": MUTED, "anchor": "start"},
    "legend": {"labelFontSize": 12, "labelColor": INK, "columnPadding": 16},
}

PAGE_STYLE = (
    f"body{{margin:1rem;font:15px {FONT};color:{INK};background:#fff}}"
    ".chart-wrapper{display:flex;flex-direction:column-reverse}"
    "#chart{display:block;padding:0}"  # the figure is as wide as the page
    ".vega-bindings{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;padding:0 38px 0 14px}"
    ".vega-bindings select{font:inherit;max-width:100%}"
)

# SVG is sharp in print. Log level 1 shows errors only, because a choice may leave a layer without rows.
ACTIONS = {"export": True, "source": False, "compiled": False, "editor": False}
# Expressions are interpreted (ast), because the Content-Security-Policy of a page forbids turning text into code.
EMBED = {"renderer": "svg", "logLevel": 1, "actions": ACTIONS, "ast": True}


def legend(title: str | None = None) -> alt.Legend:
    """Return the legend of every figure: above the panels, with large symbols."""
    return alt.Legend(title=title, orient="top", symbolSize=90, symbolOpacity=1, symbolStrokeWidth=2)


def policy_scales(policies: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Return colour and shape of the column ``policy``; the full cache comes first, grey and without a point.

    policies: names without the full cache, in the order of the legend.
    """
    domain = [FULL["policy"], *policies]
    colors = [NEUTRAL, *(PALETTE[i % len(PALETTE)] for i in range(len(policies)))]
    shapes = ["stroke", *(SHAPES[i % len(SHAPES)] for i in range(len(policies)))]
    return (
        alt.Color("policy:N", scale=alt.Scale(domain=domain, range=colors), legend=legend()),
        alt.Shape("policy:N", scale=alt.Scale(domain=domain, range=shapes), legend=legend()),
    )


def category_scales(
    field: str, names: Sequence[str], title: str, colors: Mapping[str, str] | None = None
) -> tuple[alt.Color, alt.Shape]:
    """Return colour and shape of the column ``field``, whose values are ``names``.

    title: that of the legend. colors: colours that differ from the palette, by name.
    """
    hues = [(colors or {}).get(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    return (
        alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=hues), legend=legend(title)),
        alt.Shape(f"{field}:N", scale=alt.Scale(domain=names, range=shapes), legend=legend(title)),
    )
