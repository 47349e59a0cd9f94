"""The report section on the position of a needle: score by depth and length, one heat map for each policy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kv_transition import labels

if TYPE_CHECKING:
    import polars as pl

    from kv_transition.report.section import Source

ROWS = 5
"""number of ranges of depth, each a fifth of the document"""


def build(source: Source) -> dict[str, Any] | None:
    """Return the content of the section; None if no example states the depth of its needle."""
    if source.results is None:
        return None
    maps = heat_maps(source.results.scores)
    if not maps:
        return None
    rows = [f"{100 * i // ROWS}–{100 * (i + 1) // ROWS} %" for i in range(ROWS)]
    return {"maps": maps, "rows": rows, "columns": max(len(own["lengths"]) for own in maps)}


def heat_maps(scores: pl.DataFrame) -> list[dict[str, Any]]:
    """Return one map for each task, mode, policy and budget: ``cells`` [ROWS][lengths], each with a score and n, or
    None.

    An example counts at the depth of the needle that is asked for, or of the first of several.
    """
    found: dict[tuple[str, ...], dict[tuple[int, int], list[float]]] = {}
    columns = ["task", "mode", "policy", "budget", "meta", "score"]
    for *key, meta, score in scores.select(columns).drop_nulls("score").iter_rows():
        own = json.loads(meta or "{}")
        depths, length = own.get("depths"), own.get("length")
        if depths and length:
            place = (min(int(depths[0] * ROWS), ROWS - 1), length)
            found.setdefault(tuple(key), {}).setdefault(place, []).append(score)
    maps = []
    for (task, mode, policy, budget), cells in sorted(found.items()):
        lengths = sorted({length for _, length in cells})
        table = [[_cell(cells.get((row, length))) for length in lengths] for row in range(ROWS)]
        title = f"{task}, {labels.mode(mode)}, {policy}" + ("" if policy == "full" else f" at {labels.budget(budget)}")
        maps.append({"title": title, "lengths": lengths, "cells": table})
    return maps


def _cell(scores: list[float] | None) -> dict[str, Any] | None:
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    # red is 0 and green is 1, with equal lightness, so that black text is readable on all of them
    return {"text": f"{mean:.2f}", "n": len(scores), "colour": f"hsl({round(120 * min(max(mean, 0), 1))} 65% 72%)"}
