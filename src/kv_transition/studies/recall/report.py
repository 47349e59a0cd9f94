"""The report section on entropy and recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl

from kv_transition import labels
from kv_transition.labels import p_value
from kv_transition.report.numbers import DASH, Number, listed, number, sentence
from kv_transition.report.section import Section
from kv_transition.studies.recall import moments as recall_moments
from kv_transition.studies.recall import plots as entropy_recall_plots
from kv_transition.studies.recall.plots import GRANULARITY, KEY, PREFERRED
from kv_transition.studies.recall.verdict import AFTER_CONTROLLING, CONFIRMED, NOT_CONFIRMED, UNDECIDED

if TYPE_CHECKING:
    from kv_transition.report.section import Source

FIGURES = {
    "entropy_bins": ("Recall by entropy", "Mean recall of steps of low, medium and high entropy, one line per budget."),
    "entropy_scatter": ("Steps", "Entropy and recall of single steps, with the least-squares line of each budget."),
    "recall_moments": ("Recalling", "Score against bytes moved, hot and total: the policy that recalls, its controls, "
                       "its bounds."),
}  # fmt: skip
ORACLE = "oracle"  # an upper bound: it uses the attention of the step itself
CELL = (*KEY[:2], "budget", *KEY[2:])
SHOWN = ("recall_low", "recall_high", "pearson", "partial", "auroc")
CONTROLS = ("pearson_within", "spearman_within", "partial_step", "partial_length", "partial_kind", "partial")
Row = dict[str, Any]


def build(source: Source) -> dict[str, Any] | None:
    """Return the content of the section; None if nothing was observed and no policy recalled.

    ``source.extra``: ``entropy_recall`` (tables.ENTROPY_RECALL) and ``recall_moments`` (tables.COMPARISONS).
    """
    table, moments = source.extra.get("entropy_recall"), source.extra.get("recall_moments")
    observed = table is not None and table.height > 0
    recalled = moments is not None and moments.height > 0
    if not observed and not recalled:
        return None
    confidence = source.results.confidence
    found = {"observed": observed, "lead": "", "groups": [], "confounders": [], "sensitivity": []}
    if observed:
        found |= {
            "lead": _lead(table),
            "groups": _groups(table),
            "confounders": _confounders(table),
            "sensitivity": _sensitivity(table),
            "chart": entropy_recall_plots.bins_explorer(table, confidence),
        }
    policies = (source.experiment.get("kv") or {}).get("policies") or {}
    return found | {"moments": _moments(moments, policies, 1 - confidence) if recalled else None}


def _source(row: Row) -> str:
    return "/".join(("entropy_recall", *(str(row[k] or "all") for k in CELL), row["statistic"]))


def _number(row: Row | None, digits: int = 2, signed: bool = False) -> Number:
    """Return an estimate with its interval; a dash without an interval."""
    if row is None or (row["ci_low"] is None and row["ci_high"] is None):
        return Number(DASH)
    found = number(row, "", digits, signed=signed, source=_source(row))
    return replace(found, text=found.text.replace("-", "−"))


def _lead(table: pl.DataFrame) -> str:
    """Return the overall answer in one or two sentences, over all cells except the oracle's."""
    verdicts = table.filter(pl.col("policy") != ORACLE, statistic="verdict_controlled")
    counts = Counter(verdicts["outcome"].to_list())
    whole = verdicts.height
    if not whole:
        return "Only the oracle was observed, whose recall is 1."
    names = {
        CONFIRMED: "confirmed for",
        NOT_CONFIRMED: "not confirmed for",
        AFTER_CONTROLLING: "not confirmed with step, length and kind of prompt held constant for",
        UNDECIDED: "undecided for",
    }
    parts = [f"{text} {counts[outcome]}" for outcome, text in names.items() if counts[outcome]]
    return (
        f"The hypothesis that high entropy shows when a cache lacks a needed entry is {listed(parts)} of {whole} "
        "combinations of policy, budget, granularity and memory."
    )


def _groups(table: pl.DataFrame) -> list[Row]:
    """Return a table for each task, granularity and memory, the study's own form first."""
    keys = table.select("task", "granularity", "memory").unique().rows()
    several, groups = len({key[0] for key in keys}) > 1, []
    for task, granularity, memory in sorted(keys, key=lambda k: (k[0], PREFERRED.index(k[1:]))):
        own = table.filter(task=task, granularity=granularity, memory=memory).drop_nulls("budget")
        cells = {key: _by_statistic(rows) for key, rows in own.group_by("policy", "budget")}
        rows = []
        for policy, budget in sorted(cells, key=lambda k: (k[0] == ORACLE, k[0], labels.budget_order(k[1]))):
            cell = cells[policy, budget]
            raw, after = cell["verdict"], cell["verdict_controlled"]
            rows.append({
                "policy": policy, "budget": labels.budget(budget), "outcome": after["outcome"],
                "raw": raw["outcome"], "reason": sentence(after["reason"]), "n": _counted(after),
                "steps": after["steps"],
                "cells": [_number(cell.get(name), signed=name.startswith(("p",))) for name in SHOWN],
                "controls": [_number(cell.get(name), signed=True) for name in CONTROLS],
                "trend_p": p_value(cell["trend"]["p_holm"]) if "trend" in cell else DASH,
            })  # fmt: skip
        heading = f"{GRANULARITY[granularity]}, {memory} memory"
        groups.append({"heading": f"{task}: {heading}" if several else sentence(heading), "rows": rows})
    return groups


def _by_statistic(rows: pl.DataFrame) -> dict[str, Row]:
    return {row["statistic"]: row for row in rows.iter_rows(named=True)}


def _confounders(table: pl.DataFrame) -> list[Row]:
    """Return the other variables that correlate with entropy, per task. They are equal in every cell, so the first is
    used.
    """
    found = []
    for task in table["task"].unique().sort():
        own = table.filter(task=task).drop_nulls("budget")
        first = own.select(CELL).row(0)
        cell = _by_statistic(own.filter(**dict(zip(CELL, first, strict=True))))
        rows = [
            {"name": text, "value": _number(cell.get(f"entropy_on_{name}"), signed=True),
             "why": (cell.get(f"entropy_on_{name}") or {}).get("method") or ""}
            for name, text in (("step", "correlation of entropy with the step"),
                               ("length", "correlation of entropy with the length of the cache"))
        ]  # fmt: skip
        for name, row in cell.items():
            if name.startswith("entropy_of_kind:"):
                kind = name.partition(":")[2]
                rows.append({"name": f"mean entropy, {kind or 'no kind'}, nats", "value": _number(row), "why": ""})
        found.append({"task": task, "rows": rows})
    return found


def _sensitivity(table: pl.DataFrame) -> list[Row]:
    own = table.filter(pl.col("budget").is_null(), pl.col("policy") != ORACLE)
    rows = []
    for key in entropy_recall_plots.chosen(own):
        cell = _by_statistic(own.filter(**dict(zip(KEY, key, strict=True))))
        plain, corrected = cell["sensitivity"], cell["sensitivity_corrected"]
        said = f"{_steeper(plain)}; corrected for chance: {_steeper(corrected)}."
        numbers = [_number(cell[name], 3, signed=True) for name in ("sensitivity", "sensitivity_corrected")]
        row = {"task": key[0], "policy": key[1], "n": _counted(plain), "said": sentence(said)}
        rows.append(row | {"numbers": numbers})
    return rows


def _counted(row: Row) -> str:
    return labels.count(row["n"], row["clusters"]).removeprefix("n = ")


def _steeper(row: Row) -> str:
    if row["ci_low"] is None or row["ci_high"] is None:
        return row["method"]
    if row["ci_low"] <= 0 <= row["ci_high"]:
        return "no difference between budgets is shown"
    return f"recall falls {'faster' if row['ci_low'] > 0 else 'more slowly'} at smaller budgets"


def _moments(table: pl.DataFrame, policies: Mapping[str, Any], alpha: float) -> Row:
    """Return a sentence for each control of chance, and a row for each comparison."""
    how = recall_moments.moments_of(policies)
    key = ["task", "mode", "policy", "reference_policy", "budget"]
    answers, rows = [], []
    cells = {names: _by_statistic(own) for names, own in table.group_by(key)}
    order = {name: i for i, name in enumerate((*recall_moments.CHANCE, *recall_moments.BOUNDS))}
    for names in sorted(cells, key=lambda k: (*k[:3], order.get(how.get(k[3]), len(order)), labels.budget_order(k[4]))):
        cell, named = cells[names], dict(zip(key, names, strict=True))
        score, other = cell["score"], named["reference_policy"]
        source = "/".join(("recall_moments", *names, "score"))
        chosen = how.get(other, other)
        if chosen in recall_moments.CHANCE:
            kept = f"{labels.budget(named['budget'])} kept, {labels.mode(named['mode'])}"
            answers.append(f"{named['policy']}, {kept}: {recall_moments.answer(score, chosen, alpha)}")
        rows.append({
            "mode": labels.mode(named["mode"]), "task": named["task"], "policy": named["policy"],
            "budget": labels.budget(named["budget"]), "other": other if other == chosen else f"{other} ({chosen})",
            "score": number(score, "", 3, signed=True, source=source),
            "p": labels.tested(score) if chosen in recall_moments.CHANCE else DASH,
            "triggers": number(cell["triggers"], "", 1, signed=True, source=source[:-5] + "triggers"),
            "moved": _mebibytes(cell["moved_bytes"], source[:-5] + "moved_bytes"), "n": score["n"],
        })  # fmt: skip
    return {"answers": answers, "rows": rows}


def _mebibytes(row: Row, source: str) -> Number:
    scaled = row | {k: None if row[k] is None else row[k] / 2**20 for k in ("estimate", "ci_low", "ci_high")}
    return number(scaled, "", 2, signed=True, source=source)


SECTIONS = (Section("entropy_recall", "Entropy and recall", build),)
