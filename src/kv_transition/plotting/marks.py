"""Marks that every figure shares: curves with their intervals, the full cache as a reference, forest plots.

Rows have the columns ``estimate``, ``low`` and ``high`` (each may be None) and those that the channels name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import altair as alt

from kv_transition.plotting.panels import Datasets, Row
from kv_transition.plotting.theme import NEUTRAL

LINE, REFERENCE, RULE, BAND = 1.9, 1.6, 1.3, 0.16
POINT = {"filled": True, "opacity": 1, "stroke": "white", "strokeWidth": 0.6}
DASHED = [5, 3]
# Channels, not texts: Altair reads its whole schema to make a channel of a text.
HIGH_X, HIGH_Y = alt.X2("high:Q"), alt.Y2("high:Q")
Channel = TypeVar("Channel", alt.X, alt.Y)


def bounded(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose interval has both bounds."""
    return [row for row in rows if row["low"] is not None and row["high"] is not None]


def unit_scale(top: float = 1.02, clamp: bool = True) -> alt.Scale:
    """Return the scale of shares and scores, from 0 to a little above 1, so that points at 1 are not cut off."""
    return alt.Scale(domain=[0, top], nice=False, clamp=clamp)


def index_scale(values: Sequence[float], margin: float) -> alt.Scale:
    """Return a scale from the first value to the last with ``margin`` on both sides, not from 0."""
    return alt.Scale(domain=[values[0] - margin, values[-1] + margin], nice=False, zero=False)


def _low(channel: Channel) -> Channel:
    """Return the same channel with the column ``low``."""
    lower = channel.copy(deep=False)
    lower["shorthand"] = "low:Q"
    return lower


def curves(
    data: Datasets,
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    scales: tuple[alt.Color, alt.Shape],
    intervals: Literal["rules", "bands", "both"] = "rules",
    tip: Sequence[alt.Tooltip] = (),
    interpolate: str | None = None,
) -> list[alt.Chart]:
    """Return the layers of curves, one for each colour: intervals, lines, points.

    intervals: a vertical rule at each point, a band along the curve, or both.
    """
    color, shape = scales
    ends, whole = data.chart(bounded(rows)), data.chart(rows)
    between: dict[str, Any] = {"x": x, "y": _low(y), "y2": HIGH_Y, "color": color}
    how = {"interpolate": interpolate} if interpolate else {}
    points: dict[str, Any] = {"x": x, "y": y, "color": color, "shape": shape}
    layers = []
    if intervals != "rules":
        layers.append(ends.mark_area(opacity=BAND, **how).encode(**between))
    if intervals != "bands":
        layers.append(ends.mark_rule(strokeWidth=RULE, opacity=0.55).encode(**between))
    return [
        *layers,
        whole.mark_line(strokeWidth=LINE, **how).encode(x=x, y=y, color=color),
        whole.mark_point(size=52, **POINT).encode(**points, **({"tooltip": list(tip)} if tip else {})),
    ]


def points(
    data: Datasets,
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    scales: tuple[alt.Color, alt.Shape],
    tip: Sequence[alt.Tooltip],
) -> list[alt.Chart]:
    """Return the layers of separate points with their vertical intervals."""
    color, shape = scales
    ends = data.chart(bounded(rows)).mark_rule(strokeWidth=RULE, opacity=0.55)
    return [
        ends.encode(x=x, y=_low(y), y2=HIGH_Y, color=color),
        data.chart(rows).mark_point(size=95, **POINT).encode(x=x, y=y, color=color, shape=shape, tooltip=list(tip)),
    ]


def reference(
    data: Datasets,
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    color: alt.Color | None = None,
    tip: Sequence[alt.Tooltip] = (),
    interpolate: str | None = None,
) -> list[alt.Chart]:
    """Return the layers of the full cache: a grey band and a dashed line.

    color: puts the line into the legend; its scale gives the full cache the same grey.
    """
    how = {"interpolate": interpolate} if interpolate else {}
    line = data.chart(rows).mark_line(strokeDash=DASHED, strokeWidth=REFERENCE, color=NEUTRAL, **how)
    channels: dict[str, Any] = {"x": x, "y": y} | ({"color": color} if color else {})
    return [
        data.chart(bounded(rows)).mark_area(color=NEUTRAL, opacity=BAND, **how).encode(x=x, y=_low(y), y2=HIGH_Y),
        line.encode(**channels, **({"tooltip": list(tip)} if tip else {})),
    ]


def level(data: Datasets, rows: Sequence[Row], y: alt.Y) -> alt.Chart:
    """Return the full cache as a dashed line across the panel."""
    return data.chart(rows).mark_rule(color=NEUTRAL, strokeDash=DASHED, strokeWidth=REFERENCE).encode(y=y)


def forest(
    data: Datasets,
    rows: Sequence[Row],
    x: alt.X,
    y: alt.Y,
    scales: tuple[alt.Color, alt.Shape],
    tip: Sequence[alt.Tooltip],
    at: float = 0,
    offset: alt.YOffset | None = None,
) -> list[alt.Chart]:
    """Return the layers of a forest plot: a horizontal interval and a point for each row.

    at: the value that means "no difference", drawn as a dashed vertical line. offset: separates the rows of one line.
    """
    color, shape = scales
    place: dict[str, Any] = {"y": y, "color": color} | ({"yOffset": offset} if offset else {})
    zero = x.copy(deep=False)
    zero["shorthand"] = "at:Q"
    return [
        data.chart([{"at": at}], filtered=False).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(x=zero),
        data.chart(bounded(rows)).mark_rule(strokeWidth=1.6, opacity=0.8).encode(x=_low(x), x2=HIGH_X, **place),
        data.chart(rows).mark_point(size=72, **POINT).encode(x=x, shape=shape, tooltip=list(tip), **place),
    ]
