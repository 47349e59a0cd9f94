"""Test budgets at equal bytes: K such that all policies hold the same bytes over an answer."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import engine, tokens
from simulated_scores import cell_rows, table

from kv_transition.budget import Budget
from kv_transition.cache.store import PrefillStore
from kv_transition.run.matched import Course, entries, settled
from kv_transition.stats import paired
from kv_transition.studies.grid import equal_bytes
from kv_transition.studies.grid import run as cell
from kv_transition.studies.grid.analysis.aggregate import Statistics, bin_stats, comparisons
from kv_transition.studies.grid.analysis.transition import transitions
from kv_transition.studies.grid.results import Results

SPEC = {
    "mode": "before_question", "policy": "mine", "hyper_parameters": {}, "budget": "r0.5", "first_token": "compressed",
    "decoding": {"temperature": 0.0, "repeats": 1, "batch": 4, "seed": 0},
}  # fmt: skip


def held(k: int, course: Course, acts_each_step: bool) -> list[int]:
    """Return the number of entries before each token."""
    now, seen = (k, []) if acts_each_step else (k + course.follow, [])
    for _ in range(course.steps):
        seen.append(now)
        now += not acts_each_step
    return seen


@given(st.integers(200, 3000), st.integers(0, 60), st.integers(1, 120), st.sampled_from(["r0.5", "r0.2", "t128"]),
       st.sampled_from(["mean", "final"]))  # fmt: skip
def test_both_kinds_hold_the_same_over_the_answer(n, follow, steps, budget, match):
    course, found = Course(n, follow, steps), []
    for acts in (True, False):
        k = entries(Budget.parse(budget), course, match, acts_each_step=acts)
        seen = held(k, course, acts)
        found.append((k, np.mean(seen) if match == "mean" else seen[-1]))
    full = [n + follow + i for i in range(steps)]
    share = Budget.parse(budget)
    wanted = (np.mean(full) if match == "mean" else full[-1]) * float(share.fraction) if share.fraction else 128
    if found[1][0] > 1:  # otherwise question and answer alone exceed the budget
        assert [value for _, value in found] == pytest.approx([wanted, wanted], abs=0.5 + 1e-9)


def test_an_answer_is_repeated_until_its_k_fits_its_length():
    asked = []

    def answer(steps):
        asked.append(steps)
        return 5 if steps > 4 else 3

    assert settled(answer, lambda got: got, lambda steps: 100 - steps // 2, 8) == 5
    assert asked == [8, 5]
    turning = settled(lambda steps: 20 - steps, lambda got: got, lambda steps: steps, 8)
    assert turning in (8, 12)  # the values alternate, and the loop ends


class Words:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("match", ["mean", "final"])
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_cells_hold_equal_shares_of_a_full_cache(match, mode, monkeypatch, tmp_path):
    model = engine("qwen2")
    monkeypatch.setattr(model, "tokenizer", Words())
    examples = [
        {
            "task": "t", "example_id": f"e{i}", "bin": 0, "prompt_sha256": f"sha{i}", "prompt_len": 212,
            "context_ids": tokens(200, seed=i), "question_ids": tokens(12, seed=9), "max_new_tokens": 30,
        }
        for i in range(2)
    ]  # fmt: skip
    shares, gaps = {}, {}
    for chosen in (match, "none"):
        for kind in ("h2o", "streaming_llm", "snapkv", "random"):
            spec = SPEC | {"kind": kind, "mode": mode, "match": chosen}
            rows = cell.rows(model, examples, spec, PrefillStore(tmp_path / "model"))
            share = np.array([row[f"kept_{match}"] / row[f"full_{match}"] for row in rows])
            (shares if chosen == match else gaps)[kind] = share
            assert all(row["steps"] >= row["completion_tokens"] > 0 for row in rows)
    for kind, share in shares.items():
        assert share == pytest.approx(np.full(2, 0.5), rel=0.01), kind
    # without matched budgets, policies that compress once hold more
    assert (gaps["snapkv"] > 1.05 * gaps["h2o"]).all()


def results(n=40):
    """Return two policies with the same curve of score against bytes; at each budget one holds 20 % more than the
    other."""
    rng, rows, none = np.random.default_rng(0), [], np.zeros((n, 1), bool)
    rank = rng.permutation(n)[:, None] / n
    rows += cell_rows(np.ones((n, 1)), none)
    for policy, more in (("thrifty", 1.0), ("lavish", 1.2)):
        for budget, share in (("r0.5", 0.5), ("r0.2", 0.2)):
            own = cell_rows(np.where(rank < share * more, 1.0, 0.0), none, policy=policy, budget=budget)
            rows += [row | {"cache_bytes": int(share * more * row["full_bytes"])} for row in own]
    scores, how = table(rows), Statistics(resamples=100)
    tables = (scores, *(of(scores, how) for of in (bin_stats, comparisons, transitions)))
    return Results(*(pl.from_arrow(t) for t in tables))


def test_who_holds_more_loses_its_lead_at_equal_bytes():
    found = {
        (row["policy"], row["budget"]): row for row in equal_bytes.rankings(results(), "reader_qa", "after_prompt")
    }
    for budget, at in (("r0.5", 0.6), ("r0.2", 0.24)):
        thrifty, lavish = found["thrifty", budget], found["lavish", budget]
        assert thrifty["unequal"]
        assert lavish["unequal"]
        assert (lavish["rank"], thrifty["rank"]) == (1, 2)
        assert lavish["at"] == pytest.approx(at, abs=0.01)
        assert lavish["matched"] == lavish["kept"]
        assert thrifty["kept"] == pytest.approx(float(budget[1:]), abs=0.03)
        assert thrifty["matched"] == pytest.approx(lavish["matched"], abs=0.03)
        assert thrifty["matched_low"] < lavish["matched"] < thrifty["matched_high"]


def test_a_pair_is_flagged_and_compared_at_the_larger_footprint():
    data = results()
    of = equal_bytes.curve(data, "reader_qa", "after_prompt")
    row = equal_bytes.difference(of, "r0.5", "lavish", "thrifty", 0.95)
    assert row["shares"] == pytest.approx([0.6, 0.5], abs=0.01)
    assert equal_bytes.apart(*row["shares"])
    assert not equal_bytes.apart(0.5, 0.505)
    plain = paired.difference((of.scores["lavish", "r0.5"] - of.scores["thrifty", "r0.5"])[None])
    assert plain.estimate[0] == pytest.approx(0.1, abs=0.01)
    assert row["estimate"] == pytest.approx(0, abs=0.03)
    assert of.at("thrifty", 0.1) is None  # the curve is not extrapolated
