"""The analysis and the report section of lm-evaluation-harness's tasks: scores, and differences from the full cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata, rows_to_table, write_table
from kv_transition.report.numbers import DASH, Number, number
from kv_transition.report.section import Section, Source
from kv_transition.stats import frames, intervals, paired
from kv_transition.stats.examples import FULL, inherited
from kv_transition.stats.intervals import finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.harness.plots import FIGURE, METRIC, named
from kv_transition.studies.harness.tables import HARNESS

Row = dict[str, Any]


def write_harness(measured: Sequence[str], output: str, expected: Mapping[str, str], confidence: float) -> None:
    """Write tables.HARNESS from the jobs' files; ``expected``: the hash that each file must have.

    Raises UserError if a file was computed with other settings.
    """
    facts = [json.loads(read_metadata(path)["harness"]) for path in measured]
    for path, found in zip(measured, facts, strict=True):
        if found["harness_hash"] != expected[path]:
            raise UserError(f"{path} was computed with other settings; delete it and run again")
    documents = pl.concat([frames.read_parquet(path) for path in measured])
    rows = [row for found in facts for row in _rows(found, documents, confidence)]
    adjust(rows)
    kept = [{key: value for key, value in row.items() if key in HARNESS.names} for row in rows]
    about = inherited(measured[0])
    facts_of_all = {"harness_version": facts[0]["version"], "confidence": confidence}
    drop = ("harness", "kind", "hyper_parameters")
    write_table(output, rows_to_table(kept, HARNESS), {k: v for k, v in about.items() if k not in drop} | facts_of_all)


def _rows(found: Row, documents: pl.DataFrame, confidence: float) -> Iterator[Row]:
    """Yield the scores of one job, each with its difference from the full cache on the same documents."""
    full = found["policy"] == FULL["policy"]
    key = {"mode": found["mode"], "policy": found["policy"], "budget": found["budget"]}
    for score in found["scores"]:
        metric = {name: score[name] for name in METRIC}
        row = score | key | {"mode": None if full else found["mode"]}
        if not full:
            of_metric = documents.filter(**metric)
            reference = of_metric.filter(**FULL)
            both = (
                of_metric.filter(**key).join(reference, on="doc_id", suffix="_full").drop_nulls(["value", "value_full"])
            )
            row |= compared(both, confidence, "/".join(metric.values()))
        yield row


def compared(both: pl.DataFrame, confidence: float, family: str) -> Row:
    """Return the mean of ``value - value_full`` over documents with its interval, and a p-value for scores in [0, 1].

    Scores in [0, 1] use the project's paired inference (docs/statistics.md); other scores use Student's t without a
    p-value.
    """
    if not both.height:
        return {"paired": 0}
    values = both.select("value", "value_full").to_numpy()
    differences = (values[:, 0] - values[:, 1])[None]
    if values.min() >= 0 and values.max() <= 1:
        test = paired.difference(differences)
        own, tested = test.interval(confidence), {"p_value": finite(test.p[0]), "family": family}
    else:
        own, tested = intervals.mean(differences, confidence), {}
    row = own.row(0)
    return {
        "difference": row["estimate"], "difference_low": row["ci_low"], "difference_high": row["ci_high"],
        "paired": row["n"], "method": row["method"],
    } | tested  # fmt: skip


def build(source: Source) -> dict[str, Any] | None:
    """Return the section's content; None if no task of the harness was run. ``source.extra["harness"]``: HARNESS."""
    table = source.extra.get("harness")
    if table is None or table.is_empty():
        return None
    columns = ["Policy", "Kept", "Mode", "Score", "n", "Difference from full", "p", "Pairs"]
    tables = []
    for metric in table.select(METRIC).unique(maintain_order=True).iter_rows():
        own = table.filter(**dict(zip(METRIC, metric, strict=True))).to_dicts()
        tables.append({
            "heading": _heading(metric, own[0]["higher_is_better"]), "columns": columns,
            "rows": [_shown(row) for row in sorted(own, key=_order)],
        })  # fmt: skip
    return {
        "sentences": [
            "Prompts, scores and standard errors (after ±) are those of lm-evaluation-harness; n is the number of its "
            "documents. The difference is the policy's mean score minus that of the full cache on the same documents, "
            "with the interval of the paired test. The adjusted p-value is Holm's over the policies, budgets and modes "
            "of a task and metric.",
        ],
        "figures": list(FIGURES),
        "tables": tables,
    }


def _heading(metric: Sequence[str], higher: bool | None) -> str:
    return named(*metric) + ("" if higher is None else f", {'higher' if higher else 'lower'} is better")


def _order(row: Mapping[str, Any]) -> tuple:
    return (row["policy"] != FULL["policy"], row["mode"] or "", labels.budget_order(row["budget"]), row["policy"])


def _shown(row: Mapping[str, Any]) -> list[Any]:
    full = row["policy"] == FULL["policy"]
    origin = "/".join(("harness", *(str(row[key]) for key in (*METRIC, "mode", "policy", "budget"))))
    error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
    n = row["n"] or 0
    difference = {"estimate": row["difference"], "ci_low": row["difference_low"], "ci_high": row["difference_high"]}
    difference |= {"n": row["paired"], "method": row["method"]}
    return [
        row["policy"],
        labels.kept(row["policy"], row["budget"]),
        DASH if full else labels.mode(row["mode"]),
        Number(f"{labels.number(row['score'], 3)}{error}", n, origin, "standard error of lm-evaluation-harness"),
        row["n"] or DASH,
        "the reference" if full else number(difference, "harness", 3, signed=True, source=origin),
        DASH if row["p_value"] is None else labels.tested(row),
        DASH if full else row["paired"],
    ]


SECTIONS = (Section("harness", "Tasks of lm-evaluation-harness", build),)
FIGURES = {
    FIGURE: ("Scores against what is kept", "The harness's own scores, with normal intervals from its standard errors; "
             "grey is the full cache."),
}  # fmt: skip
