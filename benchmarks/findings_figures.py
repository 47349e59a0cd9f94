"""The figures of docs/findings.md: one for each study, from the same rows as its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from kv_transition.plotting.save import svg
from kv_transition.plotting.theme import CONFIG, INK, NEUTRAL, PALETTE, SHAPES
from kv_transition.provenance import write_text

Row = dict[str, Any]
WIDTH, HEIGHT = 520, 300


def _saved(
    chart: alt.LayerChart | alt.FacetChart, title: str, subtitle: str, output: Path, size: tuple[int, int] | None = None
) -> None:
    """Write the figure. size: width and height in pixels, None if its panels have their own."""
    chart = chart.properties(title=alt.TitleParams(title, subtitle=subtitle, anchor="start"))
    if size is not None:
        chart = chart.properties(width=size[0], height=size[1])
    write_text(output, svg({**chart.to_dict(), "config": CONFIG}))


def lines(
    rows: Sequence[Row], x: str, y: str, group: str, *, titles: tuple[str, str], head: tuple[str, str], output: Path,
    reference: float | None = None, log: bool = False, panel: str | None = None, panels: Sequence[str] = (),
) -> None:  # fmt: skip
    """Draw ``y`` over ``x`` with its interval, a line for each ``group``; rows have ``low`` and ``high``.

    panel: what each panel of several is for, in the order of ``panels``.
    """
    names = list(dict.fromkeys(row[group] for row in rows))
    colours, shapes = ([of[i % len(of)] for i in range(len(names))] for of in (PALETTE, SHAPES))
    colour = alt.Color(f"{group}:N", title=None, scale=alt.Scale(domain=names, range=colours))
    shape = alt.Shape(f"{group}:N", title=None, scale=alt.Scale(domain=names, range=shapes))
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    whole = alt.Axis(tickMinStep=1) if all(isinstance(row[x], int) for row in rows) else alt.Undefined
    data = alt.Data(values=[dict(row) for row in rows])
    base = alt.Chart(data).encode(
        x=alt.X(f"{x}:Q", title=titles[0], scale=alt.Scale(zero=False, padding=25), axis=whole), color=colour
    )
    layers = [
        base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(
            y=alt.Y("low:Q", title=titles[1], scale=scale), y2="high:Q"
        ),
        base.mark_line(strokeWidth=1.5).encode(y=alt.Y(f"{y}:Q", scale=scale)),
        base.mark_point(size=55, filled=True, opacity=1).encode(y=alt.Y(f"{y}:Q", scale=scale), shape=shape),
    ]
    if reference is not None:
        layers.insert(0, alt.Chart(alt.Data(values=[{"at": reference}])).mark_rule(color=NEUTRAL, strokeDash=[4, 3])
                      .encode(y="at:Q"))  # fmt: skip
    if panel is None:
        _saved(alt.layer(*layers), *head, output, (WIDTH, HEIGHT))
        return
    each = alt.layer(*layers, data=data).properties(width=WIDTH // 2, height=HEIGHT // 2 + 30)
    _saved(each.facet(alt.Facet(f"{panel}:N", title=None, sort=list(panels)), columns=2), *head, output)


def dots(
    rows: Sequence[Row], label: str, value: str, *, title: str, head: tuple[str, str], output: Path,
    group: str | None = None, groups: Sequence[str] = (), reference: float | None = None, log: bool = False,
) -> None:  # fmt: skip
    """Draw ``value`` with its interval, a row for each ``label`` in the order given; ``group`` colours them, in the
    order of ``groups`` (or of the rows).
    """
    order = list(dict.fromkeys(row[label] for row in rows))
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    encoding: dict[str, Any] = {"y": alt.Y(f"{label}:N", title=None, sort=order)}
    if group:
        groups = list(groups) or list(dict.fromkeys(row[group] for row in rows))
        encoding["color"] = alt.Color(f"{group}:N", title=None, scale=alt.Scale(domain=groups, range=list(PALETTE)))
        encoding["yOffset"] = alt.YOffset(f"{group}:N", sort=groups)
    else:
        encoding["color"] = alt.value(PALETTE[0])
    base = alt.Chart(alt.Data(values=[dict(row) for row in rows])).encode(**encoding)
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q"),
        base.mark_point(size=55, filled=True, opacity=1).encode(x=alt.X(f"{value}:Q", scale=scale)),
    ]
    if reference is not None:
        layers.insert(0, alt.Chart(alt.Data(values=[{"at": reference}])).mark_rule(color=INK, strokeDash=[4, 3])
                      .encode(x="at:Q"))  # fmt: skip
    per_row = 24 if group is None else 12 + 11 * len(groups)
    _saved(alt.layer(*layers), *head, output, (WIDTH, per_row * len(order) + 10))
