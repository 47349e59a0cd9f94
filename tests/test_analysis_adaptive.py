"""Test adaptive allocation: alpha spending over looks, bins that get more examples, and when it stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from kv_transition.errors import UserError
from kv_transition.provenance import rows_to_table
from kv_transition.stats import intervals
from kv_transition.studies.grid.analysis import adaptive
from kv_transition.studies.grid.analysis.adaptive import Adaptive, allocate
from kv_transition.studies.grid.tables import ALLOCATION, TRANSITION

PLAN = Adaptive(enabled=True, start=5, step=5, cap=20)


def transition(onset, collapse=None, outcome="zone", opened=(), blind=(), fallen=None, policy="snapkv"):
    """Return a row of the transition table with these bootstrap probabilities over the bins; the remaining probability
    is "none"."""
    collapse = collapse or [0.0] * len(onset)
    bins = [
        {
            "bin": b,
            "probability_onset": p,
            "probability_collapse": q,
            "open": b in opened,
            "blind": b in blind,
            "full_mean": 1.0,
        }
        for b, (p, q) in enumerate(zip(onset, collapse, strict=True))
    ]
    details = {"bins": bins, "probability_no_onset": 1 - sum(onset), "probability_no_collapse": 1 - sum(collapse)}
    return {
        "task": "qa", "mode": "after_prompt", "policy": policy, "budget": "r0.2", "detector": "definition",
        "outcome": outcome, "collapse_bin": fallen, "details": json.dumps(details),
    }  # fmt: skip


def decide(*rows, have=(5, 5, 5), available=(50, 50, 50), plan=PLAN, look=0):
    table = rows_to_table(rows, TRANSITION)
    n = {("qa", b): v for b, v in enumerate(have)}
    return allocate([table], n, {("qa", b): v for b, v in enumerate(available)}, plan, look)


def test_boundaries_are_the_published_ones():
    # five equally spaced looks, two-sided alpha 0.05, O'Brien-Fleming-type spending (Lan and DeMets 1983; ldbounds)
    found = norm.isf(np.array(adaptive.levels((1, 2, 3, 4, 5), 0.05)) / 2)
    assert found == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)


def test_a_single_look_costs_nothing():
    """Check that an experiment with one look keeps the confidence of 95 %."""
    assert adaptive.confidence(Adaptive(start=40, cap=40), 0) == pytest.approx(0.95)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(2, 20), st.integers(0, 60), st.sampled_from([0.01, 0.05, 0.1]))
def test_alpha_is_spent_slowly_and_never_exceeded(start, step, more, alpha):
    sizes = Adaptive(start=start, step=step, cap=start + more).sizes
    assert (sizes[0], sizes[-1]) == (start, start + more)
    levels = adaptive.levels(sizes, alpha)
    assert all(0 < level <= alpha + 1e-9 for level in levels)
    # alpha is the probability that any look errs: at least that of one look, at most the sum over all looks
    assert max(levels) <= alpha + 1e-9 <= sum(levels) + 2e-9
    assert adaptive.spent(1, alpha) == pytest.approx(alpha)


def test_the_looks_together_keep_the_level_and_plain_ones_do_not():
    rng, plan = np.random.default_rng(0), Adaptive(start=10, step=10, cap=80)
    data = (rng.random((3000, plan.cap)) < 0.3).astype(float)
    held = []
    for spending in (True, False):
        inside = np.ones(len(data), bool)
        for look, n in enumerate(plan.sizes):
            found = intervals.bounded_mean(data[:, :n], adaptive.confidence(plan, look) if spending else 0.95)
            inside &= (found.low <= 0.3) & (found.high >= 0.3)
        held.append(inside.mean())
    assert held[0] >= 0.945
    assert held[1] < 0.90


def test_only_open_bins_get_more():
    found = decide(transition([0, 0.5, 0.45]))
    assert found.schema.names == ALLOCATION.names
    assert found.column("wanted").to_pylist() == [5, 10, 10]
    reasons = found.column("reason").to_pylist()
    assert reasons[0].startswith("decided in this bin")
    assert "snapkv at 20 %" in reasons[1]


def test_a_zone_one_bin_wide_is_decided():
    found = decide(transition([0, 0.97, 0.03], [0, 0, 0.99]))
    assert found.column("wanted").to_pylist() == [5, 5, 5]


def test_the_absence_of_a_collapse_is_a_place_too():
    """Check that a bin gets more examples while the probability of no collapse is still open."""
    found = decide(transition([0, 1.0, 0], [0, 0, 0.6]))
    assert found.column("wanted").to_pylist() == [5, 5, 10]


def test_undecided_outcomes_open_the_bins_that_they_name():
    found = decide(transition([0, 0, 0], outcome="undecided", opened=(0, 2)))
    assert found.column("wanted").to_pylist() == [10, 5, 10]


def test_one_open_policy_is_enough_and_all_are_counted():
    rows = [transition([1.0, 0, 0]), transition([0, 0.5, 0], policy="h2o"), transition([0.5, 0.5, 0], policy="tova")]
    found = decide(*rows).to_pylist()
    assert [row["wanted"] for row in found] == [10, 10, 5]
    assert "2 policies and budgets" in found[1]["reason"]


def test_the_end_of_data_and_the_cap_stop():
    found = decide(transition([0.3, 0.3, 0.3]), have=(18, 20, 7), available=(50, 50, 7), look=1).to_pylist()
    assert [row["wanted"] for row in found] == [20, 20, 7]
    assert "cap of 20" in found[1]["reason"]
    assert "no more examples" in found[2]["reason"]
    last = decide(transition([0.3, 0.3, 0.3]), have=(15, 15, 15), look=3)
    assert last.column("wanted").to_pylist() == [15, 15, 15]


@settings(deadline=None)
@given(st.lists(st.floats(0, 0.33), min_size=3, max_size=3), st.lists(st.integers(1, 30), min_size=3, max_size=3))
def test_it_ends(onset, available):
    have = [min(PLAN.start, n) for n in available]
    for look in range(len(PLAN.sizes)):
        wanted = decide(transition(onset), have=have, available=available, look=look).column("wanted").to_pylist()
        assert all(n <= w <= min(PLAN.cap, a) or w == n for n, w, a in zip(have, wanted, available, strict=True))
        if wanted == have:
            return
        have = wanted
    pytest.fail("the last look asked for more")


def test_a_plan_that_cannot_start_is_named():
    with pytest.raises(UserError, match="start 50, step 5 and cap 20"):
        Adaptive(start=50, cap=20)


def test_no_onset_is_no_finding_where_no_test_could_find_one():
    """Check that bins with too few examples for any test to find an onset get more examples."""
    found = decide(transition([0, 0, 0], [0, 0, 1.0], outcome="cliff", blind=(0, 1, 2), fallen=2))
    assert found.column("wanted").to_pylist() == [10, 10, 5]
    assert "too few examples" in found.column("reason")[0].as_py()


def test_what_is_open_by_either_table_gets_more():
    """Check that a bin that is open in one of several transition tables gets more examples."""
    claimed, plain = (rows_to_table([transition(p)], TRANSITION) for p in ([0, 0, 0.0], [0, 0.4, 0]))
    have = {("qa", b): 10 for b in range(3)}
    found = allocate([claimed, plain], have, dict.fromkeys(have, 50), PLAN, 1)
    assert found.column("wanted").to_pylist() == [10, 15, 10]


def test_the_simulated_adaptive_experiment_of_the_benchmark_runs(monkeypatch):
    """Check that the loop in benchmarks/transition_power.py stops early if a collapse is clear."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import transition_power

    plan = adaptive.Adaptive(enabled=True, start=5, step=5, cap=40)
    verdict, used = transition_power._grow(transition_power.zone(plan.cap, 0.5, False), 0, plan, True)
    assert verdict.collapse == transition_power.COLLAPSE
    assert 5 * plan.start < used < 5 * plan.cap
