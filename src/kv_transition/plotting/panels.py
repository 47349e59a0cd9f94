"""Panels and figures as Vega-Lite specifications with named data.

Panels are composed as plain dictionaries, because Altair copies a chart at every step of a composition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from kv_transition.plotting.theme import CONFIG, MUTED

Spec = dict[str, Any]
Row = dict[str, Any]


class Datasets(dict[str, list[Row]]):
    """The rows of a figure by name.

    filters: parameters of drop-down lists that each chart's rows are filtered by.
    """

    def __init__(self, filters: Sequence[alt.Parameter] = ()):
        super().__init__()
        self.filters = filters

    def chart(self, rows: Sequence[Row], filtered: bool = True) -> alt.Chart:
        """Return a chart without a mark over ``rows``, which become part of the figure's data."""
        name = f"rows{len(self)}"
        self[name] = list(rows)
        chart = alt.Chart(alt.NamedData(name))
        for parameter in self.filters if filtered else ():
            chart = chart.transform_filter(parameter)
        return chart


def inner(chart: alt.TopLevelMixin) -> Spec:
    """Return a chart as a specification that can be part of a figure."""
    return chart.to_dict(validate=False, context={"top_level": False})


def title(text: str, *subtitle: str, offset: int = 8) -> Spec:
    """Return the title of one panel."""
    head: Spec = {"text": text, "fontSize": 13, "offset": offset}
    return head | ({"subtitle": list(subtitle), "subtitleFontSize": 11} if subtitle else {})


def panel(layers: Sequence[alt.Chart], width: int, height: int | Spec, title: Spec) -> Spec:
    """Return layers as one panel of ``width`` x ``height`` pixels."""
    return {"layer": [inner(layer) for layer in layers], "width": width, "height": height, "title": title}


def compose(content: Spec, data: Datasets, title: str, *subtitle: str) -> Spec:
    """Return a whole figure. The subtitle states n and the kind of the intervals."""
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
    """Return panels in rows of at most ``columns``."""
    return [{"hconcat": list(panels[i : i + columns]), "spacing": 28} for i in range(0, len(panels), columns)]


def figure(panels: Sequence[Spec], columns: int, data: Datasets, title: str, *subtitle: str) -> Spec:
    """Return a figure of panels in rows of at most ``columns``."""
    return compose({"vconcat": rows_of(panels, columns), "spacing": 26}, data, title, *subtitle)


def note(text: str, title: str, *subtitle: str) -> Spec:
    """Return a figure without a drawing that states the reason."""
    data = Datasets()
    mark = data.chart([{"text": text}]).mark_text(fontSize=13, color=MUTED).encode(text=alt.Text("text:N"))
    return compose({**inner(mark), "width": 680, "height": 60}, data, title, ". ".join((*subtitle, text)))


def explorer(
    layers: Sequence[alt.Chart],
    height: int,
    data: Datasets,
    title: str,
    *subtitle: str,
    parameters: Sequence[alt.Parameter] = (),
) -> Spec:
    """Return an interactive chart as wide as its page, with the drop-down lists of ``data.filters``.

    height: of the plot, without title and legend, which take more lines on a narrow page. parameters: further
    parameters that the layers use. The legend has as many columns as fit.
    """
    content: Spec = {"layer": [inner(layer) for layer in layers]}
    if chosen := [parameter.param.to_dict() for parameter in (*parameters, *data.filters)]:
        content["layer"][0]["name"] = "first"  # a selection belongs to one of the layers, and acts on all
        content["params"] = [parameter | {"views": ["first"]} for parameter in chosen]
    size = {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
    legend = CONFIG["legend"] | {"labelLimit": 260, "columns": {"expr": _columns(content["layer"])}}
    fitting = {"config": CONFIG | {"legend": legend}}
    return compose(content | size | fitting, data, title, *subtitle)


def _columns(layers: Sequence[Spec]) -> str:
    """Return the Vega expression of the number of legend columns that fit the page, by the longest name of a colour."""
    scales = (layer["encoding"].get("color", {}).get("scale") or {} for layer in layers)
    longest = max((len(str(name)) for scale in scales for name in scale.get("domain", ())), default=0)
    entry = 44 + 7 * longest  # pixels: symbol, padding and the name at the legend's font size
    width = "(isFinite(containerSize()[0]) ? containerSize()[0] : 720)"
    return f"clamp(floor({width} / {entry}), 1, 6)"


def choices(rows: Sequence[Mapping[str, Any]], controls: Mapping[str, str]) -> list[alt.Parameter]:
    """Return a drop-down list for each column of ``controls`` (column: label) that has more than one value.

    These are lists of the browser, so that they work with the keyboard. The page shows them in reverse order.
    """
    found = []
    for name, label in controls.items():
        options = list(dict.fromkeys(row[name] for row in rows))
        if len(options) > 1:
            control = alt.binding_select(options=options, name=f"{label} ")
            found.append(alt.selection_point(fields=[name], bind=control, value=options[0], name=f"choose_{name}"))
    return found


def tooltip(fields: Mapping[str, str]) -> list[alt.Tooltip]:
    """Return the tooltip of a point. ``fields``: label by column."""
    return [alt.Tooltip(f"{field}:N", title=label) for field, label in fields.items()]


def span(counts: Sequence[int]) -> str:
    """Return "20", or "18 to 20" if the counts differ."""
    low, high = (min(counts), max(counts)) if counts else (0, 0)
    return str(low) if low == high else f"{low} to {high}"


def share(confidence: float) -> str:
    """Return "95 % intervals" for a confidence of 0.95."""
    return f"{100 * confidence:g} % intervals"
