"""Regression tests for contradictions that a reviewer found on the first screen of the report.

They read tables and the rendered page and use no function that was added with the fix, so that they also run on the
code before it.
"""

from __future__ import annotations

import html
import re

import numpy as np
import polars as pl
import pytest
from models import engine, tokens
from simulated_scores import cell_rows, table

from kv_transition.cache.store import PrefillStore
from kv_transition.report import page
from kv_transition.stats.examples import Statistics
from kv_transition.studies.grid import run as cell
from kv_transition.studies.grid.analysis.aggregate import bin_stats
from kv_transition.studies.grid.analysis.comparisons import comparisons
from kv_transition.studies.grid.analysis.transition import transitions
from kv_transition.studies.grid.report import headline, sections
from kv_transition.studies.grid.results import Results

HOW = Statistics(resamples=200)
OUTCOME = re.compile(r"no loss|loss (?:shown|from)|unstable|stable|collapsed|undecided|cliff|not compared")


def scores_of(kept: dict[str, tuple[float, ...]], n: int):
    """Return scores of a full cache that is always right, and of policies with these shares of right answers per bin of
    ``n``."""
    rows, none, index = [], np.zeros((n, 1), bool), np.arange(n)[:, None]
    for bin in range(len(next(iter(kept.values())))):
        rows += cell_rows(np.ones((n, 1)), none, bin=bin, length=256 * (bin + 1))
        for policy, shares in kept.items():
            right = (index < round(shares[bin] * n)).astype(float)
            rows += cell_rows(right, none, policy=policy, budget="r0.5", bin=bin, length=256 * (bin + 1))
    return table(rows)


def screen(scores) -> tuple[str, list[str], pl.DataFrame]:
    """Return the headline with the text that follows it, the text of each cell, and the rows of the transition
    table."""
    tables = [pl.from_arrow(t) for t in (scores, *(of(scores, HOW) for of in (bin_stats, comparisons, transitions)))]
    states = getattr(sections, "states", dict)()
    text = (
        page.environment(html=True)
        .get_template("verdict.html.jinja")
        .render(verdicts=headline.verdicts(Results(*tables)), states=states, kept="95 %")
    )

    def plain(part: str) -> str:
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).replace("\u00a0", " ").split())

    lead = plain(re.search(r'class="answer">(.*?)</p>', text, re.DOTALL)[1])
    return lead, [plain(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", text, re.DOTALL)], tables[3]


def test_no_interval_holds_0_beside_a_p_value_that_excludes_it():
    """Check a small loss in twelve of forty answers, where p was below 0.001 and the interval contained 0."""
    n, none = 40, np.zeros((40, 1), bool)
    little = np.where(np.arange(n)[:, None] < 12, 0.95, 1.0)
    rows = cell_rows(np.ones((n, 1)), none) + cell_rows(little, none, policy="snapkv", budget="r0.5")
    frame = pl.from_arrow(comparisons(table(rows), HOW)).filter(statistic="score").drop_nulls("p_value")
    assert frame.height == 2
    for row in frame.iter_rows(named=True):
        apart = row["ci_high"] < 0 or row["ci_low"] > 0
        assert apart == (row["p_value"] < 0.05), row


def test_each_cell_has_one_word_and_the_transition_has_the_same():
    kept = {"none": (1.0, 1.0), "late": (1.0, 0.8), "worse": (0.85, 0.6), "gone": (0.3, 0.1)}
    _, cells, found = screen(scores_of(kept, 40))
    assert len(cells) == len(kept)
    words = {re.sub(r"\W", " ", OUTCOME.search(text)[0]).split()[-1] for text in cells}
    for text in cells:
        assert len(OUTCOME.findall(text)) == 1, text
    for row in found.filter(detector="definition").iter_rows(named=True):
        assert sum(row["outcome"] in text for text in cells), row["outcome"]
    assert len(words) > 1


def test_the_headline_tells_too_few_examples_from_a_loss():
    """Check one loss in ten answers, which neither shows nor excludes a loss, and then losses in most answers."""
    few = {"snapkv": (0.9, 1.0), "h2o": (0.9, 1.0)}
    lead, *_ = screen(scores_of(few, 10))
    assert "too few examples" in lead
    assert re.search(r"about \d+ would decide", lead), lead
    lost, *_ = screen(scores_of({"snapkv": (0.2, 0.1), "h2o": (0.3, 0.2)}, 40))
    assert "too few" not in lost
    assert "shows a loss" in lost or "loss is shown" in lost


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_one_budget_is_one_number_of_bytes(mode, monkeypatch, tmp_path):
    """Check that policies of both kinds hold equal bytes over an answer if matched budgets are requested."""

    class Words:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    model = engine("qwen2")
    monkeypatch.setattr(model, "tokenizer", Words())
    example = {
        "task": "t", "example_id": "e", "bin": 0, "prompt_sha256": "sha", "prompt_len": 212, "max_new_tokens": 60,
        "context_ids": tokens(200, seed=0), "question_ids": tokens(12, seed=9),
    }  # fmt: skip
    held = {}
    for kind in ("h2o", "streaming_llm", "snapkv", "random"):
        spec = {
            "mode": mode, "policy": "mine", "kind": kind, "hyper_parameters": {}, "budget": "r0.5", "match": "mean",
            "first_token": "compressed", "decoding": {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0},
        }  # fmt: skip
        (row,) = cell.rows(model, [example], spec, PrefillStore(tmp_path / kind))
        # answers may differ in length, so the bytes are relative to those of a full cache over the same steps
        start = 212 - (mode == "after_prompt")
        held[kind] = row["kept_mean"] / (start + row["completion_tokens"] / 2)
    assert max(held.values()) <= 1.02 * min(held.values()), held
