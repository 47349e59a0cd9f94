"""Check that the first screen of the report is correct for simulated experiments (complete version: benchmarks)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import first_screen

from kv_transition.studies.grid.analysis import scale


@pytest.fixture(scope="module")
def screens():
    rng = np.random.default_rng(11)
    return [list(first_screen.read(first_screen.rendered(first_screen.simulated(rng, 60)))) for _ in range(6)]


def test_every_cell_has_one_word_of_the_scale(screens):
    for (_, _, lead), *cells in screens:
        assert lead.endswith(".")
        assert {(policy, budget) for policy, budget, _ in cells} == {
            (policy, budget) for policy in first_screen.TRUTHS for budget in first_screen.BUDGETS
        }
        assert all(any(words.startswith(word) for word in scale.SCALE) for *_, words in cells)


def test_hardly_any_sentence_is_wrong_and_the_truth_is_often_found(screens):
    right, words = [], {}
    for lead, *cells in screens:
        right += [ok for cell in cells for _, ok in first_screen.judged(*cell)]
        right.append(first_screen.headline_right(lead[2], cells)[1])
        for policy, budget, text in cells:
            words.setdefault((policy, budget), []).append(text)
    assert np.mean(right) >= 0.95
    for key, word in ((("nothing", "r0.5"), "no loss shown"), (("failing", "r0.2"), "unstable"),
                      (("chance", "r0.2"), "collapsed"), (("late", "r0.2"), "loss shown")):  # fmt: skip
        assert sum(text.startswith(word) for text in words[key]) >= 4


def test_a_wrong_sentence_is_seen():
    assert list(first_screen.judged("nothing", "r0.5", "loss shown from 512 tokens")) == [
        ("loss shown", False),
        ("loss shown from", False),
    ]
    assert list(first_screen.judged("falling", "r0.5", "collapsed from 256 tokens")) == [
        ("collapsed", True),
        ("collapsed from", False),
    ]
    assert first_screen.headline_right("20 % of the cache is enough, with chance and nothing.", [])[1] is False
    everything = "A loss is shown for everything tried."
    shown = [(p, b, "") for p in first_screen.LOSING for b in first_screen.BUDGETS]
    assert first_screen.headline_right(everything, shown, first_screen.LOSING)[1] is True
    assert first_screen.headline_right(everything, shown, first_screen.WORLDS["one spared"])[1] is False


def test_where_everything_loses_the_headline_says_so():
    """Check that the headline reports a loss for every policy in a simulation in which each policy loses."""
    scores = first_screen.simulated(np.random.default_rng(0), 40, first_screen.LOSING)
    (_, _, lead), *cells = first_screen.read(first_screen.rendered(scores))
    assert first_screen.headline_right(lead, cells, first_screen.LOSING) == ("headline: a loss for everything", True)
