"""The key findings of the tables as sentences; every number is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.report.numbers import kept_of, listed, number, sentence, tokens_of
from kv_transition.stats.examples import FULL
from kv_transition.studies.grid import equal_bytes
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.report import headline
from kv_transition.studies.grid.results import Results

EXPLORATORY = 20
NAMED = 3


def findings(results: Results) -> list[dict[str, Any]]:
    """Return the key findings, one sentence each, by task and mode."""
    return [
        {"heading": results.heading(task, mode), "sentences": [sentence(s) for s in _of_group(results, task, mode)]}
        for task, mode in results.groups
    ]


def _of_group(results: Results, task: str, mode: str) -> Iterable[str]:
    means = results.stats.filter(task=task, mode=mode, statistic="score_mean", **FULL).drop_nulls("estimate")
    if not means.height:
        yield "the full cache was not run, so no policy can be compared with it."
        return
    lowest = means.sort("bin").row(int(means.sort("bin")["estimate"].arg_min()), named=True)
    yield (
        f"the full cache scores lowest at {tokens_of(lowest)} tokens: {number(lowest, 'bin_stats')} (n = "
        f"{lowest['n']})."
    )
    matched = {}
    for row in equal_bytes.rankings(results, task, mode):
        matched.setdefault(row["budget"], []).append(row)
    for budget in results.budgets:
        pooled = [results.compared(task, mode, p, budget, None, "score_ratio") for p in results.contenders]
        ranked = sorted(
            (row for row in pooled if row and row["estimate"] is not None), key=lambda row: -row["estimate"]
        )
        if not ranked:
            continue
        best = ranked[0]
        text = f"with {kept_of(budget)} kept, {_kept(best)} (n = {best['n']})"
        if len(ranked) > 1:
            worst = ranked[-1]
            bounds = (best["ci_low"], worst["ci_high"])
            apart = None not in bounds and bounds[0] > bounds[1]
            text += (
                f", {worst['policy']} the least: {number(worst, 'comparisons', 0, 100, ' %')} (n = {worst['n']})"
                + ("" if apart else "; their intervals overlap")
            )
        yield text + _at_equal_bytes(matched.get(budget, [])) + "."
    # a policy that keeps evicted entries in other memory saves none, so it cannot show how little memory is enough
    known = {pair: row for pair, row in headline.outcomes(results, task, mode).items() if pair[0] in results.contenders}
    for word in scale.SCALE:
        pairs = [pair for pair, row in known.items() if row["outcome"] == word]
        if pairs:
            names = listed(f"{p} at {labels.budget(b)}" for p, b in pairs)
            yield f"{word}: {names} ({len(pairs)} of {len(known)} pairs of policy and budget)."
    answers = results.scores.filter(task=task, mode=mode)
    kinds = answers["failure"].drop_nulls().value_counts().sort(["count", "failure"], descending=[True, False])
    if kinds.height:
        honest = kinds.filter(pl.col("failure").is_in(labels.HONEST))["count"].sum()
        broken = kinds.filter(~pl.col("failure").is_in(labels.HONEST))
        most = (
            f", most often as “{labels.failure(broken['failure'][0])}” ({broken['count'][0]})" if broken.height else ""
        )
        yield (
            f"{kinds['count'].sum()} of {answers.height} answers failed: {honest} say “unknown” although the document "
            f"contains the answer, {broken['count'].sum()} are broken{most}; a wrong answer is not a failure."
        )
    else:
        yield f"none of {answers.height} answers failed; a wrong answer is not a failure."


def _at_equal_bytes(rows: list[dict[str, Any]]) -> str:
    """Return the addition to a ranking whose policies hold different bytes; empty if their bytes are equal."""
    ranked = [row for row in rows if row.get("rank_matched")]
    if not ranked or not rows[0]["unequal"]:
        return ""
    low, high = (100 * of(row["share"] for row in rows) for of in (min, max))
    best = ranked[0]
    ends = (100 * best[k] if best[k] is not None else None for k in ("matched", "matched_low", "matched_high"))
    point, _, bounds = labels.interval(*ends, 0).partition(" ")
    return (
        f"; but at this budget the policies hold {low:.0f} to {high:.0f} % of the bytes, and if all hold {high:.0f} %, "
        f"{best['policy']} keeps the most: {point} % {bounds} (n = {best['matched_n']})"
    )


def _kept(row: Mapping[str, Any]) -> str:
    kept = number(row, "comparisons", 0, 100, " %")
    return f"{row['policy']} keeps the most of the full cache's score: {kept}"


def exploratory(results: Results) -> list[str]:
    """Return sentences about samples that are too small for conclusions."""
    means = results.stats.filter(statistic="score_mean")
    small = means.filter(pl.col("n") < EXPLORATORY)
    if not small.height:
        return []
    return [
        f"{small.height} of {means.height} cells have fewer than {EXPLORATORY} scored examples (fewest: "
        f"{small['n'].min()}); all statements about them are exploratory."
    ]


def oddities(results: Results) -> list[str]:
    """Return sentences about properties of these data that distort numbers."""
    return [sentence(text) for text in _oddities(results)]


def _oddities(results: Results) -> Iterable[str]:
    for task in dict.fromkeys(task for task, _ in results.groups):
        if len(results.bins(task)) == 1:
            yield f"{task} has one length bin only, so a transition along the length cannot be assessed."
    single = results.stats.filter(pl.col("statistic") == "score_mean", pl.col("n") == 1)
    if single.height:
        yield (
            f"{single.height} cells have n = 1: one example has no spread, so their intervals are as wide as the "
            "method allows, and a difference can hardly be significant."
        )
    all_failed = results.stats.filter(pl.col("statistic") == "failure_rate", pl.col("estimate") == 1.0, pl.col("n") > 0)
    if all_failed.height:
        yield f"every answer failed in {all_failed.height} cells: {_named(all_failed)}."
    missing = results.scores["score"].null_count()
    if missing:
        failed = results.scores.filter(pl.col("score").is_null() & pl.col("failure").is_not_null()).height
        yield (
            f"{missing} of {results.scores.height} answers have no score (because of an error, or not a number); they "
            f"are not part of any mean score, and {failed} of them count as failures."
        )
    for task, mode, policy, budget, n in _identical(results):
        yield (
            f"{policy} at {labels.budget(budget)}, {labels.mode(mode)} ({task}), scores exactly like the full cache on "
            f"all {n} examples: the difference is 0, and its interval only shows how large a difference could remain "
            "undetected."
        )
    unmeasured = results.scores["cache_bytes"].null_count()
    if unmeasured:
        yield f"for {unmeasured} of {results.scores.height} answers the bytes of the cache could not be measured."


def _named(cells: pl.DataFrame) -> str:
    rows = cells.sort("mode", "policy", "budget", "bin").to_dicts()
    names = [
        f"{r['policy']} at {labels.budget(r['budget'])} {labels.mode(r['mode'])}, {tokens_of(r)} tokens (n = {r['n']})"
        for r in rows[:NAMED]
    ]
    more = len(rows) - NAMED
    return "; ".join(names) + (f"; and {more} more" if more > 0 else "")


def _identical(results: Results) -> Iterable[tuple[str, str, str, str, int]]:
    """Yield (task, mode, policy, budget, n) whose scores equal the full cache's, example by example."""
    unit = ["task", "mode", "bin", "example_id", "repeat"]
    full = results.scores.filter(**FULL).select(*unit, reference="score")
    pairs = results.scores.filter(pl.col("policy") != FULL["policy"]).join(full, on=unit)
    found = pairs.group_by("task", "mode", "policy", "budget").agg(
        same=(pl.col("score") == pl.col("reference")).all(ignore_nulls=False), n=pl.col("example_id").n_unique()
    )
    same = found.filter(pl.col("same").fill_null(False)).drop("same")
    yield from same.sort("task", "mode", "policy", "budget").rows()
