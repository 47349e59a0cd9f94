"""The matched-budget card: score and cost of every policy at the same shares of the cache.

The shares are 0.5, 0.25, 0.125 and 0.0625 of the footprint. Shares that were not run are listed as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kv_transition import labels
from kv_transition.report.numbers import MISSING, Number, number, source_of
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid.results import Results, Row

LADDER = (0.5, 0.25, 0.125, 0.0625)
VERSION = 1
_MEASURED = {
    "kv_bytes": "cache_bytes",
    "footprint": "footprint",
    "tokens_per_s": "tokens_per_s",
    "ttft_s": "ttft_p50",
    "peak_mem_mb": "peak_mem_mb",
    "score": "score_mean",
}


def matched_budget(results: Results, experiment: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the card as JSON. Measurements are those of the longest bin; each has estimate, ci_low, ci_high and n.

    ``kv_bytes``: bytes of the KV cache while the answer is generated (the prefill always holds the full cache).
    ``tokens_per_s``: median decode throughput of one sequence at a time. ``ttft_s``: median time to first token.
    ``score_kept``: over all lengths, relative to the full cache. null: not measured.
    """
    hardware = experiment.get("hardware") or {}
    device = metadata.get("device") or (experiment.get("model") or {}).get("device", "unknown")
    rungs = {f"r{share:g}": share for share in LADDER}
    rows = []
    for task, mode in results.groups:
        longest = results.bins(task)[-1]
        for policy, budget in results.pairs:
            if policy != FULL["policy"] and budget not in rungs:
                continue
            cell = {
                name: _plain(results.stat(task, mode, policy, budget, longest["bin"], statistic))
                for name, statistic in _MEASURED.items()
            }
            if cell["score"] is None:
                continue
            kept = results.compared(task, mode, policy, budget, None, "score_ratio")
            rows.append({
                "task": task, "mode": mode, "policy": policy, "budget": rungs.get(budget, 1.0), "bin": longest["bin"],
                "tokens": [longest["token_min"], longest["token_max"]], **cell, "score_kept": _plain(kept),
            })  # fmt: skip
    return {
        "version": VERSION,
        "experiment": experiment.get("experiment"),
        "model": experiment.get("model") or {},
        "hardware": {"device": device, "gpu": None if device in ("cpu", "endpoint") else hardware.get("gpu_model")},
        "clock": metadata.get("clock"),
        "confidence": results.confidence,
        "ladder": list(LADDER),
        "not_run": [share for name, share in rungs.items() if name not in results.budgets],
        "rows": rows,
    }


def _plain(row: Row | None) -> dict[str, Any] | None:
    if row is None or row["estimate"] is None:
        return None
    return {k: row[k] for k in ("estimate", "ci_low", "ci_high", "n")}


def table(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the card as the report shows it; None if none of its shares was run."""
    rows = card["rows"]
    if all(row["policy"] == FULL["policy"] for row in rows):
        return None

    def cell(row: Mapping[str, Any], name: str, digits: int, scale: float = 1.0, unit: str = "") -> Number:
        if row[name] is None:
            return MISSING
        key = {k: row[k] for k in ("task", "mode", "policy")} | {"budget": f"r{row['budget']:g}"}
        source = source_of("bin_stats", key | {"bin": row["bin"], "statistic": _MEASURED[name]})
        return number(row[name] | {"method": ""}, "", digits, scale, unit, source=source)

    return {
        "not_run": [labels.budget(f"r{share:g}") for share in card["not_run"]],
        "hardware": card["hardware"]["gpu"] or card["hardware"]["device"],
        "peak": any(row["peak_mem_mb"] for row in rows),
        "rows": [
            {
                "policy": row["policy"], "mode": labels.mode(row["mode"]), "task": row["task"],
                "budget": "all" if row["policy"] == FULL["policy"] else labels.budget(f"r{row['budget']:g}"),
                "tokens": labels.token_range(*row["tokens"]), "n": row["score"]["n"],
                "score": cell(row, "score", 2), "kv": cell(row, "kv_bytes", 2, 1 / 2**20),
                "rate": cell(row, "tokens_per_s", 0), "ttft": cell(row, "ttft_s", 3),
                "peak": cell(row, "peak_mem_mb", 0),
            }
            for row in rows
        ],
    }  # fmt: skip
