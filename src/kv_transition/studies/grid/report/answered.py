"""The content of the report on the answers to tasks."""

from __future__ import annotations

from typing import Any

from kv_transition.report.section import Source
from kv_transition.studies.grid import plots, tradeoff
from kv_transition.studies.grid.report import bytes_tables, card, findings, headline, sections
from kv_transition.studies.grid.report.answers import examples
from kv_transition.studies.grid.results import Results

CLOCKS = {
    "process": "Times are CPU seconds of the one thread that a job runs on, so other processes do not affect them.",
    "wall": "Times are wall-clock times of answers during which nothing else ran on the device.",
}


def answered(source: Source, results: Results) -> dict[str, Any]:
    """Return the values that the templates ``grid``, ``verdict`` and ``answers`` show."""
    return {
        "verdicts": headline.verdicts(results),
        "findings": findings.findings(results),
        "oddities": findings.oddities(results),
        "costs": sections.costs(results),
        "front": sections.front(results),
        "equal_bytes": bytes_tables.tables(results),
        "differences": sections.differences(results),
        "between": sections.between(results, source.extra.get("pairs")),
        "smallest": sections.smallest(results, source.extra.get("smallest_budgets")),
        "along_budgets": sections.along_budgets(results, source.extra.get("budget_transition")),
        "failures": sections.failures(results),
        "transitions": sections.transitions(results),
        "states": sections.states(),
        "bin_tables": sections.bin_tables(results),
        "card": card.table(card.matched_budget(results, source.experiment, source.metadata)),
        "examples": examples(results),
        "clock": CLOCKS.get(source.metadata.get("clock", ""), CLOCKS["wall"]),
        "charts": {
            "explorer": plots.interactive(results),
            "differences": tradeoff.difference_explorer(results),
            "front": tradeoff.front_explorer(results),
        },
    }
