"""Test that answers decoded together equal answers decoded alone, for all policies and all orders of arrival."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import engine as tiny
from models import random_model, sliding_model, tokens

from kv_transition.budget import Budget
from kv_transition.engines import several
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION
from kv_transition.engines.several import treat_tokens_alone
from kv_transition.policies import catalog
from kv_transition.run.decode import Answer, Setting, answer_all, begin
from kv_transition.run.together import Going, read_all

KINDS = {kind: {} for kind in catalog.kinds()} | {
    "entropy_recall": {"tau": 2.0},
    "streaming_llm": {"positions": "cache"},
}
CASES = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["before_question", "after_prompt"]),
    st.integers(4, 40),  # tokens of the context
    st.integers(1, 6),  # tokens of the question
    st.integers(1, 12),  # tokens of the answer
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 3),  # number of steps after the arrival of the previous case
)


def fresh(model="qwen2", eos=()):
    engine = LocalEngine(tiny(model).model)
    engine.eos = frozenset(eos)
    engine.share_passes()
    return engine


def made(engine, number, case):
    """Return setting, prefill, question and an empty answer."""
    kind, mode, n, question, most, temperature, _ = case
    policy = catalog.create(*catalog.resolve(kind, {"kind": kind} | KINDS[kind]))
    own = kind == "full" or catalog.ignores_budget(*catalog.resolve(kind, {"kind": kind} | KINDS[kind]))
    budget = Budget.of_fraction(1) if own else Budget.of_fraction(0.4)
    setting = Setting(policy, budget, mode, temperature=temperature)
    asked = tokens(question, seed=1000 + number)
    return setting, engine.prefill(tokens(n, seed=number), asked, policy.statistics), asked, Answer(number, most)


def together(engine, cases):
    """Decode the cases together: each joins some steps after the previous one, and leaves when its answer ends."""
    answers, going, waiting, last = [], [], list(enumerate(cases)), 0
    while waiting or going:
        if waiting and last >= waiting[0][1][-1]:
            setting, prefill, question, answer = made(engine, *waiting.pop(0))
            going.append(Going(engine, begin(engine, prefill, question, setting, answer), setting, answer))
            answers.append(answer)
            last = 0
        going = [each for each in going if each.choose()]
        if going:
            assert read_all(engine, going) == [None] * len(going)
        last += 1
    return answers


def alone(engine, number, case):
    setting, prefill, question, answer = made(engine, number, case)
    return answer_all(engine, [prefill], [question], setting, [answer])[0]


def facts(answer):
    """Return all fields of an answer except the times and the batch size."""
    numbers = {
        name: getattr(answer, name)
        for name in ("tokens", "finish_reason", "kept", "budget_entries", "cache_bytes", "total_bytes", "full_bytes")
    }
    return numbers | {"record": answer.record}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases=st.lists(CASES, min_size=1, max_size=6))
def test_any_mixture_of_answers(cases):
    """Check every policy, both modes, unequal prompts and lengths, greedy and sampled, ends of text at different
    steps."""
    engine = fresh(eos=range(0, 97, 8))
    assert [facts(a) for a in together(engine, cases)] == [facts(alone(engine, *each)) for each in enumerate(cases)]


@pytest.mark.parametrize("model", ["llama", "mistral", "sliding"])
def test_models_of_other_kinds(model):
    """Check sliding windows, whose layers have different lengths."""
    cases = [("h2o", "after_prompt", 40, 3, 8, 0.0, 0), ("full", "before_question", 9, 2, 12, 0.0, 1),
             ("snapkv", "after_prompt", 25, 1, 3, 0.0, 0)]  # fmt: skip
    engine = sliding_model()[0] if model == "sliding" else fresh(model)
    engine.share_passes()
    assert [facts(a) for a in together(engine, cases)] == [facts(alone(engine, *each)) for each in enumerate(cases)]


def test_ends_of_text_come_at_different_steps():
    """Check that the ends of text in the mixture above differ."""
    engine = fresh(eos=range(0, 97, 8))
    cases = [("full", "after_prompt", 10 + i, 2, 12, 0.0, 0) for i in range(12)]
    answers = together(engine, cases)
    ends = {len(answer.tokens) for answer in answers if answer.finish_reason == "stop"}
    assert len(ends) > 2
    assert max(answer.batch_size for answer in answers) > 4


def begun(engine, number, case):
    setting, prefill, question, answer = made(engine, number, case)
    return Going(engine, begin(engine, prefill, question, setting, answer), setting, answer)


def test_an_answer_that_fails_ends_by_itself():
    """Check failures in the shared pass and after it."""
    engine = fresh()
    cases = [("full", "after_prompt", 20, 2, 6, 0.0, 0), ("h2o", "after_prompt", 30, 3, 6, 0.0, 0),
             ("tova", "after_prompt", 15, 1, 6, 0.0, 0)]  # fmt: skip
    going = [begun(engine, *each) for each in enumerate(cases)]
    assert all(each.choose() for each in going)

    def broken(*_):
        raise ValueError("no more")

    going[1]._before = broken
    first, second, third = read_all(engine, going)
    assert (first, third) == (None, None)
    assert isinstance(second, ValueError)
    going.pop(1)
    kind = type(going[1].setting.policy)
    going[1].setting = replace(going[1].setting, policy=type("Broken", (kind,), {"hold": broken})())
    assert all(each.choose() for each in going)
    assert [type(failure) for failure in read_all(engine, going)] == [type(None), ValueError]
    left = going[0]
    while left.choose():
        assert read_all(engine, [left]) == [None]
    assert facts(left.answer) == facts(alone(engine, 0, cases[0]))


def test_one_pass_serves_all(monkeypatch):
    """Check that the weights are read once per step for any number of answers."""
    engine = fresh()
    going = [begun(engine, i, ("full", "after_prompt", 10 + i, 2, 4, 0.0, 0)) for i in range(5)]
    passes, forward = [], engine.model.forward

    def counted(*arguments, **options):
        passes.append(options["input_ids"].shape)
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.model, "forward", counted)
    assert all(each.choose() for each in going)
    read_all(engine, going)
    assert passes == [torch.Size([5, 1])]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries may round in another way")
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(64, 97), (512, 512), (512, 2048), (2048, 512), (512, 130), (96, 700)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_several_tokens_are_those_of_each_to_the_last_bit(inner, outer, bias, packs, monkeypatch):
    """Compare bit for bit, because otherwise an answer would depend on others in its batch if two logits nearly tie.

    19 rows need more than one product.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(inner, outer, bias=bias)
    rows = torch.randn(19, 1, inner)
    if not packs:
        monkeypatch.setattr(several, "_packed", lambda *_: None)
    with torch.inference_mode():
        by_torch = torch.cat([layer(token) for token in rows.split(1)])
        treat_tokens_alone(layer)
        each = torch.cat([layer(token) for token in rows.split(1)])
        for some in (rows, rows[:8], rows[3:5], rows[7:14]):
            at = (some.data_ptr() - rows.data_ptr()) // (4 * inner)
            assert torch.equal(layer(some), each[at : at + len(some)])
        assert torch.allclose(each, by_torch, atol=1e-5)
        if not packs:
            assert torch.equal(each, by_torch)
        assert torch.equal(
            layer(rows.transpose(0, 1)), torch.nn.functional.linear(rows[:, 0], layer.weight, layer.bias)[None]
        )


def test_a_model_of_real_width_says_the_same_together():
    """Check a model whose products are packed; those of the tiny models are not."""
    model = random_model("qwen2", hidden_size=256, intermediate_size=1024)
    fresh()  # registers this project's attention
    model.set_attn_implementation(ATTENTION)
    engine = LocalEngine(model)
    engine.share_passes()
    cases = [(kind, "after_prompt", 20 + i, 2, 12, 0.0, i % 2) for i, kind in enumerate(["full", "h2o", "snapkv"] * 3)]
    answers = together(engine, cases)
    assert max(answer.batch_size for answer in answers) > 4
    assert [facts(a) for a in answers] == [facts(alone(engine, *each)) for each in enumerate(cases)]


def test_two_continuations_of_one_prefill_never_meet():
    """Check greedy and sampled answers of the same state at the same time."""
    engine = fresh()
    case = ("full", "before_question", 20, 3, 8, 0.0, 0)
    setting, prefill, question, _ = made(engine, 0, case)
    answers = [Answer(seed, 8) for seed in range(4)]
    own = [setting if not seed else replace(setting, temperature=1.3) for seed in range(4)]
    going = [Going(engine, begin(engine, prefill, question, s, a), s, a) for s, a in zip(own, answers, strict=True)]
    while going := [each for each in going if each.choose()]:
        assert read_all(engine, going) == [None] * len(going)
    for s, answer in zip(own, answers, strict=True):
        single = answer_all(engine, [prefill], [question], s, [Answer(answer.seed, 8)])[0]
        assert facts(answer) == facts(single)
    assert len({tuple(answer.tokens) for answer in answers}) == 4
