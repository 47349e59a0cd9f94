"""Compare the engine with attention from its definition: states, statistics, and tokens after an eviction."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, engine, random_model, reference, sliding_model, tokens

from kv_transition.budget import Budget
from kv_transition.cache.state import EVERY, WINDOW, same
from kv_transition.engines.last_token import mlp_of_last_token
from kv_transition.engines.loading import refuse_unsupported
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters, kinds
from kv_transition.run.decode import Answer, Setting, answer, answer_all, let_in, let_in_all
from kv_transition.run.decode import start as start_answer

KINDS = [kind for kind in kinds() if kind != "full"]
DROPPING = [kind for kind in KINDS if kind not in ("entropy_merge", "quantized")]
"""policies that do not change the entries that they keep"""


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
        received = weights.sum(1).view(keys.shape[0], group, -1).mean(1)  # column sums, averaged over the group
        torch.testing.assert_close(layer.attn_sum, received.float(), rtol=1e-5, atol=1e-5)
        entropy = torch.special.entr(weights).sum(-1).mean(0).float()
        for head in range(keys.shape[0]):
            torch.testing.assert_close(layer.query_entropy[head], entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.keys, keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.values, values, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.recent_queries, queries[:, -WINDOW:], rtol=0, atol=1e-5)
        assert layer.positions.tolist() == [list(range(90))] * keys.shape[0]


def rows_through_the_mlps(model: LocalEngine, read: Callable[[], object]) -> list[int]:
    """Return the number of tokens that each layer's MLP computes while ``read`` runs."""
    counted: list[int] = []
    mlps = [layer.mlp for layer in model.model.get_decoder().layers]
    hooks = [mlp.down_proj.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[1]))
             for mlp in mlps]  # fmt: skip
    read()
    for hook in hooks:
        hook.remove()
    return counted


def test_the_last_layer_computes_only_tokens_whose_logits_are_needed():
    model, ids = engine("llama"), tokens(30)
    layers = len(model.windows)
    assert rows_through_the_mlps(model, lambda: model.extend(None, ids)) == [30] * (layers - 1) + [1]
    assert rows_through_the_mlps(model, lambda: model.logits(None, ids)) == [30] * layers


def test_a_pass_of_another_thread_is_not_cut_to_its_last_token():
    model, ids = engine("llama"), tokens(30)
    _, alone = model.logits(None, ids)
    found = []
    thread = threading.Thread(target=lambda: found.append(model.logits(None, ids)[1]))
    with mlp_of_last_token(model.model, 7, last_only=True):
        thread.start()
        thread.join()
    assert torch.equal(found[0], alone)


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
    """Return the attention masks that follow from the kept entries at the time when each block of tokens was read."""
    masks = torch.ones(total, total, dtype=torch.bool).tril().repeat(layers, kv_heads, 1, 1)
    for start, stop, state in history:
        for number, layer in enumerate(state.layers):
            positions = [head for part in layer.parts for head in part.positions]
            for head in range(kv_heads):
                rows = masks[number, head, start:stop]
                rows[:, :start] = False
                rows[:, positions[head]] = True
                rows[:, start:] = torch.ones(stop - start, total - start, dtype=torch.bool).tril()
    return list(masks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_physical_eviction_equals_masking(family, kind, mode):
    """Compare the logits of all later tokens with those of a full cache whose evicted entries are masked, for every
    policy."""
    context, question, later = tokens(70), tokens(9, seed=1), tokens(6, seed=2)
    model = engine(family)
    setting = Setting(policy(kind), Budget.parse("r0.3"), mode)
    prefill = model.prefill(context, question, setting.policy.statistics)
    state = prefill.context if mode == "before_question" else prefill.prompt
    k = setting.budget.kept(state.length)
    state = setting.compress(state, k, seed=3, keep_last=mode == "after_prompt")
    history, got = [], []
    if mode == "before_question":
        blocks = [question, *([token] for token in later)]
    else:
        state = state.without_last()
        blocks = [question[-1:], *([token] for token in later)]
    for block in blocks:
        history.append((state.length, state.length + len(block), state))
        state = setting.hold(model.extend(state, block, setting.while_decoding), k)
        got.append(state.logits)

    ids = context + question + later
    shape = (len(state.layers), prefill.context.layers[0].keys.shape[0])
    expected, _ = reference(family, ids, _visible(history, len(ids), *shape))
    unmasked, _ = reference(family, ids)
    ends = [stop - 1 for _, stop, _ in history]
    torch.testing.assert_close(torch.stack(got), expected[ends], rtol=0, atol=1e-5)
    assert (expected[ends] - unmasked[ends]).abs().max() > 1e-2, "the eviction made no difference: nothing was tested"


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind != "quantized"])
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_a_budget_of_one_gives_the_tokens_of_the_full_cache(kind, mode):
    """Compare with the tokens of transformers' generate() as well."""
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quantized"])
def test_the_cache_holds_what_the_budget_says(kind):
    """Check K entries after compression and, while decoding, K (evicts at each decode step) or K plus all new tokens.

    A policy that compresses after every ``every`` tokens holds K plus the tokens since then: up to K + every - 1.
    """
    context, question = tokens(80, seed=5), tokens(10, seed=6)
    model = engine("llama")
    chosen = create(kind, hyper_parameters(kind) | ({"every": 3} if "every" in hyper_parameters(kind) else {}))
    prefill = model.prefill(context, question, chosen.statistics)
    got = answer(model, prefill, question, Setting(chosen, Budget.parse("r0.25"), "before_question"), 5, seed=1)
    assert got.budget_entries == 20
    # heads of different lengths keep K on average, except for rounding of shares to whole entries
    every = getattr(chosen, "every", 1)
    expected = [20 + step % every for step in range(5)] if chosen.acts_each_step else [30, 31, 32, 33, 34]
    assert got.kept == pytest.approx(expected, abs=1e-9)
    entries_bytes = 3 * 2 * 8 * 2 * 4  # layers, KV heads, channels, keys and values, fp32
    assert got.cache_bytes == got.kept[-1] * entries_bytes
    assert got.full_bytes == (90 + 4) * entries_bytes


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_only_other_policies_read_change_nothing(kind, mode):
    """Compare a prefill with the policy's own statistics and a prefill with those of all policies of an experiment."""
    context, question = tokens(60, seed=5), tokens(8, seed=6)
    model, setting = engine("qwen2"), Setting(policy(kind), Budget.parse("r0.3"), mode)
    own, every = (
        answer(model, model.prefill(context, question, statistics), question, setting, 6, seed=1)
        for statistics in (setting.policy.statistics, EVERY)
    )
    assert (own.tokens, own.kept, own.cache_bytes) == (every.tokens, every.kept, every.cache_bytes)


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


def test_a_statistic_that_was_not_kept_up_cannot_be_taken_up_again():
    before = engine("qwen2").extend(None, tokens(12), frozenset({"recent_queries"}))
    assert before.layers[0].attn_sum is None
    with pytest.raises(UserError, match="attn_sum"):
        engine("qwen2").extend(before, [3], frozenset({"attn_sum"}))
    with pytest.raises(UserError, match="h2o reads attn_sum"):
        policy("h2o").compress(before, 5)


def test_two_continuations_of_one_state_do_not_meet():
    """Check that the first continuation uses the spare storage after the entries and the second does not overwrite
    it."""
    model = engine("llama")
    start = model.extend(None, tokens(20), room=8)
    one, two = model.extend(start, [1, 2, 3]), model.extend(start, [4, 5, 6])
    further = model.extend(one, [7])
    assert same(further, model.extend(None, [*tokens(20), 1, 2, 3, 7]), atol=1e-4)
    assert same(two, model.extend(None, [*tokens(20), 4, 5, 6]), atol=1e-4)


def test_reading_in_chunks_of_any_size_gives_the_same_prefill():
    whole = engine("qwen2").prefill(tokens(70), tokens(9, seed=1))
    chunked = LocalEngine(engine("qwen2").model, chunk_tokens=16).prefill(tokens(70), tokens(9, seed=1))
    assert same(whole.context, chunked.context, atol=1e-4)
    assert same(whole.prompt, chunked.prompt, atol=1e-4)


def test_query_moments_are_those_of_the_unrotated_queries():
    """Compare with the outputs of the query projections before the rotation."""
    model, ids = engine("llama"), tokens(40)
    projected = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, out, number=number: projected.update({number: out}))
        for number, layer in enumerate(model.model.model.layers)
    ]
    whole = model.extend(None, ids)
    for hook in hooks:
        hook.remove()
    parts = model.extend(model.extend(model.extend(None, ids[:3]), ids[3:17]), ids[17:])
    for number, (a, b) in enumerate(zip(whole.layers, parts.layers, strict=True)):
        queries = projected[number][0, 4:].view(36, a.recent_queries.shape[0], -1).transpose(0, 1)
        for state in (a, b):
            torch.testing.assert_close(state.query_mean, queries.mean(1), rtol=0, atol=1e-5)
            cov = torch.stack([torch.cov(q.T, correction=0) for q in queries])
            torch.testing.assert_close(state.query_cov, cov, rtol=1e-4, atol=1e-5)


def _batched(kind, budget, mode, lengths):
    """Return answers decoded as a batch, and the same answers decoded one by one."""
    model, setting = engine("qwen2"), Setting(policy(kind), Budget.parse(budget), mode)
    prompts = [(tokens(n, seed=n), tokens(6, seed=100 + n)) for n in lengths]
    prefills = [model.prefill(*prompt, setting.policy.statistics) for prompt in prompts]
    questions = [question for _, question in prompts]
    together = answer_all(model, prefills, questions, setting, [Answer(n, 4 + n % 5) for n in lengths])
    alone = [
        answer(model, prefill, question, setting, 4 + n % 5, seed=n)
        for n, prefill, question in zip(lengths, prefills, questions, strict=True)
    ]
    return together, alone


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize(
    ("kind", "budget", "lengths"),
    [(kind, "t17", [50, 61, 50, 72]) for kind in KINDS if kind != "quantized" and not policy(kind).one_at_a_time]
    + [("quantized", "r1", [50, 50])]
    + [(kind, "r0.4", [50, 61, 39]) for kind in ("snapkv", "knorm", "adakv", "pyramidkv") if kind in KINDS]
    + [("full", "r1", [50, 20, 61])],
)
def test_a_batch_answers_as_one_by_one(kind, budget, lengths, mode):
    together, alone = _batched(kind, budget, mode, lengths)
    for a, b in zip(together, alone, strict=True):
        assert a.batch_size == len(lengths)
        for name in ("tokens", "finish_reason", "kept", "cache_bytes", "full_bytes", "budget_entries"):
            assert getattr(a, name) == pytest.approx(getattr(b, name)), name


@pytest.mark.parametrize(("lengths", "passes"), [([70, 81, 70], 1), ([70, 81, 12], 3)])
def test_questions_on_caches_of_one_size_are_read_in_one_pass(lengths, passes):
    model, setting = engine("qwen2"), Setting(policy("tova"), Budget.parse("t17"), "before_question")
    prefills = [model.prefill(tokens(n, seed=n), [], setting.policy.statistics) for n in lengths]
    states = [start_answer(model, prefill, tokens(6), setting, Answer(0, 4)) for prefill in prefills]
    answers = [Answer(0, 4, budget_entries=17) for _ in lengths]
    widths = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, named: widths.append(len(named["input_ids"])), with_kwargs=True
    )
    together = let_in_all(model, list(states), [tokens(6, seed=n) for n in lengths], setting, answers)
    hook.remove()
    assert (len(widths), sum(widths)) == (passes, 3)
    for n, state, read in zip(lengths, states, together, strict=True):
        alone = let_in(model, state, tokens(6, seed=n), setting, Answer(0, 4, budget_entries=17))
        assert same(read, alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def gemma():
    """Return a model with five sliding-window layers and one full layer, and its copy with eager attention."""
    return sliding_model()


def test_sliding_window_layers_see_their_window_only(gemma):
    model, plain = gemma
    ids = tokens(70)
    expected = plain(torch.tensor([ids])).logits[0].float()
    state = None
    for start, stop in [(0, 45), (45, 46), (46, 60), (60, 61), (61, 70)]:
        state = model.extend(state, ids[start:stop])
        torch.testing.assert_close(state.logits, expected[stop - 1], rtol=0, atol=1e-5)
    again = model.extend(state.without_last(), ids[-1:])
    torch.testing.assert_close(again.logits, expected[-1], rtol=0, atol=1e-5)
    assert [layer.n for layer in again.layers] == [16] * 5 + [70]


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_only_full_attention_layers_are_evicted(gemma, mode):
    model, _ = gemma
    prefill = model.prefill(tokens(60), tokens(5, seed=1))
    got = answer(model, prefill, tokens(5, seed=1), Setting(policy("h2o"), Budget.parse("r0.25"), mode), 6, seed=0)
    k = 15 if mode == "before_question" else 17
    assert got.kept == [k] * 6
    one = 2 * 8 * 2 * 4  # KV heads, channels, keys and values, fp32
    assert got.cache_bytes == k * one
    assert got.total_bytes == (k + 5 * 16) * one
    assert got.full_bytes == 70 * one


def test_ragged_batches_of_a_sliding_window_model(gemma):
    """Check that short prompts are padded inside the window as well."""
    model, _ = gemma
    prompts = [(tokens(n, seed=n), tokens(3, seed=n + 1)) for n in (7, 30, 12)]
    prefills = [model.prefill(*prompt) for prompt in prompts]
    setting = Setting(policy("full"), Budget.parse("r1"), "after_prompt")
    questions = [question for _, question in prompts]
    together = answer_all(model, prefills, questions, setting, [Answer(0, 24) for _ in prompts])
    alone = [answer(model, *pair, setting, 24, seed=0) for pair in zip(prefills, questions, strict=True)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_a_model_without_evictable_layers_is_refused():
    sliding = random_model("mistral").config
    sliding.sliding_window = 8
    with pytest.raises(UserError, match="nothing to evict"):
        refuse_unsupported(sliding, "some/model")


def test_layers_of_another_kind_are_named():
    config = random_model("qwen2").config
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UserError, match="linear_attention"):
        refuse_unsupported(config, "some/model")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.name"):
        LocalEngine.from_pretrained(str(tmp_path))
