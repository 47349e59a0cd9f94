"""The report's table of policies at equal bytes, and the columns about pairs whose bytes differ."""

from __future__ import annotations

from typing import Any

from kv_transition import labels
from kv_transition.report.numbers import DASH, number
from kv_transition.studies.grid import equal_bytes
from kv_transition.studies.grid.results import Results, Row


def tables(results: Results) -> list[dict[str, Any]]:
    """Return, per task and mode, the ranking at each budget and the ranking at equal bytes."""
    found = []
    for task, mode in results.groups:
        rows = []
        for row in equal_bytes.rankings(results, task, mode):
            key = f"scores/{task}/{mode}/{row['policy']}/{row['budget']}/all"
            rows.append({
                "budget": labels.budget(row["budget"]), "policy": row["policy"], "unequal": row["unequal"],
                "share": f"{100 * row['share']:.1f} %", "at": f"{100 * row['at']:.1f} %",
                "rank": row.get("rank", DASH), "rank_matched": row.get("rank_matched", DASH),
                "kept": _number(row, "kept", f"{key}/score_ratio"), "n": row["kept_n"],
                "matched": _number(row, "matched", f"{key}/score_ratio_at_equal_bytes"),
            })  # fmt: skip
        if rows:
            found.append({"heading": results.heading(task, mode), "rows": rows})
    return found


def _number(row: Row, name: str, source: str):
    ends = {"estimate": row[name], "ci_low": row[f"{name}_low"], "ci_high": row[f"{name}_high"]}
    return number(ends | {"n": row[f"{name}_n"], "method": "interpolated"}, "", 0, 100, " %", source=source)


def between(of: equal_bytes.Curve, row: Row, confidence: float) -> dict[str, Any]:
    """Return the bytes of a pair of policies at its budget, whether they differ, and the difference at equal bytes."""
    found = equal_bytes.difference(of, row["budget"], row["policy"], row["reference_policy"], confidence)
    if found is None:
        return {"bytes": DASH, "unequal": False, "matched": DASH}
    one, other = found["shares"]
    unequal = equal_bytes.apart(one, other)
    source = f"scores/{row['task']}/{row['mode']}/{row['policy']}/{row['budget']}/all/score_at_equal_bytes"
    matched = number(found, "", signed=True, source=source) if unequal else DASH
    return {"bytes": f"{100 * one:.1f} : {100 * other:.1f} %", "unequal": unequal, "matched": matched}
