"""The engine against attention written out in full: states, statistics, and what eviction does to the next tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, engine, random_model, reference, tokens

from kv_transition.budget import Budget
from kv_transition.cache.state import WINDOW, same
from kv_transition.engines.local import LocalEngine, _refuse_unsupported
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters, kinds
from kv_transition.run.cell import Setting, answer, compress, hold

KINDS = [kind for kind in kinds() if kind != "full"]


def policy(kind: str):
    return create(kind, hyper_parameters(kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_holds_what_attention_written_out_has(family):
    ids = tokens(90)
    logits, layers = reference(family, ids)
    state = engine(family).extend(None, ids)
    torch.testing.assert_close(state.logits, logits[-1], rtol=0, atol=1e-5)
    for layer, (weights, queries, keys, values) in zip(state.layers, layers, strict=True):
        group = weights.shape[0] // keys.shape[0]
        received = weights.sum(1).view(keys.shape[0], group, -1).mean(1)  # column sums, mean over the group
        torch.testing.assert_close(layer.attn_sum, received.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.keys, keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.values, values, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.recent_queries, queries[:, -WINDOW:], rtol=0, atol=1e-5)
        assert layer.positions.tolist() == [list(range(90))] * keys.shape[0]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from(FAMILIES))
def test_extending_in_any_chunks_gives_the_same_state(sizes, family):
    ids = tokens(sum(sizes))
    whole = engine(family).extend(None, ids)
    state, start = None, 0
    for size in sizes:
        state = engine(family).extend(state, ids[start : start + size])
        start += size
    assert same(whole, state, atol=1e-4)


def test_extend_leaves_the_old_state_alone():
    before = engine("qwen2").extend(None, tokens(20))
    copy = engine("qwen2").extend(None, tokens(20))
    engine("qwen2").extend(before, tokens(5, seed=1))
    assert same(before, copy)


def _visible(history, total, layers, kv_heads):
    """Who sees whom, from the entries that were left when each block of tokens came in."""
    masks = torch.ones(total, total, dtype=torch.bool).tril().repeat(layers, kv_heads, 1, 1)
    for start, stop, state in history:
        for number, layer in enumerate(state.layers):
            for head in range(kv_heads):
                rows = masks[number, head, start:stop]
                rows[:, :start] = False
                rows[:, layer.positions[head]] = True
                rows[:, start:] = torch.ones(stop - start, total - start, dtype=torch.bool).tril()
    return list(masks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_physical_eviction_equals_masking(family, kind, mode):
    """Every policy: the logits of all later tokens equal those of a full cache whose evicted entries are masked."""
    context, question, later = tokens(70), tokens(9, seed=1), tokens(6, seed=2)
    model = engine(family)
    prefill = model.prefill(context, question)
    setting = Setting(policy(kind), Budget.parse("r0.3"), mode)
    state = prefill.context if mode == "before_question" else prefill.prompt
    k = setting.budget.kept(state.length)
    state = compress(setting, state, k, seed=3, keep_last=mode == "after_prompt")
    history, got = [], []
    if mode == "before_question":
        blocks = [question, *([token] for token in later)]
    else:
        state = state.without_last()
        blocks = [question[-1:], *([token] for token in later)]
    for block in blocks:
        history.append((state.length, state.length + len(block), state))
        state = hold(setting, model.extend(state, block, setting.policy.statistics), k, seed=3)
        got.append(state.logits)

    ids = context + question + later
    shape = (len(state.layers), state.layers[0].keys.shape[0])
    expected, _ = reference(family, ids, _visible(history, len(ids), *shape))
    unmasked, _ = reference(family, ids)
    ends = [stop - 1 for _, stop, _ in history]
    torch.testing.assert_close(torch.stack(got), expected[ends], rtol=0, atol=1e-5)
    assert (expected[ends] - unmasked[ends]).abs().max() > 1e-2, "the eviction made no difference: nothing was tested"


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_a_budget_of_one_gives_the_tokens_of_the_full_cache(kind, mode):
    """And those are the tokens of transformers' own generate()."""
    context, question = tokens(60, seed=5), tokens(8, seed=6)
    model = engine("qwen2")
    prefill = model.prefill(context, question)
    got = answer(model, prefill, question, Setting(policy(kind), Budget.parse("r1"), mode), 12, seed=1)
    plain = random_model("qwen2").generate(
        torch.tensor([context + question]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert got.tokens == plain[0, len(context + question) :].tolist()
    assert got.kept[-1] == len(context + question) + 11
    assert got.cache_bytes == got.full_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_what_the_budget_says(kind):
    """K after compression; while decoding, K for policies that act each step, else K and all that came."""
    context, question = tokens(80, seed=5), tokens(10, seed=6)
    model = engine("llama")
    chosen = policy(kind)
    prefill = model.prefill(context, question)
    got = answer(model, prefill, question, Setting(chosen, Budget.parse("r0.25"), "before_question"), 5, seed=1)
    assert got.budget_entries == 20
    assert got.kept == ([20] * 5 if chosen.acts_each_step else [30, 31, 32, 33, 34])
    entries_bytes = 3 * 2 * 8 * 2 * 4  # layers, KV heads, channels, keys and values, fp32
    assert got.cache_bytes == got.kept[-1] * entries_bytes
    assert got.full_bytes == (90 + 4) * entries_bytes


def test_sampling_is_seeded_and_follows_the_temperature():
    context, question = tokens(40), tokens(5, seed=1)
    model = engine("qwen2")
    prefill = model.prefill(context, question)
    setting = Setting(policy("full"), Budget.parse("r1"), "after_prompt", temperature=2.0)
    runs = [answer(model, prefill, question, setting, 16, seed).tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_first_token_may_come_from_the_full_cache():
    context, question = tokens(60), tokens(5, seed=1)
    model = engine("qwen2")
    prefill = model.prefill(context, question)
    setting = Setting(policy("streaming_llm"), Budget.parse("t6"), "after_prompt", first_token="full")
    got = answer(model, prefill, question, setting, 4, seed=0)
    assert got.tokens[0] == int(prefill.prompt.logits.argmax())


def test_taking_back_an_evicted_token_is_refused():
    state = engine("qwen2").extend(None, tokens(12))
    first_half = [torch.arange(6).expand(2, 6)] * 3
    with pytest.raises(ValueError, match="evicted"):
        state.select(first_half).without_last()


def test_an_unknown_statistic_is_refused_by_name():
    with pytest.raises(UserError, match="hidden_states"):
        engine("qwen2").extend(None, [1, 2], frozenset({"hidden_states"}))


def test_a_model_without_evictable_layers_is_refused():
    sliding = random_model("mistral").config
    sliding.sliding_window = 8
    with pytest.raises(UserError, match="full attention"):
        _refuse_unsupported(sliding, "some/model")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.name"):
        LocalEngine.from_pretrained(str(tmp_path))
