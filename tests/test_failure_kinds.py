"""Test that abstentions (“unknown”) and broken answers are counted separately, and that both are failures."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from simulated_scores import cell_rows, table

from kv_transition.eval.failures import LABELS, failure
from kv_transition.labels import HONEST
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid.analysis.aggregate import bin_stats, comparisons
from kv_transition.studies.grid.analysis.transition import transitions
from kv_transition.studies.grid.plots import failure_rows
from kv_transition.studies.grid.report import findings, sections
from kv_transition.studies.grid.results import Results

LOST = ["ABSTAIN"] * 6 + ["EMPTY_OUTPUT"] * 3 + ["TRUNCATED"] + [None] * 10


@pytest.fixture(scope="module")
def results():
    n, none = len(LOST), np.zeros((len(LOST), 1), bool)
    rows = cell_rows(np.ones((n, 1)), none)
    own = cell_rows(np.ones((n, 1)), none, policy="h2o", budget="r0.5")
    rows += [row | {"failure": label, "score": float(label is None)} for row, label in zip(own, LOST, strict=True)]
    scores, how = table(rows), Statistics(resamples=100)
    tables = (scores, *(of(scores, how) for of in (bin_stats, comparisons, transitions)))
    return Results(*(pl.from_arrow(t) for t in tables))


def test_what_is_honest_is_what_scoring_calls_an_abstention():
    """Check that the labels of honest failures are those that scoring gives to abstentions."""
    assert failure("The text does not say.", ["Paris"]) in HONEST
    assert failure("", ["Paris"]) not in HONEST
    assert set(HONEST) < set(LABELS)


def test_the_curves_have_both_kinds_and_they_add_up(results):
    for statistic, share in (("failure_rate", 0.5), ("abstention_rate", 0.3), ("broken_rate", 0.2)):
        row = results.stat("reader_qa", "after_prompt", "h2o", "r0.5", 0, statistic)
        assert row["estimate"] == pytest.approx(share)
        assert row["ci_low"] < share < row["ci_high"]


def test_table_and_findings_say_both(results):
    (part,) = sections.failures(results)
    row = next(row for row in part["rows"] if row["name"].startswith("h2o"))
    assert [str(row[name]).split()[0] for name in ("rate", "unknown", "broken")] == ["0.50", "0.30", "0.20"]
    assert failure_rows(results)[1][1]["broken"]["n"] == 20
    (group,) = findings.findings(results)
    said = next(s for s in group["sentences"] if "answers failed" in s)
    assert "10 of 40 answers failed: 6 say “unknown” although the document contains the answer, 4 are broken" in said
    assert "most often as “empty output” (3)" in said
