"""The answer: up to which length each policy and budget shows no loss, what it keeps, saves and gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.labels import p_value, signed
from kv_transition.report.numbers import MISSING, kept_of, listed, number, sentence, tokens_of
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid.results import Results, in_family
from kv_transition.studies.grid.tradeoff import footprints

KEPT = 0.95  # a bin is without loss while the mean is at least this share of the full cache's


@dataclass(frozen=True)
class Holds:
    """Up to which bin a policy shows no loss, and how large a loss the data could still hide there."""

    last: dict[str, Any] | None
    first_loss: dict[str, Any] | None
    hidden: float | None

    @property
    def everywhere(self) -> bool:
        return self.last is not None and self.first_loss is None

    @property
    def text(self) -> str:
        if self.last is not None:
            return f"no loss to {labels.tokens(self.last['token_max'])} tokens"
        if self.first_loss is None:
            return "not compared"
        return f"loss from {labels.tokens(self.first_loss['token_min'])} tokens on"


def holds(results: Results, task: str, mode: str, policy: str, budget: str) -> Holds:
    """The longest run of bins from the shortest on in which no loss was seen.

    A bin holds if the mean is at least `KEPT` of the full cache's and neither score nor failure rate is significantly
    worse (after Holm within the family).
    """
    last, hidden, alpha = None, None, 1 - results.confidence
    for bin in results.bins(task):
        score = results.compared(task, mode, policy, budget, bin["bin"], "score")
        failed = results.compared(task, mode, policy, budget, bin["bin"], "failure_rate")
        full = results.stat(task, mode, **FULL, bin=bin["bin"], statistic="score_mean")
        if not (score and failed and full) or score["estimate"] is None or full["estimate"] is None:
            break
        worse = any(
            row["p_holm"] is not None and row["p_holm"] < alpha and sign * row["estimate"] > 0
            for row, sign in ((score, -1), (failed, 1))
        )
        if worse or full["estimate"] + score["estimate"] < KEPT * full["estimate"]:
            return Holds(last, bin, hidden)
        last = bin
        hidden = max(hidden or 0.0, -score["ci_low"]) if score["ci_low"] is not None else hidden
    return Holds(last, None, hidden)


def verdicts(results: Results, tested: pl.DataFrame | None = None) -> list[dict[str, Any]]:
    """The first screen: per task and mode the answer in words, and a table of policy by budget, the best first.

    ``tested``: the non-inferiority tests (noninferiority.parquet), where there are any.
    """
    saved, found = footprints(results), []
    for task, mode in results.groups:
        rows = []
        for policy in results.policies:
            cells = [_verdict(results, saved, task, mode, policy, budget) for budget in results.budgets]
            if any(cells):
                rows.append({"policy": policy, "cells": cells})
        rows.sort(key=lambda row: -sum(c["share"] for c in row["cells"] if c))
        hidden = [c["hidden"] for row in rows for c in row["cells"] if c and c["hidden"] is not None]
        lead, rest = answer(results, task, mode, tested)
        found.append({
            "task": task, "mode": mode, "name": labels.mode(mode), "heading": results.heading(task, mode),
            "lead": lead, "rest": rest, "budgets": [labels.budget(b) for b in results.budgets], "rows": rows,
            "hidden": max(hidden, default=None), "n": _common({c["n"] for row in rows for c in row["cells"] if c}),
        })  # fmt: skip
    return found


def _common(counts: set[int]) -> int | None:
    """The n of every cell of the table, where they all have the same."""
    return counts.pop() if len(counts) == 1 else None


def _verdict(results: Results, saved: dict, task: str, mode: str, policy: str, budget: str) -> dict[str, Any] | None:
    kept = results.compared(task, mode, policy, budget, None, "score_ratio")
    if kept is None:
        return None
    held = holds(results, task, mode, policy, budget)
    bins = results.bins(task)
    run = sum(results.stat(task, mode, policy, budget, b["bin"], "score_mean") is not None for b in bins)
    return {
        "kept": number(kept, "comparisons", 0, 100, " %"),
        "share": max(0.0, min(1.0, kept["estimate"] or 0.0)),
        "n": kept["n"],
        "holds": held.text,
        "all": held.everywhere,
        "transition": _transition(results, task, mode, policy, budget),
        "hidden": held.hidden,
        "saved": _saved(saved.get((task, mode, policy, budget)), f"scores/{task}/{mode}/{policy}/{budget}/all/saved"),
        "speed": number(results.compared(task, mode, policy, budget, None, "speedup"), "comparisons", 2, 1, "×"),
        "bins": None if run == len(bins) else f"{run} of {len(bins)} bins",
    }


def _transition(results: Results, task: str, mode: str, policy: str, budget: str) -> str:
    """``stable``, ``unstable from 508 tokens``, ``collapsed from 2.0k tokens``: the detector's word, by definition."""
    found = results.transition.filter(detector="definition", task=task, mode=mode, policy=policy, budget=budget)
    if not found.height:
        return ""
    row = found.row(0, named=True)
    starts = {b["bin"]: f"from {labels.tokens(b['token_min'])} tokens" for b in results.bins(task)}
    if row["onset_bin"] is not None:
        return f"unstable {starts[row['onset_bin']]}"
    if row["collapse_bin"] is not None:
        return f"collapsed {starts[row['collapse_bin']]}"
    return row["outcome"]


def _saved(footprint: dict[str, Any] | None, source: str):
    """What is not kept: the footprint's complement, with its bounds turned."""
    if footprint is None or footprint["estimate"] is None:
        return MISSING
    turned = {"estimate": "estimate", "ci_low": "ci_high", "ci_high": "ci_low"}
    bounds = {k: None if footprint[other] is None else 1 - footprint[other] for k, other in turned.items()}
    return number(footprint | bounds, "scores", 1, 100, " %", source=source)


def answer(results: Results, task: str, mode: str, tested: pl.DataFrame | None = None) -> tuple[str, str]:
    """The question answered for one task and mode: a few words, and the sentence behind them."""
    held = {
        (policy, budget): holds(results, task, mode, policy, budget)
        for policy, budget in results.pairs[1:]
        if policy in results.contenders and results.compared(task, mode, policy, budget, None, "score_ratio")
    }
    if not held:
        return "Nothing to compare.", "Only the full cache was run, or no policy shares an example with it."

    def kept(policy: str, budget: str) -> str:
        row = results.compared(task, mode, policy, budget, None, "score_ratio")
        return f"{number(row, 'comparisons', 0, 100, ' %')} of the full cache's score (n = {row['n']})"

    budgets = [b for b in results.budgets if any(b == budget for _, budget in held)]
    everywhere = [k for k, h in held.items() if h.everywhere]
    if everywhere:
        smallest = max((b for _, b in everywhere), key=labels.budget_order)
        winners = [p for p, b in everywhere if b == smallest]
        shown = [p for p in winners if _shown(tested, task, mode, p, smallest)]
        verb = ("are" if smallest.startswith("t") else "is") if shown else "may be"
        lead = sentence(f"{kept_of(smallest)} {verb} enough, with {listed(shown or winners)}.")
        winners = shown or winners
        reach = labels.tokens(results.bins(task)[-1]["token_max"])
        text = f"No loss was seen at any length, to {reach} tokens: {winners[0]} keeps {kept(winners[0], smallest)}."
        pooled = results.compared(task, mode, winners[0], smallest, None, "score")
        alpha = 1 - results.confidence
        if pooled and pooled["p_holm"] is not None and pooled["p_holm"] < alpha and pooled["estimate"] < 0:
            p = p_value(pooled["p_holm"])
            text += f" Over all lengths together a difference shows: {signed(in_family(pooled))}, p = {p} after Holm."
        if tested is not None:
            text += f" That it keeps {100 * KEPT:g} % is {'' if shown else 'not '}shown (non-inferiority)."
        less = [b for b in budgets if labels.budget_order(b) > labels.budget_order(smallest)]
    else:
        longest = max(held, key=lambda k: (held[k].last["bin"] if held[k].last else -1, labels.budget_order(k[1])))
        if held[longest].last is not None:
            policy, budget = longest
            reach = labels.tokens(held[longest].last["token_max"])
            lead = sentence(f"{kept_of(budget)} is enough to {reach} tokens, with {policy}.")
            text = f"Beyond that a loss shows; over all lengths it keeps {kept(policy, budget)}."
            return lead, text
        lead = "Nothing tried is without loss, at any length."
        text, less = "", budgets
    for budget in less[:1]:
        best = max((p for p, b in held if b == budget), key=lambda p: _estimate(results, task, mode, p, budget))
        best_hold = held[best, budget]
        where = f"; a loss shows first at {tokens_of(best_hold.first_loss)} tokens" if best_hold.first_loss else ""
        text += f" At {labels.budget(budget)} the best, {best}, keeps {kept(best, budget)}{where}."
    return lead, text.strip()


def _shown(tested: pl.DataFrame | None, task: str, mode: str, policy: str, budget: str) -> bool:
    """Whether a test over all lengths has shown that the policy keeps enough of the full cache's score."""
    if tested is None:
        return False
    own = tested.filter(pl.col("bin").is_null(), task=task, mode=mode, policy=policy, budget=budget)
    return bool(own["non_inferior"].fill_null(False).any())


def _estimate(results: Results, task: str, mode: str, policy: str, budget: str) -> float:
    row = results.compared(task, mode, policy, budget, None, "score_ratio")
    return -1.0 if row is None or row["estimate"] is None else row["estimate"]
