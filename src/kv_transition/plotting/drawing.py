"""How every figure is put together: palette, one configuration, views as plain specifications, saved offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from kv_transition.errors import UserError
from kv_transition.provenance import atomic_path, write_text
from kv_transition.stats.examples import FULL

# Okabe and Ito (2008), told apart under the common colour-vision deficiencies; shapes repeat what the colours say.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D1F")
# one fewer than the colours, so that the pairs repeat only after 56 policies
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
NEUTRAL, INK, FAINT = "#6B7280", "#1F2937", "#E5E7EB"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


class Datasets(dict[str, list[dict[str, Any]]]):
    """Named rows; ``add`` gives the reference that a chart takes."""

    def add(self, rows: list[dict[str, Any]]) -> alt.NamedData:
        name = f"rows{len(self)}"
        self[name] = rows
        return alt.NamedData(name)


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
    "title": {"color": INK, "subtitleColor": "#4B5563", "anchor": "start"},
    "legend": {"labelFontSize": 12, "labelColor": INK, "columnPadding": 16},
}

PAGE_STYLE = (
    f"body{{margin:1rem;font:15px {FONT};color:{INK};background:#fff}}"
    ".chart-wrapper{display:flex;flex-direction:column-reverse}"
    ".vega-bindings{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;padding:0 14px}.vega-bindings select{font:inherit}"
)

# As SVG, so that it prints sharply; of the log the errors only (1): a choice that leaves a layer empty is no fault.
ACTIONS = {"export": True, "source": False, "compiled": False, "editor": False}
EMBED = {"renderer": "svg", "logLevel": 1, "actions": ACTIONS}

Spec = dict[str, Any]


def inner(chart: alt.TopLevelMixin) -> Spec:
    return chart.to_dict(validate=False, context={"top_level": False})


def view(layers: Sequence[alt.Chart], width: int, height: int | Spec, title: Spec) -> Spec:
    """Layers as one view. Panels are put together as plain specifications: Altair would copy them at every step."""
    return {"layer": [inner(layer) for layer in layers], "width": width, "height": height, "title": title}


def compose(content: Spec, data: Datasets, title: str, *subtitle: str) -> Spec:
    """A whole Vega-Lite figure with its title, what it says about n and intervals, and its data by name."""
    heading = {
        "text": title, "subtitle": list(subtitle), "fontSize": 17, "subtitleFontSize": 12, "offset": 16,
        "subtitlePadding": 6,
    }  # fmt: skip
    text = ". ".join((title, *subtitle)) + "."
    return {
        "$schema": alt.SCHEMA_URL, "config": CONFIG, "title": heading, "description": text, "datasets": dict(data),
        **content,
    }  # fmt: skip


def rows_of(panels: Sequence[Spec], columns: int) -> list[Spec]:
    return [{"hconcat": list(panels[i : i + columns]), "spacing": 28} for i in range(0, len(panels), columns)]


def _legend() -> alt.Legend:
    return alt.Legend(title=None, orient="top", symbolSize=90, symbolOpacity=1, symbolStrokeWidth=2)


def as_wide_as_its_place(content: Spec, height: int) -> Spec:
    """A view that fills the width of a page, a phone's as well: the legend takes lines of three."""
    size = {"width": "container", "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    return content | size | {"config": CONFIG | {"legend": CONFIG["legend"] | {"columns": 3}}}


def color(policies: Sequence[str]) -> alt.Color:
    domain = [FULL["policy"], *policies]
    scale = alt.Scale(domain=domain, range=[NEUTRAL, *(PALETTE[i % len(PALETTE)] for i in range(len(policies)))])
    return alt.Color("policy:N", scale=scale, legend=_legend())


def shape(policies: Sequence[str]) -> alt.Shape:
    domain = [FULL["policy"], *policies]
    scale = alt.Scale(domain=domain, range=["stroke", *(SHAPES[i % len(SHAPES)] for i in range(len(policies)))])
    return alt.Shape("policy:N", scale=scale, legend=_legend())


def note(text: str, title: str, subtitle: str) -> Spec:
    data = Datasets()
    mark = alt.Chart(data.add([{"text": text}])).mark_text(fontSize=13, color="#4B5563").encode(text="text:N")
    return compose({**inner(mark), "width": 680, "height": 60}, data, title, f"{subtitle}. {text}")


def save_html(spec: Spec, path: str | Path) -> None:
    """A page that needs nothing else, scripts included."""
    from altair.utils.html import spec_to_html

    page = spec_to_html(
        spec,
        mode="vega-lite",
        vega_version=alt.VEGA_VERSION,
        vegaembed_version=alt.VEGAEMBED_VERSION,
        vegalite_version=alt.VEGALITE_VERSION,
        template="inline",
        output_div="chart",
        embed_options=EMBED,
    )
    write_text(path, page.replace("<head>", f"<head><style>{PAGE_STYLE}</style>", 1))


def png(drawing: str) -> bytes:
    """An SVG drawing as pixels, twice as fine as it is large."""
    return vl_convert.svg_to_png(drawing, scale=2)


def scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script for a page that must work offline."""
    # a page's parser ends a script at the first closing tag, also inside of a string
    return vl_convert.javascript_bundle(vl_version=".".join(alt.VEGALITE_VERSION.split(".")[:2])).replace(
        "</script", "<\\/script"
    )


def choices(rows: Sequence[Mapping[str, Any]], controls: Mapping[str, str]) -> list[alt.Parameter]:
    """Drop-down lists that filter rows by a column each, where there is a choice; ``controls``: label by column.

    They are the browser's own, so that keys reach them. The page shows them last first.
    """
    found = []
    for name, label in controls.items():
        options = list(dict.fromkeys(row[name] for row in rows))
        if len(options) > 1:
            control = alt.binding_select(options=options, name=f"{label} ")
            found.append(alt.selection_point(fields=[name], bind=control, value=options[0], name=f"choose_{name}"))
    return found


def filtered(rows: alt.NamedData, by: Sequence[alt.Parameter]) -> alt.Chart:
    chart = alt.Chart(rows)
    for parameter in by:
        chart = chart.transform_filter(parameter)
    return chart


def svg(spec: Spec) -> str:
    return vl_convert.vegalite_to_svg(spec, vl_version=".".join(alt.VEGALITE_VERSION.split(".")[:2]))


def save_figures(drawn: Mapping[str, Spec], outputs: Mapping[str, str]) -> None:
    """Write figures by name to paths by ``{name}_svg`` and ``{name}_png``.

    Raises UserError for an output that no figure is called.
    """
    pictures: dict[str, str] = {}
    for name, path in outputs.items():
        figure, _, ext = name.rpartition("_")
        if figure not in drawn or ext not in ("svg", "png"):
            raise UserError(f"plots: no figure is called {name!r}; known are {', '.join(drawn)} (with _svg or _png)")
        if figure not in pictures:  # drawing it takes longer than making pixels of it
            pictures[figure] = svg(drawn[figure])
        if ext == "svg":
            write_text(path, pictures[figure])
        else:
            with atomic_path(path) as temporary:
                temporary.write_bytes(png(pictures[figure]))
