"""Test the policy entropy_recall: when it recalls, what it holds afterwards, and that no entry is lost or
duplicated."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, engine, random_model, reference, sliding_model, tokens
from policy_states import HKV, layer_of, random_state, written

from kv_transition.budget import Budget
from kv_transition.cache.batch import stack
from kv_transition.cache.state import LayerCache, same
from kv_transition.cache.tiers import TieredLayer, attention, exchange, offload, positions
from kv_transition.errors import UserError
from kv_transition.policies.base import top
from kv_transition.policies.catalog import create
from kv_transition.policies.entropy_recall import random_moments, token_entropy
from kv_transition.run.decode import Answer, Setting, answer, answer_all, begin
from kv_transition.studies.grid.calibrate import held_out, step_entropies
from kv_transition.studies.grid.moments import calibrated, paces, quantile

INNER = ["h2o", "h2o_heavy", "streaming_llm", "tova"]
MODES = ["before_question", "after_prompt"]
SUMS = ("attn_sum", "output_norm", "reconstruction")
NAMES = ("keys", "values", *SUMS)


def recall(**options):
    return create("entropy_recall", options)


def held(layer: LayerCache) -> list[tuple[list[int], list[int]]]:
    """Return the positions of the hot and of the cold entries of each head."""
    hot = layer.positions.reshape(-1, layer.n).tolist()
    cold = layer.cold.positions.tolist() if isinstance(layer, TieredLayer) else [[]] * len(hot)
    return list(zip(hot, cold, strict=True))


# --- the store ---------------------------------------------------------------------------------------------------


def check_every_entry_once(layer: TieredLayer, truth: LayerCache, n: int):
    """Check that each of the first n entries is either hot or cold in every head, and unchanged."""
    for head, (hot, cold) in enumerate(held(layer)):
        assert sorted(hot + cold) == list(range(n))
        assert hot == sorted(hot)
        for name in NAMES:
            own, stored = getattr(layer, name).reshape(HKV, len(hot), -1), getattr(layer.cold, name)
            expected = getattr(truth, name)[head]
            assert torch.equal(own[head], expected[hot].view(len(hot), -1))
            assert torch.equal(stored[head].view(len(cold), -1), expected[cold].view(len(cold), -1))
            assert stored.device.type == "cpu"


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(4, 40),
    operations=st.lists(st.sampled_from(["read", "evict", "exchange"]), max_size=25),
    seed=st.integers(0, 2**32),
    batch=st.booleans(),
)
def test_store_and_cache_together_hold_every_entry_exactly_once(n, operations, seed, batch):
    """Check each entry after any order of reads, evictions and exchanges: its key, value and statistic are its own."""
    generator = torch.Generator().manual_seed(seed)
    truth = layer_of(written(n + len(operations), seed=n))
    truth = replace(truth, query_entropy=None, recent_queries=None, query_mean=None, query_cov=None)
    count = n
    layer = truth.cut(0, n)

    def some(of: int, k: int) -> torch.Tensor:
        return torch.stack([torch.randperm(of, generator=generator)[:k] for _ in range(HKV)])

    layer = offload(layer, layer.select(some(n, n // 2).sort(-1).values))
    if batch:
        layer = replace(layer, room=None, **{x: getattr(layer, x).unsqueeze(0) for x in (*NAMES, "positions")})
    moved, recalled = layer.moved, 0
    for operation in operations:
        if operation == "read":
            own = truth.cut(count, count + 1)
            lead = layer.positions.shape[:-2]
            layer = layer.append(
                *(getattr(own, x).expand(*lead, *getattr(own, x).shape) for x in ("keys", "values", "positions")),
                None,
                0,
            )
            read = {x: getattr(own, x).expand(*lead, -1, -1) for x in SUMS}
            layer = replace(layer, **{x: torch.cat([getattr(layer, x)[..., :-1], read[x]], -1) for x in SUMS})
            count += 1
        elif operation == "evict" and layer.n > 1:
            kept = some(layer.n, layer.n - 1).sort(-1).values
            layer = offload(layer, layer.select(kept.expand(*layer.positions.shape[:-1], -1)))
            moved += HKV
        elif operation == "exchange":
            before = held(layer)
            order = positions(layer).argsort(-1)
            layer = exchange(layer, order.gather(-1, some(count, layer.n).sort(-1).values))
            back = sum(len(set(new) - set(old)) for (new, _), (old, _) in zip(held(layer), before, strict=True))
            moved += 2 * back
            recalled += back
        check_every_entry_once(layer, truth, count)
    assert (layer.moved, layer.recalled) == (moved, recalled)
    assert layer.cold_nbytes + layer.nbytes == truth.cut(0, count).nbytes


def test_a_store_leaves_older_states_alone():
    state, _ = random_state(30, layers=1)
    policy = recall(moments="always")
    first = policy.compress(state, 10)
    copy = policy.compress(state, 10)
    policy.compress(first, 6)
    layer = first.layers[0]
    query = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    changed = policy.recalled(layer, query, torch.zeros(HKV, 1, 8))
    assert changed.recalled > 0
    assert same(first, copy)
    assert held(first.layers[0]) == held(copy.layers[0])
    assert torch.equal(first.layers[0].cold.keys, copy.layers[0].cold.keys)


def test_a_store_is_that_of_one_sequence():
    state, _ = random_state(30)
    compressed = recall().compress(state, 10)
    pair = stack([compressed, compressed], frozenset({"attn_sum", "recent_queries"}))
    with pytest.raises(ValueError, match="one sequence"):
        recall().compress(pair, 8)
    model, setting = engine("qwen2"), Setting(recall(), Budget.parse("t5"), "after_prompt")
    prefills = [model.prefill(tokens(20), tokens(3))] * 2
    with pytest.raises(ValueError, match="one answer at a time"):
        answer_all(model, prefills, [tokens(3)] * 2, setting, [Answer(0, 4), Answer(1, 4)])


@pytest.mark.parametrize("n", [10, 33])
def test_attention_over_both_sides_is_that_of_the_whole_layer(n):
    """Compare with a softmax over the uncompressed layer and the token's own entry."""
    truth = written(n + 1, seed=n)
    whole = layer_of(truth)
    kept = offload(whole.cut(0, n), whole.cut(0, n).select(torch.arange(0, n, 3).expand(HKV, -1)))
    got = attention(kept, whole.recent_queries[:, -1:], whole.keys[:, -1:])
    expected = truth.weights[:, -1].view(HKV, -1, n + 1).mean(1)
    torch.testing.assert_close(got.double(), expected.gather(-1, positions(kept)), rtol=1e-5, atol=1e-7)


def test_equal_scores_go_to_the_lower_position():
    state, _ = random_state(12, layers=1)
    layer = replace(state.layers[0], keys=torch.zeros(HKV, 12, 8))
    tiered = offload(layer, layer.select(torch.arange(8, 12).expand(HKV, -1)))
    got = recall().recalled(tiered, torch.ones(4, 1, 8), torch.zeros(HKV, 1, 8))
    assert [hot for hot, _ in held(got)] == [[0, 1, 2, 3]] * HKV


# --- whole answers -------------------------------------------------------------------------------------------------


def prompt(n: int = 60, q: int = 7):
    return tokens(n, seed=5), tokens(q, seed=6)


def answered(family, policy, mode="after_prompt", budget="r0.25", new=10, pace=None, seed=3):
    context, question = prompt()
    model = engine(family)
    got = Answer(seed, new, pace=pace)
    answer_all(
        model, [model.prefill(context, question)], [question], Setting(policy, Budget.parse(budget), mode), [got]
    )
    return got


def outcome(got: Answer):
    facts = {key: value for key, value in got.record.items() if key != "tau"}
    return got.tokens, got.kept, got.cache_bytes, facts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", INNER)
def test_tau_of_zero_is_always_and_of_infinity_never_and_the_inner_policy(inner, mode):
    always = answered("qwen2", recall(inner=inner, moments="always"), mode)
    assert outcome(answered("qwen2", recall(inner=inner, tau=0.0), mode)) == outcome(always)
    steps = 9 if mode == "before_question" else 10  # the last token is generated, but not read
    assert always.record["triggers"] == always.record["steps"] == steps
    plain = answered("qwen2", create(inner, {}), mode)
    for options in ({"tau": math.inf}, {"tau": None}, {"moments": "never"}):
        got = answered("qwen2", recall(inner=inner, **options), mode)
        assert (got.tokens, got.kept, got.cache_bytes) == (plain.tokens, plain.kept, plain.cache_bytes)
        assert got.record["triggers"] == got.record["recalled_entries"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_recalling_makes_a_difference(family):
    """Check that recall changes the answer; otherwise the equalities above would show nothing."""
    always, never = (answered(family, recall(moments=m), new=16) for m in ("always", "never"))
    assert always.tokens != never.tokens
    assert always.record["recalled_entries"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", ["h2o", "tova"])
@pytest.mark.parametrize("family", FAMILIES)
def test_always_attends_to_exactly_the_top_k_of_the_current_query(family, inner, mode):
    """Compare with attention from its definition in a model that sees the hot entries of each step.

    The query's softmax over all earlier entries must select the same K entries, and the next-token logits must agree.
    """
    context, question = prompt()
    later = tokens(6, seed=2)
    model, policy = engine(family), recall(inner=inner, moments="always")
    setting = Setting(policy, Budget.parse("r0.25"), mode)
    got = Answer(0, 1)
    state = begin(model, model.prefill(context, question), question, setting, got)
    k = got.budget_entries
    ids = context + question + later
    start = len(context) + len(question)

    visible = [torch.ones(len(ids), len(ids), dtype=torch.bool).tril().repeat(2, 1, 1) for _ in state.layers]
    logits, hot_sets = [], []
    if mode == "before_question":
        # the question attends to the compressed cache
        left = setting.compress(model.prefill(context, question).context, k)
        for number, layer in enumerate(left.layers):
            for head, (hot, _) in enumerate(held(layer)):
                rows = visible[number][head]
                rows[len(context) : start, : len(context)] = False
                rows[len(context) : start, hot] = True
    else:
        # the prompt's last token is the first decode step, and its own entry was among the K before
        for number, layer in enumerate(state.layers):
            for head, (hot, _) in enumerate(held(layer)):
                assert len(hot) == k
                assert hot[-1] == start - 1
                visible[number][head][start - 1] = False
                visible[number][head][start - 1, hot] = True
                hot_sets.append((number, head, start - 1, hot[:-1]))
    for i, token in enumerate(later):
        state = model.extend(state, [token], setting.while_decoding, before_attention=policy.recalled)
        logits.append(state.logits)
        for number, layer in enumerate(state.layers):
            for head, (hot, _) in enumerate(held(layer)):
                assert len(hot) == k + 1
                assert hot[-1] == start + i
                visible[number][head][start + i] = False
                visible[number][head][start + i, hot] = True
                hot_sets.append((number, head, start + i, hot[:-1]))
        state = setting.hold(state, k)

    expected, layers = reference(family, ids, visible)
    torch.testing.assert_close(torch.stack(logits), expected[start:], rtol=0, atol=1e-5)
    for number, head, at, hot in hot_sets:
        _, queries, keys, _ = layers[number]
        group = queries.shape[0] // keys.shape[0]
        heads = range(queries.shape[0]) if inner == "tova" else range(head * group, (head + 1) * group)
        rows = []
        for h in heads:
            scores = (queries[h, at].double() @ keys[h // group, : at + 1].double().T) * queries.shape[-1] ** -0.5
            rows.append(scores.softmax(-1))
        paid = torch.stack(rows).mean(0)[:at].tolist()
        best = sorted(range(at), key=lambda j: (-paid[j], j))[: len(hot)]
        assert hot == sorted(best)


@pytest.mark.parametrize("mode", MODES)
def test_moments_and_moves_are_those_counted_by_hand(mode):
    """Compare with the whole decoding repeated step by step, with entropies and sets from their definitions."""
    context, question = prompt()
    model, new = engine("llama"), 12
    prefill = model.prefill(context, question)
    unlimited = recall(moments="never")
    entropies = []

    def by_hand(tau: float):
        policy = recall(tau=tau)
        setting = Setting(policy, Budget.parse("r0.25"), mode)
        k = setting.entries(len(context) + (0 if mode == "before_question" else len(question)))
        moments, back, steps = [], 0, 0

        def read(state, token, logits):
            nonlocal back, steps
            p = logits.double().softmax(-1)
            entropies.append(-(p * p.log()).sum().item())
            due = entropies[-1] >= tau
            before = [set(hot) for layer in state.layers for hot, _ in held(layer)]
            hook = policy.recalled if due else None
            state = model.extend(state, [token], setting.while_decoding, before_attention=hook)
            after = [set(hot[:-1]) for layer in state.layers for hot, _ in held(layer)]
            moments.extend([steps] if due else [])
            back += sum(len(new - old) for new, old in zip(after, before, strict=True))
            steps += 1
            return setting.hold(state, k)

        if mode == "before_question":
            state = begin(model, prefill, question, setting, Answer(3, new))
        else:
            compressed = setting.compress(prefill.prompt, k, 3, keep_last=True)
            state = read(compressed.without_last(), question[-1], prefill.prompt.logits)
        said = [int(state.logits.argmax())]
        while len(said) < new:
            state = read(state, said[-1], state.logits)
            said.append(int(state.logits.argmax()))
        return said, moments, back

    by_hand(math.inf)
    # between two entropies, so that rounding does not matter
    tau = sum(sorted(entropies)[5:7]) / 2
    said, moments, back = by_hand(tau)
    got = answered("llama", recall(tau=tau), mode, new=new)
    assert 0 < len(moments) < new - 1
    assert (got.tokens, got.record["moments"], got.record["recalled_entries"]) == (said, moments, back)
    never = answered("llama", unlimited, mode, new=new)
    entry = 2 * 8 * 4  # key and value of 8 channels, fp32
    assert got.record["recalled_bytes"] == back * entry
    assert got.record["moved_bytes"] == never.record["moved_bytes"] + 2 * back * entry
    assert got.record["hot_bytes"] == got.cache_bytes == got.kept[-1] * 3 * 2 * entry
    assert got.record["total_bytes"] == got.full_bytes


def test_an_answer_at_a_budget_that_keeps_everything_has_nothing_to_recall():
    context, question = prompt()
    model = engine("qwen2")
    setting = Setting(recall(tau=0.0), Budget.parse("t500"), "after_prompt")
    got = answer(model, model.prefill(context, question), question, setting, 3, seed=0)
    # K is the number of all entries, so the first step's own entry exceeds it by one
    assert got.record["triggers"] == 3
    assert got.record["hot_bytes"] <= got.record["total_bytes"] == got.full_bytes


def test_layers_with_a_sliding_window_are_left_alone():
    model, _ = sliding_model()
    context, question = prompt()
    setting = Setting(recall(moments="always"), Budget.parse("r0.25"), "after_prompt")
    facts = Answer(0, 5)
    state = begin(model, model.prefill(context, question), question, setting, facts)
    windows = []

    def hook(layer, queries, keys):
        windows.append(layer.window)
        return setting.policy.recalled(layer, queries, keys)

    state = model.extend(state, [4], setting.while_decoding, before_attention=hook)
    assert windows == [None]
    assert [isinstance(layer, TieredLayer) for layer in state.layers] == [False] * 5 + [True]
    assert [layer.n for layer in state.layers] == [16] * 5 + [facts.budget_entries + 1]


# --- moments of recall ---------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_definition():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.double().softmax(-1)
    assert token_entropy(logits) == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
    assert token_entropy(torch.zeros(1, 97)) == pytest.approx(math.log(97))
    assert token_entropy(torch.tensor([[0.0, -math.inf, -math.inf]])) == 0


def test_it_is_the_moment_at_tau_itself():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    tau = token_entropy(logits)
    assert recall(tau=tau).watch(0).before_attention(logits) is not None
    assert recall(tau=math.nextafter(tau, math.inf)).watch(0).before_attention(logits) is None


@given(st.data())
def test_controls_have_as_many_moments_as_the_answer_they_are_held_against(data):
    """Check that controls recall as often as the treated answer in as many steps, and as often in each further block.

    The gaps of periodic moments differ by at most one step.
    """
    steps = data.draw(st.integers(1, 40))
    m = data.draw(st.integers(0, steps))
    seed = data.draw(st.integers(0, 2**40))
    for moments in ("random", "periodic"):
        watch = recall(moments=moments, like="x").watch(seed, (m, steps))
        due = [watch.before_attention(torch.zeros(1, 3)) is not None for _ in range(3 * steps)]
        for block in range(3):
            assert sum(due[block * steps : (block + 1) * steps]) == m
        at = [i for i, is_due in enumerate(due) if is_due]
        if moments == "periodic" and len(at) > 1:
            gaps = {b - a for a, b in pairwise(at)}
            assert max(gaps) - min(gaps) <= 1


def test_random_moments_are_seeded_and_fall_anywhere():
    assert random_moments(3, 10, 1, 0) == random_moments(3, 10, 1, 0)
    assert len({random_moments(3, 10, 1, block) for block in range(20)}) > 10
    drawn = [random_moments(3, 10, seed, 0) for seed in range(2000)]
    counts = [sum(step in moments for moments in drawn) for step in range(10)]
    # expected value 600 each, standard deviation 20.5
    assert all(abs(count - 600) < 5 * 20.5 for count in counts)


def test_a_control_of_an_answer_without_steps_never_recalls():
    got = answered("qwen2", recall(moments="random", like="x"), pace=(0, 0))
    assert got.record["triggers"] == 0


@pytest.mark.parametrize("moments", ["random", "periodic"])
def test_controls_recall_at_the_treated_answers_count(moments):
    runs = (answered("qwen2", recall(tau=tau), new=14) for tau in (4.566, 4.567, 4.568, 4.569))
    treated = next(run for run in runs if run.record["triggers"] < run.record["steps"])
    assert treated.record["triggers"] > 0
    pace = (treated.record["triggers"], treated.record["steps"])
    control = answered("qwen2", recall(moments=moments, like="x"), new=14, pace=pace)
    assert (control.record["triggers"], control.record["steps"]) == pace


@pytest.mark.parametrize("moments", ["random", "periodic"])
@given(share=st.integers(1, 999).map(lambda n: n / 1000), seed=st.integers(0, 2**40))
@settings(max_examples=20)
def test_a_share_is_that_of_all_steps_and_needs_no_other_answer(moments, share, seed):
    watch = recall(moments=moments, share=share).watch(seed)
    due = [watch.before_attention(torch.zeros(1, 3)) is not None for _ in range(1000)]
    assert sum(due) == round(1000 * share)
    if moments == "periodic":  # every part of the answer has its share of the moments
        assert all(abs(sum(due[at : at + 100]) - 100 * share) < 1 for at in range(0, 1000, 100))


@pytest.mark.parametrize(
    ("options", "word"), [({"tau_quantile": 0.9}, "calibrates"), ({"moments": "random", "like": "x"}, "like")]
)
def test_what_the_moments_follow_from_must_be_known(options, word):
    with pytest.raises(UserError, match=word):
        answered("qwen2", recall(**options))


def test_a_score_is_that_of_the_inner_policy():
    state, _ = random_state(20)
    layer = state.layers[0]
    for inner in INNER:
        plain, wrapped = create(inner, {}), recall(inner=inner)
        assert torch.equal(wrapped.score(layer, 0, 8, 20, 0), plain.score(layer, 0, 8, 20, 0))
        assert wrapped.protected(8) == plain.protected(8)
        index = top(plain.score(layer, 0, 8, 20, 0), 8).expand(HKV, -1)
        assert torch.equal(wrapped.compress(state, 8).layers[0].positions, index)


# --- files -----------------------------------------------------------------------------------------------------------


def test_held_out_steps_have_the_entropies_of_plain_generation():
    """Compare with transformers' generate(); the last token is generated, but not read."""
    context, question = prompt()
    got = step_entropies(engine("qwen2"), context, question, 8)
    plain = random_model("qwen2").generate(
        torch.tensor([context + question]),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    p = torch.stack(plain.logits)[:-1, 0].double().softmax(-1)
    assert got == pytest.approx((-(p * p.log()).sum(-1)).tolist(), abs=1e-5)


def test_an_answer_that_ends_at_once_has_no_step(monkeypatch):
    model = engine("qwen2")
    first = int(model.extend(None, tokens(9)).logits.argmax())
    monkeypatch.setattr(model, "eos", frozenset([first]))
    assert step_entropies(model, tokens(9)[:5], tokens(9)[5:], 8) == []


def example(name, length, context=None):
    return {"example_id": name, "token_len": length, "context": context or name}


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 12), st.data())
def test_calibration_sees_no_document_of_a_cell(lengths, n, data):
    rows = [example(f"e{i}", length, f"document {i // 2}") for i, length in enumerate(lengths)]
    used = data.draw(st.sets(st.sampled_from([row["example_id"] for row in rows])))
    manifest = {"task": "t", "edges": [10, 20, 50], "bins": [{"example_ids": sorted(used)}, {"example_ids": []}]}
    seen = {row["context"] for row in rows if row["example_id"] in used}
    usable = [row for row in rows if 10 <= row["token_len"] <= 50 and row["context"] not in seen]
    if not usable:
        with pytest.raises(UserError, match="give tau itself"):
            held_out(rows, manifest, n)
        return
    chosen = held_out(rows, manifest, n)
    assert len(chosen) == min(n, len(usable))
    assert all(row in usable for row in chosen)
    short = [row["token_len"] < 20 for row in usable]
    least = min(n // 2, sum(short), len(short) - sum(short))
    assert min(sum(row["token_len"] < 20 for row in chosen), sum(row["token_len"] >= 20 for row in chosen)) >= least
    assert held_out(rows[::-1], manifest, n) == chosen


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30).map(sorted), st.floats(0, 1))
def test_a_quantile_is_numpys(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-9)


def test_a_calibrated_policy_recalls_above_its_quantile(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"entropies": [1.0, 2.0, 4.0]}))
    assert calibrated(recall(tau_quantile=0.75), str(file)).tau == 3.0
    assert calibrated(recall(tau=0.5), str(file)).tau == 0.5
    assert calibrated(create("h2o", {}), str(file)) == create("h2o", {})
    file.write_text(json.dumps({"entropies": []}))
    with pytest.raises(UserError, match="contains no decode step"):
        calibrated(recall(tau_quantile=0.75), str(file))


def test_paces_are_those_of_the_treated_cells_rows(tmp_path):
    rows = [
        {"example_id": "a", "repeat": 0, "raw": json.dumps({"triggers": 2, "steps": 7})},
        {"example_id": "a", "repeat": 1, "raw": json.dumps({"triggers": 0, "steps": 3})},
        {"example_id": "b", "repeat": 0, "raw": None},
    ]
    file = tmp_path / "bin0.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert paces(str(file)) == {("a", 0): (2, 7), ("a", 1): (0, 3), ("b", 0): (0, 0)}
    assert paces(None) == {}
