"""Test compression during decoding: a budget that is kept over a long answer, compared with a plain loop."""

from __future__ import annotations

import pytest
import torch
from models import engine, reference, tokens
from policy_states import positions_of

from kv_transition.budget import Budget
from kv_transition.cache.room import SLACK
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters
from kv_transition.run.decode import Answer, Setting, answer_all, begin, decode
from kv_transition.run.paced import Paced, over_time, with_pace
from kv_transition.settings import Settings
from kv_transition.studies.grid.run import batches
from kv_transition.studies.grid.specs import check

PROMPT, STEPS = 40, 30


def answered(kind: str, budget: str, decoding: dict, count: int = 1, **options):
    """Return ``count`` answers of `STEPS` tokens to different prompts, and the setting."""
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


def test_before_kvzip_compresses_again_the_model_repeats_what_it_has_generated(monkeypatch):
    """Compare the attention while it repeats with that of an eager model, and the answer with that of a plain loop."""
    model, policy, k, every = engine("qwen2"), create("kvzip", {}), PROMPT, 6
    asked, plainly = [], model.repeated

    def repeated(state, tokens):
        asked.append((list(tokens), plainly(state, tokens)))
        return asked[-1][1]

    monkeypatch.setattr(model, "repeated", repeated)
    (got,), _ = answered("kvzip", f"t{k}", {"compress_every": every})
    asked = [call for call in asked if len(call[0]) <= every + 1 and call[1].length > PROMPT]
    prompt = tokens(PROMPT - 4, seed=0) + tokens(4, seed=9)
    # the last token of the prompt is read again, and repeated together with the tokens after it
    assert [said for said, _ in asked] == [
        prompt[-1:] + got.tokens[:6],
        *(got.tokens[i : i + 6] for i in range(6, STEPS - 1, 6) if i + 6 < STEPS),
    ]
    ids = prompt + got.tokens[:6]
    for (weights, *_), layer in zip(reference("qwen2", [*ids, *ids[PROMPT - 1 :]])[1], asked[0][1].layers, strict=True):
        columns = [*range(4), *range(PROMPT - 1, 2 * len(ids) - PROMPT + 1)]
        rows = weights[:, len(ids) :, columns]
        most = (rows / rows.sum(-1, keepdim=True))[:, :, 4 : 4 + every + 1].amax(1)
        expected = most.view(2, -1, every + 1).amax(1)
        found = torch.cat([part.reconstruction[:, PROMPT - 1 :] for part in layer.parts])
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)

    # context and question are each repeated separately
    prefill = model.prefill(prompt[:-4], prompt[-4:], policy.statistics)
    state = model.extend(prefill.prompt.without_last(), prompt[-1:], policy.statistics)
    said, entries, new = [], [], prompt[-1:]
    for _ in range(STEPS):
        entries.append(state.entries)
        said.append(int(state.logits.argmax()))
        new.append(said[-1])
        state = model.extend(state, said[-1:], policy.statistics)
        if state.entries >= k + every:
            state, new = policy.compress(plainly(state, new), k), []
    assert got.tokens == said
    assert got.kept == entries
    assert all(layer.reconstruction.isfinite().all() for layer in asked[0][1].layers)


@pytest.mark.parametrize("mode", ["after_prompt", "before_question"])
def test_kvzip_evicts_of_what_is_generated_too(mode):
    """Check that answers are repeated; otherwise the last 24 tokens would take the whole budget."""
    model, policy, question = engine("qwen2"), create("kvzip", {}), tokens(4, seed=9)
    setting = with_pace(Setting(policy, Budget.parse("t12"), mode), {"compress_every": 4})
    prefill = model.prefill(tokens(PROMPT - 4, seed=0), question, policy.statistics)
    one = Answer(0, 24)
    state = begin(model, prefill, question, setting, one)
    ((_, state),) = decode(model, [state], setting, [one])
    held = {place for layer in positions_of(state) for head in layer for place in head}
    assert max(one.kept) <= 12 + 4
    assert any(4 <= place < PROMPT - 4 for place in held)  # entries of the context other than sinks


@pytest.mark.parametrize(
    ("kind", "options", "every"),
    [
        ("streaming_llm", {}, None),
        ("h2o", {}, None),
        ("r_kv", {"every": 8}, None),
        ("snapkv", {}, 8),
        ("lagkv", {}, 8),
        ("kvzip", {}, 8),
    ],
)
def test_a_held_cache_takes_no_storage_for_what_it_will_never_hold(kind, options, every):
    """Check that the storage does not depend on the maximum length of the answer."""
    model, policy = engine("qwen2"), create(kind, hyper_parameters(kind) | options)
    setting = with_pace(Setting(policy, Budget.parse("t12"), "after_prompt"), {"compress_every": every})
    prefill = model.prefill(tokens(PROMPT - 4), tokens(4, seed=9), policy.statistics)
    one = Answer(0, 4000, listener=lambda said: len(said) == STEPS)
    ((_, state),) = decode(model, [begin(model, prefill, tokens(4, seed=9), setting, one)], setting, [one])
    for layer in state.layers:
        for part in layer.parts:
            heads, n, d = part.keys.shape
            capacity = part.keys.untyped_storage().nbytes() / (heads * d * part.keys.element_size())
            assert n <= capacity <= n + 8 + 1 + SLACK


def test_a_budget_may_grow_with_what_is_generated_up_to_a_cap():
    (got,), _ = answered("knorm", "r0.5", {"compress_every": 1, "budget_of": "length"})
    # after t tokens of the answer: half of 40 + t entries, rounded up
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
        ({"budget_of": "length"}, {}, "decoding.budget_of: this key needs compress_every"),
        ({"max_entries": 5}, {}, "decoding.max_entries: this key needs compress_every"),
        ({"compress_every": 5}, {"kvpress.SnapKVPress": {}}, "kvpress.SnapKVPress cannot compress again"),
        ({"compress_every": 5}, {"entropy_recall": {"tau": 1.0}}, "entropy_recall cannot compress again"),
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
