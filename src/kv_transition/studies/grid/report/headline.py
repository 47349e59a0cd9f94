"""The first screen of the report: the outcome of each policy and budget, with score kept, bytes and speed."""

from __future__ import annotations

from typing import Any

from kv_transition import labels
from kv_transition.report.numbers import MISSING, kept_of, listed, number, sentence
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.analysis.noninferiority import KEPT
from kv_transition.studies.grid.results import Results
from kv_transition.studies.grid.tradeoff import footprints


def outcomes(results: Results, task: str, mode: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the outcome of each (policy, budget), in their order: rows of tables.TRANSITION by the definition."""
    own = results.transition.filter(detector="definition", task=task, mode=mode).iter_rows(named=True)
    found = {(row["policy"], row["budget"]): row for row in own}
    return {pair: found[pair] for pair in results.pairs if pair in found}


def in_words(results: Results, row: dict[str, Any]) -> str:
    """Return an outcome with the bin at which it begins, or with the n that would decide it."""
    starts = {b["bin"]: f"{labels.tokens(b['token_min'])} tokens" for b in results.bins(row["task"])}
    kept = results.compared(row["task"], row["mode"], row["policy"], row["budget"], None, "score_ratio")
    return scale.words(row, starts.get(row["since_bin"]), kept["n"] if kept else 0)


def verdicts(results: Results) -> list[dict[str, Any]]:
    """Return the first screen: per task and mode the answer in words, and a table of policy by budget, best first."""
    saved, found = footprints(results), []
    for task, mode in results.groups:
        rows, known = [], outcomes(results, task, mode)
        for policy in results.policies:
            cells = [_verdict(results, saved, known, task, mode, policy, budget) for budget in results.budgets]
            if any(cells):
                rows.append({"policy": policy, "cells": cells})
        rows.sort(key=lambda row: -sum(c["share"] for c in row["cells"] if c))
        lead, rest = answer(results, task, mode)
        found.append({
            "task": task, "mode": mode, "name": labels.mode(mode), "heading": results.heading(task, mode),
            "lead": lead, "rest": rest, "budgets": [labels.budget(b) for b in results.budgets], "rows": rows,
            "n": _common({c["n"] for row in rows for c in row["cells"] if c}),
        })  # fmt: skip
    return found


def _common(counts: set[int]) -> int | None:
    """Return the n of the table's cells if it is the same in all of them, else None."""
    return counts.pop() if len(counts) == 1 else None


def _verdict(
    results: Results, saved: dict, known: dict, task: str, mode: str, policy: str, budget: str
) -> dict[str, Any] | None:
    kept, row = results.compared(task, mode, policy, budget, None, "score_ratio"), known.get((policy, budget))
    if kept is None or row is None:
        return None
    bins = results.bins(task)
    run = sum(results.stat(task, mode, policy, budget, b["bin"], "score_mean") is not None for b in bins)
    return {
        "kept": number(kept | _bounds(row), "comparisons", 0, 100, " %"),
        "share": max(0.0, min(1.0, kept["estimate"] or 0.0)),
        "n": kept["n"],
        "outcome": row["outcome"],
        "symbol": scale.SYMBOLS[row["outcome"]],
        "words": in_words(results, row),
        "saved": _saved(saved.get((task, mode, policy, budget)), f"scores/{task}/{mode}/{policy}/{budget}/all/saved"),
        "speed": number(results.compared(task, mode, policy, budget, None, "speedup"), "comparisons", 2, 1, "×"),
        "bins": None if run == len(bins) else f"{run} of {len(bins)} bins",
    }


def _saved(footprint: dict[str, Any] | None, source: str):
    """Return 1 minus the footprint, with its bounds exchanged."""
    if footprint is None or footprint["estimate"] is None:
        return MISSING
    turned = {"estimate": "estimate", "ci_low": "ci_high", "ci_high": "ci_low"}
    bounds = {k: None if footprint[other] is None else 1 - footprint[other] for k, other in turned.items()}
    return number(footprint | bounds, "scores", 1, 100, " %", source=source)


def answer(results: Results, task: str, mode: str) -> tuple[str, str]:
    """Return the answer for one task and mode: a short sentence, and the sentences that support it."""
    known = {
        pair: row
        for pair, row in outcomes(results, task, mode).items()
        if pair[0] in results.contenders and results.compared(task, mode, *pair, None, "score_ratio")
    }
    if not known:
        return "There is nothing to compare.", "Only the full cache was run, or no policy shares an example with it."
    by_word = {word: [pair for pair, row in known.items() if row["outcome"] == word] for word in scale.SCALE}
    enough, undecided = by_word[scale.NO_LOSS], by_word[scale.UNDECIDED]
    worse = [word for word in (scale.LOSS, scale.UNSTABLE, scale.COLLAPSED) if by_word[word]]
    rest = [f"Of {len(known)} pairs of policy and budget, {_counted(by_word)}."]
    if enough:
        smallest = max((budget for _, budget in enough), key=labels.budget_order)
        winners = [policy for policy, budget in enough if budget == smallest]
        verb = "are" if smallest.startswith("t") else "is"
        lead = sentence(f"{kept_of(smallest)} {verb} enough, with {listed(winners)}.")
        shown = "; ".join(f"{policy} keeps {_kept(results, known[policy, smallest])}" for policy in winners)
        rest.insert(0, f"It is shown that at least {100 * KEPT:g} % of the score is kept: {shown}.")
    elif undecided:
        lead = "No budget is shown to be enough: there are too few examples to show that nothing is lost."
        nearest = min(undecided, key=lambda pair: (known[pair]["n_decides"] or 10**9, labels.budget_order(pair[1])))
        policy, budget = nearest
        kept = _kept(results, known[nearest])
        why = in_words(results, known[nearest])
        rest.insert(0, f"The nearest, {policy} at {labels.budget(budget)}, keeps {kept} and is {why}.")
    else:
        lead = f"Every policy and budget shows a loss{'' if worse == [scale.LOSS] else ', or worse'}."
        best = max(known, key=lambda pair: _estimate(results, task, mode, *pair))
        rest.insert(0, f"The best, {best[0]} at {labels.budget(best[1])}, keeps {_kept(results, known[best])}: "
                       f"{in_words(results, known[best])}.")  # fmt: skip
    return lead, " ".join(sentence(text) for text in rest)


def _counted(by_word: dict[str, list]) -> str:
    return ", ".join(f"{len(pairs)} {word}" for word, pairs in by_word.items() if pairs)


def _bounds(row: dict[str, Any]) -> dict[str, float | None]:
    """Return the interval of the score kept that agrees with the outcome of ``row``."""
    return {"ci_low": row["kept_low"], "ci_high": row["kept_high"]}


def _kept(results: Results, row: dict[str, Any]) -> str:
    found = results.compared(row["task"], row["mode"], row["policy"], row["budget"], None, "score_ratio")
    row = found | _bounds(row)
    return f"{number(row, 'comparisons', 0, 100, ' %')} of the full cache's score (n = {row['n']})"


def _estimate(results: Results, task: str, mode: str, policy: str, budget: str) -> float:
    row = results.compared(task, mode, policy, budget, None, "score_ratio")
    return -1.0 if row is None or row["estimate"] is None else row["estimate"]
