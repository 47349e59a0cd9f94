"""What the tables say, as numbers and sentences for people: everything here is computed, nothing is canned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from kv_transition.analysis import labels
from kv_transition.analysis.aggregate import FULL

KEPT = 0.95  # a bin holds while the mean is at least this share of the full cache's
EXPLORATORY = 20

OUTCOMES = {
    "stable": "stable",
    "unstable": "unstable without collapse",
    "zone": "transition zone",
    "cliff": "cliff",
    "undecided": "undecided",
}
STATES = {
    "sound": ("●", "sound: the mean's lower bound is at least half of the full cache's"),
    "unsure": ("◐", "open: the interval of the mean includes half of the full cache's"),
    "unstable": ("▲", "unstable"),
    "collapsed": ("×", "collapsed: the mean's upper bound is below half of the full cache's"),
}


@dataclass(frozen=True)
class Tables:
    """The experiment's tables without the alias rows of the full cache."""

    scores: pl.DataFrame
    stats: pl.DataFrame
    comparisons: pl.DataFrame
    transition: pl.DataFrame
    confidence: float

    @cached_property
    def groups(self) -> list[tuple[str, str]]:
        """(task, mode), the modes never mixed."""
        found = self.stats.select("task", "mode").unique().rows()
        return sorted(found, key=lambda k: (k[0], list(labels.MODES).index(k[1])))

    @cached_property
    def policies(self) -> list[str]:
        return sorted(set(self.stats["policy"]) - {FULL["policy"]})

    @cached_property
    def budgets(self) -> list[str]:
        own = self.stats.filter(pl.col("policy") != FULL["policy"])
        return sorted(set(own["budget"]), key=labels.budget_order)

    @cached_property
    def _index(self) -> dict[tuple, dict[str, Any]]:
        keys = ("task", "mode", "policy", "budget", "bin", "statistic")
        return {tuple(row[k] for k in keys): row for row in self.stats.iter_rows(named=True)}

    @cached_property
    def _compared(self) -> dict[tuple, dict[str, Any]]:
        keys = ("task", "mode", "policy", "budget", "bin", "statistic")
        return {tuple(row[k] for k in keys): row for row in self.comparisons.iter_rows(named=True)}

    def stat(self, task: str, mode: str, policy: str, budget: str, bin: int, statistic: str) -> dict[str, Any] | None:
        return self._index.get((task, mode, policy, budget, bin, statistic))

    def compared(self, task: str, mode: str, policy: str, budget: str, bin: int | None, statistic: str) -> dict | None:
        return self._compared.get((task, mode, policy, budget, bin, statistic))

    def bins(self, task: str) -> list[dict[str, Any]]:
        """bin, token_min, token_max, token_mean of the task's bins, in order."""
        columns = ["bin", "token_min", "token_max", "token_mean"]
        return self.stats.filter(task=task).select(columns).unique("bin").sort("bin").to_dicts()


def tokens_of(bin: Mapping[str, Any]) -> str:
    return labels.token_range(bin["token_min"], bin["token_max"])


def estimate(row: Mapping[str, Any] | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """``0.97 [0.91, 0.99]``, scaled; a dash for what was not measured."""
    if row is None or row["estimate"] is None:
        return "–"
    values = (None if row[k] is None else row[k] * scale for k in ("estimate", "ci_low", "ci_high"))
    point, _, bounds = labels.interval(*values, digits).partition(" ")
    return f"{point}{unit} {bounds}".strip()


@dataclass(frozen=True)
class Holds:
    """Up to which bin a policy shows no loss, and how large a loss the data could still hide there."""

    last: dict[str, Any] | None
    first_loss: dict[str, Any] | None
    hidden: float | None

    @property
    def text(self) -> str:
        if self.last is not None:
            return f"holds to {labels.tokens(self.last['token_max'])} tokens"
        if self.first_loss is None:
            return "not compared"
        return f"loss from {labels.tokens(self.first_loss['token_min'])} tokens on"


def holds(tables: Tables, task: str, mode: str, policy: str, budget: str) -> Holds:
    """The longest run of bins from the shortest on in which no loss was seen.

    A bin holds if the mean is at least `KEPT` of the full cache's and neither score nor failure rate is significantly
    worse (paired permutation test, Holm within the family).
    """
    last, hidden, alpha = None, None, 1 - tables.confidence
    for bin in tables.bins(task):
        score = tables.compared(task, mode, policy, budget, bin["bin"], "score")
        failed = tables.compared(task, mode, policy, budget, bin["bin"], "failure_rate")
        full = tables.stat(task, mode, **FULL, bin=bin["bin"], statistic="score_mean")
        if not (score and failed and full) or score["estimate"] is None or full["estimate"] is None:
            break
        worse = any(
            row["p_holm"] is not None and row["p_holm"] < alpha and sign * row["estimate"] > 0
            for row, sign in ((score, -1), (failed, 1))
        )
        if worse or full["estimate"] + score["estimate"] < KEPT * full["estimate"]:
            return Holds(last, bin, hidden)
        last = bin
        hidden = max(hidden or 0.0, -score["ci_low"])
    return Holds(last, None, hidden)


def verdicts(tables: Tables) -> list[dict[str, Any]]:
    """The first screen: per task and mode a table of policy by budget."""
    found = []
    for task, mode in tables.groups:
        rows = []
        for policy in tables.policies:
            cells = [_verdict(tables, task, mode, policy, budget) for budget in tables.budgets]
            if any(cells):
                rows.append({"policy": policy, "cells": cells})
        hidden = [c["hidden"] for row in rows for c in row["cells"] if c and c["hidden"] is not None]
        found.append(
            {
                "task": task,
                "mode": mode,
                "name": labels.mode(mode),
                "budgets": [labels.budget(b) for b in tables.budgets],
                "rows": rows,
                "full": _full_range(tables, task, mode),
                "hidden": max(hidden, default=None),
            }
        )
    return found


def _verdict(tables: Tables, task: str, mode: str, policy: str, budget: str) -> dict[str, Any] | None:
    kept = tables.compared(task, mode, policy, budget, None, "score_ratio")
    if kept is None:
        return None
    held = holds(tables, task, mode, policy, budget)
    footprints = tables.stats.filter(task=task, mode=mode, policy=policy, budget=budget, statistic="footprint")
    measured = footprints.drop_nulls("estimate")["estimate"]
    cache = "–"
    if len(measured):
        low, high = (f"{100 * v:.0f}" for v in (measured.min(), measured.max()))
        cache = f"{low} %" if low == high else f"{low}–{high} %"
    speed = tables.compared(task, mode, policy, budget, None, "speedup")
    return {
        "kept": estimate(kept, 0, 100, " %"),
        "share": max(0.0, min(1.0, kept["estimate"] or 0.0)),
        "n": kept["n"],
        "holds": held.text,
        "all": held.first_loss is None and held.last is not None,
        "hidden": held.hidden,
        "cache": cache,
        "speed": estimate(speed, 2, 1, "×") if speed and speed["estimate"] is not None else None,
    }


def _full_range(tables: Tables, task: str, mode: str) -> dict[str, Any] | None:
    rows = tables.stats.filter(task=task, mode=mode, statistic="score_mean", **FULL).drop_nulls("estimate").sort("bin")
    if not rows.height:
        return None
    means = rows["estimate"]
    lowest = rows.row(int(means.arg_min()), named=True)
    return {"low": means.min(), "high": means.max(), "lowest": lowest}


def findings(tables: Tables) -> list[dict[str, Any]]:
    """The key findings, a sentence each, by task and mode."""
    return [
        {"task": task, "name": labels.mode(mode), "sentences": [_sentence(s) for s in _of_group(tables, task, mode)]}
        for task, mode in tables.groups
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _of_group(tables: Tables, task: str, mode: str) -> Iterable[str]:
    full = _full_range(tables, task, mode)
    if full is None:
        yield "the full cache was not run, so nothing can be compared with it."
        return
    lowest = full["lowest"]
    yield (
        f"the full cache scores {labels.number(full['low'])} to {labels.number(full['high'])} over the bins, lowest "
        f"{estimate(lowest)} at {tokens_of(lowest)} tokens (n = {lowest['n']})."
    )
    for budget in tables.budgets:
        pooled = [tables.compared(task, mode, p, budget, None, "score_ratio") for p in tables.policies]
        ranked = sorted(
            (row for row in pooled if row and row["estimate"] is not None), key=lambda row: -row["estimate"]
        )
        if not ranked:
            continue
        best = ranked[0]
        text = f"with {labels.budget(budget)} of the cache, {_kept(best)} (n = {best['n']})"
        if budget.startswith("t"):
            text = f"with {labels.budget(budget)} kept, {_kept(best)} (n = {best['n']})"
        if len(ranked) > 1:
            worst = ranked[-1]
            apart = worst["ci_high"] is not None and best["ci_low"] > worst["ci_high"]
            text += f", {worst['policy']} least: {estimate(worst, 0, 100, ' %')} (n = {worst['n']})" + (
                "" if apart else "; their intervals overlap"
            )
        yield text + "."
    held = {
        (p, b): holds(tables, task, mode, p, b)
        for b in tables.budgets
        for p in tables.policies
        if tables.compared(task, mode, p, b, None, "score_ratio")
    }
    everywhere = [k for k, h in held.items() if h.last is not None and h.first_loss is None]
    if everywhere:
        names = _and(f"{p} at {labels.budget(b)}" for p, b in everywhere)
        yield f"no loss was seen at any length for {names}."
    elif held:
        (policy, budget), best_hold = max(held.items(), key=lambda kv: kv[1].last["bin"] if kv[1].last else -1)
        if best_hold.last is None:
            yield (
                f"no policy at any budget holds even in the shortest bin (at least {100 * KEPT:g} % of the full "
                "cache's mean, no significant loss)."
            )
        else:
            yield (
                f"nothing holds at all lengths; {policy} at {labels.budget(budget)} holds longest, to "
                f"{labels.tokens(best_hold.last['token_max'])} tokens."
            )
    zones = tables.transition.filter(detector="definition", task=task, mode=mode)
    if zones.height:
        counts = dict(zones["outcome"].value_counts().iter_rows())
        parts = [f"{name} {counts[k]}" for k, name in OUTCOMES.items() if k in counts]
        yield f"along the lengths, {zones.height} pairs of policy and budget: {', '.join(parts)}."
    failed = tables.scores.filter(task=task, mode=mode)
    kinds = failed["failure"].drop_nulls().value_counts().sort(["count", "failure"], descending=[True, False])
    if kinds.height:
        name, count = kinds.row(0)
        yield (
            f"{kinds['count'].sum()} of {failed.height} answers failed, most often as “{labels.failure(name)}” "
            f"({count}); a wrong answer is not a failure."
        )
    else:
        yield f"none of {failed.height} answers failed; a wrong answer is not a failure."


def _kept(row: Mapping[str, Any]) -> str:
    return f"{row['policy']} keeps most of the full cache's score: {estimate(row, 0, 100, ' %')}"


def _and(parts: Iterable[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def transitions(tables: Tables) -> list[dict[str, Any]]:
    """The transition table, both detectors side by side."""
    tokens = {(task, b["bin"]): tokens_of(b) for task, _ in tables.groups for b in tables.bins(task)}
    found = []
    for row in tables.transition.filter(detector="definition").iter_rows(named=True):
        key = {k: row[k] for k in ("task", "mode", "policy", "budget")}
        other = tables.transition.filter(detector="zscore", **key).to_dicts()
        details = json.loads(row["details"])
        zone = json.loads(other[0]["details"]).get("zone") if other else None
        found.append(
            {
                **key,
                "mode_name": labels.mode(row["mode"]),
                "budget_name": labels.budget(row["budget"]),
                "outcome": row["outcome"],
                "outcome_name": OUTCOMES.get(row["outcome"], row["outcome"]),
                "states": [{"state": s, "symbol": STATES[s][0], "tokens": t} for s, t in _states(details)],
                "onset": _at(tokens, row["task"], row["onset_bin"], row["onset_probability"]),
                "collapse": _at(tokens, row["task"], row["collapse_bin"], row["collapse_probability"]),
                "zscore": "–" if zone is None else _span(tokens, row["task"], zone),
                "reason": _sentence(row["reason"].partition(": ")[2]),
                "n": row["n"],
            }
        )
    order = {name: i for i, name in enumerate(labels.MODES)}
    return sorted(found, key=lambda r: (r["task"], order[r["mode"]], labels.budget_order(r["budget"]), r["policy"]))


def _states(details: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    fallen = False
    for bin in details.get("bins", []):
        fallen = fallen or bin["collapsed"]
        if bin["collapsed"]:
            state = "collapsed"
        elif bin["unstable"] and not fallen:
            state = "unstable"
        else:
            state = "sound" if bin["mean_low"] >= 0.5 * bin["full_mean"] else "unsure"
        yield state, labels.token_range(*bin["tokens"])


def _at(tokens: Mapping, task: str, bin: int | None, probability: float | None) -> str:
    if bin is None:
        return "–"
    return f"{tokens[task, bin]} ({100 * probability:.0f} %)"


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


def costs(tables: Tables) -> list[dict[str, Any]]:
    """Cost in the longest bin of each task and mode, where a cache matters most."""
    found = []
    for task, mode in tables.groups:
        longest = tables.bins(task)[-1]
        rows = []
        for policy, budget in _pairs(tables):
            cells = [tables.stat(task, mode, policy, budget, longest["bin"], name) for name, *_ in COSTS]
            if not any(cells):
                continue
            speed = tables.compared(task, mode, policy, budget, None, "speedup")
            rows.append(
                {
                    "policy": policy,
                    "budget": "–" if policy == FULL["policy"] else labels.budget(budget),
                    "n": max(cell["n"] for cell in cells if cell),
                    "cells": [estimate(c, d, scale) for c, (_, _, scale, d) in zip(cells, COSTS, strict=True)],
                    "speed": estimate(speed, 2, 1, "×"),
                }
            )
        reasons = tables.stats.filter(task=task, mode=mode, statistic="latency_p50", n=0)["method"].unique().to_list()
        found.append(
            {
                "task": task,
                "name": labels.mode(mode),
                "tokens": tokens_of(longest),
                "columns": [label for _, label, *_ in COSTS],
                "rows": rows,
                "untimed": sorted(reasons),
            }
        )
    return found


def _pairs(tables: Tables) -> list[tuple[str, str]]:
    return [(FULL["policy"], FULL["budget"]), *((p, b) for b in tables.budgets for p in tables.policies)]


def bin_tables(tables: Tables) -> list[dict[str, Any]]:
    """Every mean score with its interval and n: policy and budget by bin."""
    found = []
    for task, mode in tables.groups:
        bins = tables.bins(task)
        rows = []
        for policy, budget in _pairs(tables):
            cells = [tables.stat(task, mode, policy, budget, b["bin"], "score_mean") for b in bins]
            if any(cells):
                name = policy if policy == FULL["policy"] else f"{policy}, {labels.budget(budget)}"
                rows.append({"name": name, "cells": [{"text": estimate(c), "n": c["n"] if c else 0} for c in cells]})
        heads = []
        for i, b in enumerate(bins):
            counts = {row["cells"][i]["n"] for row in rows if row["cells"][i]["n"]}
            n = "0" if not counts else f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
            heads.append({"bin": b["bin"], "tokens": f"{b['token_min']}–{b['token_max']}", "n": n})
        found.append({"task": task, "name": labels.mode(mode), "bins": heads, "rows": rows})
    return found


def exploratory(tables: Tables) -> list[str]:
    """Sentences about what is too small to conclude from."""
    means = tables.stats.filter(statistic="score_mean")
    small = means.filter(pl.col("n") < EXPLORATORY)
    if not small.height:
        return []
    return [
        f"{small.height} of {means.height} cells have fewer than {EXPLORATORY} scored examples (fewest: "
        f"{small['n'].min()}); everything about them is exploratory."
    ]
