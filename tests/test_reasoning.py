"""Compression while a model reasons: a budget that holds over a long answer, against a plain loop."""

from __future__ import annotations

import pytest
from models import engine, tokens
from policy_states import positions_of

from kv_transition.budget import Budget
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.run.decode import Answer, Setting, answer_all
from kv_transition.run.paced import Paced, over_time, with_pace
from kv_transition.settings import Settings
from kv_transition.studies.grid.run import batches
from kv_transition.studies.grid.specs import check

PROMPT, STEPS = 40, 30


def answered(kind: str, budget: str, decoding: dict, count: int = 1, **options):
    """Answers of `STEPS` tokens to as many prompts, and the setting."""
    model = engine("qwen2")
    policy = create(kind, hyper_parameters(kind) | options)
    setting = with_pace(Setting(policy, Budget.parse(budget), "after_prompt"), decoding)
    questions = [tokens(4, seed=9 + i) for i in range(count)]
    prefills = [model.prefill(tokens(PROMPT - 4, seed=i), q, policy.statistics) for i, q in enumerate(questions)]
    answers = [Answer(0, STEPS) for _ in range(count)]
    answer_all(model, prefills, questions, setting, answers)
    return answers, setting


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("snapkv", {"window": 4}),
        ("lagkv", {"lag": 3}),
        ("adakv", {"window": 2}),
        ("cake", {"window": 4}),
        ("h2o", {}),
        ("streaming_llm", {}),
    ],
)
def test_every_m_tokens_the_cache_goes_back_to_its_budget_and_the_answer_is_that_of_a_plain_loop(kind, options):
    (got,), setting = answered(kind, "t12", {"compress_every": 5}, **options)
    model, policy = engine("qwen2"), create(kind, hyper_parameters(kind) | options)
    prompt = tokens(PROMPT - 4, seed=0) + tokens(4, seed=9)
    state = policy.compress(model.extend(None, prompt, policy.statistics), 12, keep_last=True).without_last()
    state = policy.compress(model.extend(state, prompt[-1:], policy.statistics), 12)
    said, entries = [], []
    for _ in range(STEPS):
        entries.append(state.entries)
        said.append(int(state.logits.argmax()))
        state = model.extend(state, said[-1:], policy.statistics)
        if state.entries >= 17:
            state = policy.compress(state, 12)
    assert got.tokens == said
    assert got.kept == entries
    assert entries[:12] == [12, 13, 14, 15, 16, 12, 13, 14, 15, 16, 12, 13]
    assert isinstance(setting.policy, Paced)


def test_a_budget_may_grow_with_what_is_generated_up_to_a_cap():
    (got,), _ = answered("knorm", "r0.5", {"compress_every": 1, "budget_of": "length"})
    # after t tokens of the answer, half of 40 + t entries, rounded up
    assert got.kept == [-(-(PROMPT + t) // 2) for t in range(STEPS)]
    (got,), _ = answered("knorm", "r0.5", {"compress_every": 1, "budget_of": "length", "max_entries": 24})
    assert got.kept == [min(24, -(-(PROMPT + t) // 2)) for t in range(STEPS)]
    (got,), _ = answered("knorm", "r0.5", {"compress_every": 1, "max_entries": 9})
    assert got.kept == [9] * STEPS


def test_a_batch_of_a_policy_that_acts_each_step_answers_as_its_sequences_do():
    together, _ = answered("h2o", "t12", {"compress_every": 4}, count=3)
    for number in range(3):
        model, policy = engine("qwen2"), create("h2o", {})
        question = tokens(4, seed=9 + number)
        prefill = model.prefill(tokens(PROMPT - 4, seed=number), question, policy.statistics)
        alone = Answer(0, STEPS)
        setting = with_pace(Setting(policy, Budget.parse("t12"), "after_prompt"), {"compress_every": 4})
        answer_all(model, [prefill], [question], setting, [alone])
        assert together[number].tokens == alone.tokens
        assert together[number].kept == alone.kept


def test_others_are_answered_one_by_one():
    units = [({"context_ids": [0] * 30, "question_ids": [0] * 5}, i) for i in range(4)]
    for kind, decoding, sizes in (
        ("snapkv", {"compress_every": 4}, [1] * 4),
        ("h2o", {"compress_every": 4}, [4]),
        ("h2o", {"compress_every": 4, "budget_of": "length"}, [1] * 4),
        ("snapkv", {}, [4]),
    ):
        setting = with_pace(Setting(create(kind, {}), Budget.parse("r0.5"), "after_prompt"), decoding)
        assert [len(run) for run in batches(units, 4, setting, ragged=False)] == sizes


def test_the_full_cache_is_never_compressed():
    (got,), setting = answered("full", "r1", {"compress_every": 3})
    assert got.kept == [float(PROMPT + t) for t in range(STEPS)]
    assert not isinstance(setting.policy, Paced)


def test_the_entries_over_time_are_sampled_evenly():
    assert over_time([7.0]) == [[0, 7.0]]
    assert over_time([1.0, 2.0, 3.0]) == [[0, 1.0], [1, 2.0], [2, 3.0]]
    points = over_time([float(i) for i in range(4096)])
    assert [step for step, _ in points] == [*range(0, 4096, 64), 4095]
    assert all(step == entries for step, entries in points)


@pytest.mark.parametrize(
    ("decoding", "policies", "words"),
    [
        ({"budget_of": "length"}, {}, "decoding.budget_of: only with compress_every"),
        ({"max_entries": 5}, {}, "decoding.max_entries: only with compress_every"),
        ({"compress_every": 5}, {"kvpress.SnapKVPress": {}}, "kvpress.SnapKVPress cannot be compressed again"),
        ({"compress_every": 5}, {"entropy_recall": {"tau": 1.0}}, "entropy_recall cannot be compressed again"),
    ],
)
def test_what_cannot_be_paced_is_refused_in_a_sentence(decoding, policies, words):
    settings = Settings.model_validate(
        {
            "experiment": "x",
            "dataset": {"name": "synthetic", "tasks": ["reader_qa"], "lengths": [256], "n_per_length": 4},
            "kv": {"policies": {"full": {}} | policies, "budgets": [0.5]},
            "decoding": decoding,
        }
    )
    with pytest.raises(UserError, match=words):
        check(settings)


def test_positions_held_by_a_paced_policy_are_those_of_its_inner_one():
    model, policy = engine("qwen2"), create("knorm", {})
    state = model.extend(None, tokens(30), frozenset())
    own = Paced(inner=policy, every=3, cap=8)
    assert positions_of(own.compress(state, 20)) == positions_of(policy.compress(state, 8))
