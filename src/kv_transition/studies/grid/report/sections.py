"""The tables of the report on the grid, as the templates show them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.report.numbers import DASH, Number, number, sentence, source_of, tokens_of
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid import equal_bytes, tradeoff
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.analysis.noninferiority import KEPT
from kv_transition.studies.grid.plots import failure_rows
from kv_transition.studies.grid.report import bytes_tables, headline
from kv_transition.studies.grid.results import Results, in_family


def states() -> dict[str, tuple[str, str]]:
    """Return symbol and definition of each word of the scale, as the page shows them."""
    kept = f"{100 * KEPT:g} %"
    return {word: (scale.SYMBOLS[word], text.format(kept=kept)) for word, text in scale.DEFINITIONS.items()}


def transitions(results: Results) -> list[dict[str, Any]]:
    """Return the transition table, with both detectors side by side."""
    tokens = {(task, b["bin"]): tokens_of(b) for task, _ in results.groups for b in results.bins(task)}
    found = []
    for row in results.transition.filter(detector="definition").iter_rows(named=True):
        key = {k: row[k] for k in ("task", "mode", "policy", "budget")}
        other = results.transition.filter(detector="zscore", **key).to_dicts()
        details = json.loads(row["details"])
        zone = json.loads(other[0]["details"]).get("zone") if other else None
        found.append(
            {
                **key,
                "heading": results.heading(row["task"], row["mode"]),
                "mode_name": labels.mode(row["mode"]),
                "budget_name": labels.budget(row["budget"]),
                "outcome": row["outcome"],
                "outcome_name": headline.in_words(results, row),
                "states": [
                    {"state": s, "symbol": scale.SYMBOLS[s], "tokens": t, "n": n} for s, t, n in _states(details)
                ],
                "onset": _at(tokens, row["task"], row["onset_bin"], row["onset_probability"]),
                "collapse": _at(tokens, row["task"], row["collapse_bin"], row["collapse_probability"]),
                "zscore": DASH if zone is None else _span(tokens, row["task"], zone),
                "reason": _after_name(row.get("sentence") or row["reason"]),
                "n": row["n"],
            }
        )
    order = {group: i for i, group in enumerate(results.groups)}
    return sorted(found, key=lambda r: (order[r["task"], r["mode"]], labels.budget_order(r["budget"]), r["policy"]))


def _after_name(text: str) -> str:
    """Return a sentence without the name of the policy at its beginning."""
    return sentence(text.partition(": ")[2] or text)


def _states(details: Mapping[str, Any]) -> Iterable[tuple[str, str, int]]:
    for bin in details.get("bins", []):
        yield bin["state"], labels.token_range(*bin["tokens"]), bin["n"]


def _at(tokens: Mapping, task: str, bin: int | None, probability: float | None) -> str:
    if bin is None:
        return DASH
    return tokens[task, bin] + ("" if probability is None else f" ({100 * probability:.0f} %)")


def _span(tokens: Mapping, task: str, zone: Sequence[int]) -> str:
    first, last = (tokens[task, b] for b in zone)
    return first if first == last else f"{first} to {last}"


COSTS = (
    ("footprint", "Cache, % of full", 100, 0),
    ("cache_bytes", "Cache, MiB", 1 / 2**20, 2),
    ("latency_p50", "Answer, s, median", 1, 3),
    ("ttft_p50", "First token, s, median", 1, 3),
    ("tokens_per_s", "Tokens/s, median", 1, 0),
    ("peak_mem_mb", "Peak memory, MB", 1, 0),
)


def costs(results: Results) -> list[dict[str, Any]]:
    """Return the costs in the longest bin of each task and mode."""
    found = []
    for task, mode in results.groups:
        longest = results.bins(task)[-1]
        rows, measured = [], set()
        for policy, budget in results.pairs:
            cells = [results.stat(task, mode, policy, budget, longest["bin"], name) for name, *_ in COSTS]
            if not any(cells):
                continue
            numbers = [number(c, "bin_stats", d, scale) for c, (_, _, scale, d) in zip(cells, COSTS, strict=True)]
            measured |= {i for i, value in enumerate(numbers) if value.n}
            speed = results.compared(task, mode, policy, budget, None, "speedup")
            rows.append(
                {
                    "policy": policy,
                    "budget": DASH if policy == FULL["policy"] else labels.budget(budget),
                    "n": max(cell["n"] for cell in cells if cell),
                    "cells": numbers,
                    "speed": number(speed, "comparisons", 2, 1, "×"),
                }
            )
        shown = sorted(measured)
        for row in rows:
            row["cells"] = [row["cells"][i] for i in shown]
        found.append(
            {
                "heading": results.heading(task, mode),
                "tokens": tokens_of(longest),
                "columns": [COSTS[i][1] for i in shown],
                "rows": rows,
                "untimed": _untimed(results, task, mode),
            }
        )
    return found


def _untimed(results: Results, task: str, mode: str) -> list[str]:
    """Return what was not measured, and the reason."""
    names = {name: label for name, label, *_ in COSTS}
    own = results.stats.filter(pl.col("statistic").is_in(list(names)), task=task, mode=mode, n=0)
    reasons = own.group_by("method", maintain_order=True).agg(pl.col("statistic").unique(maintain_order=True))
    return [
        sentence(", ".join(names[s].split(",")[0].lower() for s in statistics)) + f": {reason}."
        for reason, statistics in reasons.iter_rows()
    ]


def bin_tables(results: Results) -> list[dict[str, Any]]:
    """Return every mean score with its interval and n: policy and budget by bin."""
    found = []
    for task, mode in results.groups:
        bins = results.bins(task)
        rows = []
        for policy, budget in results.pairs:
            cells = [
                number(results.stat(task, mode, policy, budget, b["bin"], "score_mean"), "bin_stats") for b in bins
            ]
            if any(cell.n for cell in cells):
                name = policy if policy == FULL["policy"] else f"{policy}, {labels.budget(budget)}"
                rows.append({"name": name, "cells": cells})
        heads = []
        for i, b in enumerate(bins):
            counts = {row["cells"][i].n for row in rows if row["cells"][i].n}
            n = "0" if not counts else f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
            heads.append({"bin": b["bin"], "tokens": f"{b['token_min']}–{b['token_max']}", "n": n})
        found.append({"heading": results.heading(task, mode), "bins": heads, "rows": rows})
    return found


def differences(results: Results) -> list[dict[str, Any]]:
    """Return paired differences from the full cache over all lengths, in score and failures, with p after Holm."""
    found = []
    for task, mode in results.groups:
        rows = []
        for policy, budget in results.pairs[1:]:
            score = results.compared(task, mode, policy, budget, None, "score")
            failed = results.compared(task, mode, policy, budget, None, "failure_rate")
            if score is None:
                continue
            rows.append({
                "policy": policy, "budget": labels.budget(budget), "n": score["n"],
                "score": number(in_family(score), "comparisons", signed=True),
                "score_p": labels.p_value(score["p_holm"]),
                "detectable": None if score.get("mdd") is None else f"{score['mdd']:.2f}",
                "failed": number(in_family(failed), "comparisons", signed=True),
                "failed_p": labels.p_value(failed["p_holm"] if failed else None),
            })  # fmt: skip
        found.append({"heading": results.heading(task, mode), "rows": rows})
    return found


def between(results: Results, pairs: pl.DataFrame | None) -> list[dict[str, Any]]:
    """Return paired differences in score between policies at the same budget, over all lengths (pairs.parquet)."""
    found = []
    for task, mode in results.groups if pairs is not None else []:
        own = pairs.filter(pl.col("bin").is_null(), task=task, mode=mode, statistic="score").to_dicts()
        of = equal_bytes.curve(results, task, mode)
        own.sort(key=lambda row: (labels.budget_order(row["budget"]), row["policy"], row["reference_policy"]))
        rows = [
            {
                "names": f"{row['policy']} minus {row['reference_policy']}", "budget": labels.budget(row["budget"]),
                "score": number(in_family(row), "pairs", signed=True,
                                source=f"{source_of('pairs', row)}/{row['reference_policy']}"),
                "p": labels.p_value(row["p_holm"]), "n": row["n"],
            } | bytes_tables.between(of, row, results.confidence)
            for row in own
        ]  # fmt: skip
        if rows:
            found.append({"heading": results.heading(task, mode), "rows": rows})
    return found


def smallest(results: Results, budgets: pl.DataFrame | None) -> list[dict[str, Any]]:
    """Return the smallest budget that is shown to keep enough of the score, over all lengths."""
    found = []
    for task, mode in results.groups if budgets is not None else []:
        rows = []
        for row in budgets.filter(pl.col("bin").is_null(), task=task, mode=mode).sort("policy").to_dicts():
            ratio = {"estimate": row["ratio"], "ci_low": row["ratio_low"], "ci_high": row["ratio_high"]}
            source = "/".join(("smallest_budgets", task, mode, row["policy"], row["budget"] or "none", "all/ratio"))
            kept = number(ratio | {"n": row["n"], "method": row["method"]}, "", 0, 100, " %", source=source)
            rows.append({
                "policy": row["policy"], "budget": labels.budget(row["budget"]) if row["budget"] else "none",
                "kept": kept, "n": row["n"], "reason": _after_name(row.get("sentence") or row["reason"]),
            })  # fmt: skip
        if rows:
            found.append({"heading": results.heading(task, mode), "rows": rows, "share": f"{100 * row['kept']:g} %"})
    return found


def along_budgets(results: Results, transition: pl.DataFrame | None) -> list[dict[str, Any]]:
    """Return the budget at which each policy becomes unreliable in each bin (budget_transition.parquet)."""
    found = []
    for task, mode in results.groups if transition is not None else []:
        tokens = {b["bin"]: tokens_of(b) for b in results.bins(task)}
        own = transition.filter(detector="definition", task=task, mode=mode).sort("policy", "bin").to_dicts()
        rows = [
            {
                "policy": row["policy"], "tokens": tokens.get(row["bin"], DASH), "n": row["n"],
                "outcome": scale.words(row, row["since_budget"] and labels.budget(row["since_budget"]), row["n"]),
                "reason": _after_name(row.get("sentence") or row["reason"]),
            }
            for row in own
        ]  # fmt: skip
        if rows:
            found.append({"heading": results.heading(task, mode), "rows": rows})
    return found


def failures(results: Results) -> list[dict[str, Any]]:
    """Return the failure rate over all lengths with its interval, and the share of each kind of failure."""
    parts, totals = failure_rows(results)
    kinds = list(dict.fromkeys(p["failure"] for p in sorted(parts, key=lambda p: p["order"])))
    share = {(p["task"], p["mode"], p["policy"], p["budget"], p["failure"]): p["share"] for p in parts}
    whole = {(t["task"], t["mode"], t["policy"], t["budget"]): t for t in totals}
    found = []
    for task, mode in results.groups:
        rows = []
        for policy, budget in results.pairs:
            total = whole.get((task, mode, policy, budget))
            if total is None:
                continue
            source = source_of("scores", total | {"bin": None, "statistic": "failure_rate"})
            rows.append({
                "name": policy if policy == FULL["policy"] else f"{policy}, {labels.budget(budget)}",
                "rate": number(total, "scores", source=source), "n": total["n"],
                **{name: number(total[name], "scores", source=source.replace("failure_rate", statistic))
                   for name, statistic in (("unknown", "abstention_rate"), ("broken", "broken_rate"))},
                "kinds": [_share(share.get((task, mode, policy, budget, kind))) for kind in kinds],
            })  # fmt: skip
        found.append({"heading": results.heading(task, mode), "kinds": kinds, "rows": rows})
    return found if kinds else []


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def front(results: Results) -> list[dict[str, Any]]:
    """Return score kept against bytes kept, the smallest footprint first, with membership of the Pareto front."""
    points, found = tradeoff.front(results), []
    for task, mode in results.groups:
        rows = []
        for p in sorted((p for p in points if (p["task"], p["mode"]) == (task, mode)), key=lambda p: p["bytes"]):
            own = results.compared(task, mode, p["policy"], p["budget"], None, "score_ratio")
            size = {"estimate": p["bytes"], "ci_low": p["bytes_low"], "ci_high": p["bytes_high"], "n": p["n"],
                    "method": ""}  # fmt: skip
            source = f"scores/{task}/{mode}/{p['policy']}/{p['budget']}/all/footprint"
            kept = number(own, "comparisons", 0, 100, " %") if own else Number("100 %, the reference")
            rows.append({
                "name": p["policy"] if own is None else f"{p['policy']}, {labels.budget(p['budget'])}",
                "bytes": number(size, "scores", 1, 100, " %", source=source), "n": p["n"], "best": p["best"],
                "kept": kept,
            })  # fmt: skip
        if rows:
            found.append({"heading": results.heading(task, mode), "rows": rows})
    return found
