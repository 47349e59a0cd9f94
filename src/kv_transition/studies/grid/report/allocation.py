"""The report section on adaptive allocation: the looks, their levels, and their decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kv_transition.labels import percent

if TYPE_CHECKING:
    from kv_transition.report.section import Source


def build(source: Source) -> dict[str, Any] | None:
    """Return the content of the section; None if examples were not allocated adaptively.

    ``source.extra``: ``allocation`` (tables.ALLOCATION of all looks).
    """
    table = source.extra.get("allocation")
    if table is None or not table.height:
        return None
    rows = table.sort("task", "look", "bin").to_dicts()
    last = max(row["look"] for row in rows)
    base = (source.experiment.get("statistics") or {}).get("confidence", 0.95)
    ranges = {(task, b["bin"]): b for task in {row["task"] for row in rows} for b in source.results.bins(task)}
    return {
        "looks": last + 1,
        "base": percent(base),
        "level": percent(next(row["confidence"] for row in rows if row["look"] == last)),
        "decided": all(row["reason"].startswith("decided") for row in rows if row["look"] == last),
        "rows": [_row(row, ranges.get((row["task"], row["bin"]))) for row in rows],
    }


def _row(row: Mapping[str, Any], tokens: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "task": row["task"],
        "look": row["look"] + 1,
        "tokens": f"{tokens['token_min']}–{tokens['token_max']}" if tokens else f"bin {row['bin']}",
        "n": row["n"],
        "wanted": row["wanted"] - row["n"],
        "level": percent(row["confidence"]),
        "reason": row["reason"],
    }
