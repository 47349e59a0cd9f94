"""Test conversations on one growing cache against transformers' generate, a model of sets, and masked attention."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from fractions import Fraction

import pyarrow.parquet as pq
import pytest
import torch
from dialogues import FOLDING, text, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, engine, random_model, reference, sliding_model, tokens

from kv_transition import settings as settings_module
from kv_transition import specs
from kv_transition.budget import Budget
from kv_transition.engines import loading
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters, kinds
from kv_transition.run.decode import Answer
from kv_transition.studies.chat import multiturn, text_drop
from kv_transition.studies.chat import run as chat
from kv_transition.studies.chat import specs as chat_specs
from kv_transition.studies.chat.run import CacheMemory, TurnSetting, play, repetition
from kv_transition.studies.chat.tables import CHAT, CHAT_LAYERS
from kv_transition.studies.chat.turns import Turn

DATA = os.environ.get("KVT_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="KVT_DATA names no folder with real files: real chats are skipped")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

KINDS = [kind for kind in kinds() if kind not in ("full", "entropy_recall")]
EVICTING = [kind for kind in KINDS if kind not in ("entropy_merge", "quantized")]
"""policies that do not change the entries that they keep"""


def policy(kind: str, **options):
    return create(kind, hyper_parameters(kind) | options)


def script(lengths: list[tuple[int, int]], closing: int = 2) -> list[Turn]:
    """Return turns whose opening has the given number of random tokens, with a short closing."""
    return [Turn("", tokens(n, seed=10 * i), tokens(closing, seed=10 * i + 1)) for i, (n, _) in enumerate(lengths)]


def game(local, lengths, kind="full", budget="r1", closing=2, hold=True, **options):
    """Return the turns that `play` yields for a conversation; lengths: (user tokens, answer tokens) of each turn."""
    turns = script(lengths, closing)
    memory = CacheMemory(turns, TurnSetting(policy(kind, **options), Budget.parse(budget), mode="chat"), hold)
    return list(play(local, turns, memory, [Answer(seed, n) for seed, (_, n) in enumerate(lengths)]))


LENGTHS = [(17, 6), (3, 9), (11, 1), (1, 7)]


# the full cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stops", [False, True])
def test_the_full_cache_says_what_an_uninterrupted_conversation_does(family, stops):
    """Compare each token with transformers' generate, which reads the whole conversation again in each turn."""
    local = engine(family)
    if stops:  # some of the answers end before their maximum length
        said = [one.answer.tokens for one in game(local, LENGTHS)]
        local = LocalEngine(local.model)
        local.eos = frozenset({said[0][3], said[1][0]})
    plain = random_model(family)
    ids, expected, reasons = [], [], []
    turns = script(LENGTHS)
    for turn, (_, n) in zip(turns, LENGTHS, strict=True):
        ids += turn.opening
        out = plain.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=sorted(local.eos) or None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        reasons.append("stop" if out[-1] in local.eos else "length")
        answer = out[:-1] if out[-1] in local.eos else out
        expected.append(answer)
        ids += [*answer, *turn.closing]
    played = game(local, LENGTHS)
    assert [one.answer.tokens for one in played] == expected
    assert [one.answer.finish_reason for one in played] == reasons
    assert {*reasons} == ({"stop", "length"} if stops else {"length"})
    assert played[-1].after is played[-1].before
    assert played[-1].after.length == played[-1].seen == len(ids)
    for layer in played[-1].after.layers:
        assert layer.positions.tolist() == [list(range(len(ids)))] * layer.positions.shape[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_one_changes_nothing(kind):
    if policy(kind).ignores_budget is True:
        return
    full = game(engine("qwen2"), LENGTHS)
    same = game(engine("qwen2"), LENGTHS, kind, "r1")
    assert [one.answer.tokens for one in same] == [one.answer.tokens for one in full]


# kept entries, by definition

turn_lengths = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 8)), min_size=1, max_size=5)
budgets = st.sampled_from(["r0.5", "r0.2", "r0.9", "t7", "t30"])


def kept_of(budget: str, n: int) -> int:
    return min(int(budget[1:]), n) if budget[0] == "t" else math.ceil(Fraction(budget[1:]) * n)


@settings(max_examples=40, deadline=None)
@given(
    lengths=turn_lengths,
    budget=budgets,
    n_sink=st.integers(0, 6),
    recent=st.sampled_from([None, 1, 5, 40]),
    hold=st.booleans(),
)
def test_streaming_holds_the_first_and_the_last_tokens(lengths, budget, n_sink, recent, hold):
    """Compare with sets of positions: K at the end of each turn; with `hold`, K after each reading from the second turn
    on."""
    held: set[int] = set()
    length = 0
    expected = []

    def read(n: int, evict: bool) -> None:
        nonlocal length, held
        held |= set(range(length, length + n))
        length += n
        k = kept_of(budget, length)
        if not evict:
            return
        rest = k // 2 if recent is None else max(k // 2, k - recent)
        sinks = {p for p in held if p < min(n_sink, rest)}
        most = k if recent is None else min(k, min(n_sink, rest) + recent)
        others = sorted(held - sinks)
        held = sinks | set(others[max(0, len(others) - (most - len(sinks))) :])

    for number, (asked, said) in enumerate(lengths):
        read(asked, hold and number > 0)
        for _ in range(said - 1):
            read(1, hold and number > 0)
        read(1 + 2, hold and number > 0)  # the last answer token and the closing
        read(0, evict=True)
        expected.append(sorted(held))

    played = game(engine("llama"), lengths, "streaming_llm", budget, hold=hold, n_sink=n_sink, recent=recent)
    left = 0
    for number, (one, positions) in enumerate(zip(played, expected, strict=True)):
        for layer in one.after.layers:
            assert layer.positions.tolist() == [positions] * layer.positions.shape[0]
        grown = left + sum(lengths[number]) + 2
        assert (one.before.entries == grown) if number == 0 or not hold else (one.before.entries <= grown)
        left = len(positions)


@settings(max_examples=30, deadline=None)
@given(lengths=turn_lengths, budget=budgets, per_head=st.booleans())
def test_random_keeps_k_of_what_was_left_and_what_is_new(lengths, budget, per_head):
    played = game(engine("qwen2"), lengths, "random", budget, per_head=per_head)
    before: list[list[set[int]]] = [[set(), set()] for _ in range(3)]
    seen = 0
    for one, (asked, said) in zip(played, lengths, strict=True):
        new = set(range(seen, seen + asked + said + 2))
        seen += len(new)
        assert one.seen == seen
        k = min(kept_of(budget, seen), len(before[0][0] | new))
        after = [[set(head) for head in layer.positions.tolist()] for layer in one.after.layers]
        for number, heads in enumerate(after):
            for head, positions in enumerate(heads):
                assert len(positions) == k
                assert positions <= before[number][head] | new
                assert one.before.layers[number].positions[head].tolist() == sorted(before[number][head] | new)
        if not per_head:
            assert all(heads == after[0] for heads in [*after, *([a] * 2 for a in after[0])])
        before = after


def test_random_draws_anew_in_each_turn_layer_and_head():
    """Compare indices in the cache, which has 46 entries in both turns: an equal draw would keep the same indices."""
    kept = []
    for one in game(engine("qwen2"), [(40, 4), (17, 4)], "random", "r0.5"):
        assert one.before.entries == 46
        for before, after in zip(one.before.layers, one.after.layers, strict=True):
            for there, left in zip(before.positions.tolist(), after.positions.tolist(), strict=True):
                kept.append({there.index(position) for position in left})
    first, second = kept[:6], kept[6:]
    assert all(a != b for i, a in enumerate(first) for b in first[:i])
    assert not any(a <= b for a in first for b in second)


@pytest.mark.parametrize("kind", EVICTING)
@pytest.mark.parametrize("budget", ["r0.4", "t12"])
def test_the_budget_is_of_all_tokens_and_what_is_gone_stays_gone(kind, budget):
    local = engine("qwen2")
    lengths = [(30, 5), (4, 6), (20, 3), (9, 2)]
    before: list[list[set[int]]] | None = None
    seen = 0
    for one, (asked, said) in zip(game(local, lengths, kind, budget), lengths, strict=True):
        new = set(range(seen, seen + asked + said + 2))
        seen += len(new)
        assert one.answer.budget_entries == kept_of(budget, seen)
        assert one.after.entries == pytest.approx(kept_of(budget, seen), abs=1e-9)
        after = [[set(h.tolist()) for p in layer.parts for h in p.positions] for layer in one.after.layers]
        for number, heads in enumerate(after):
            for head, positions in enumerate(heads):
                assert positions <= (new if before is None else before[number][head] | new)
        before = after


@pytest.mark.parametrize("kind", ["entropy_merge", "quantized"])
def test_merged_and_quantized_caches_go_on_over_the_turns(kind):
    budget = "r1" if kind == "quantized" else "r0.4"
    played = game(engine("qwen2"), LENGTHS, kind, budget)
    full = game(engine("qwen2"), LENGTHS)
    for one, whole in zip(played, full, strict=True):
        assert one.after.nbytes < 0.7 * whole.after.nbytes
        assert one.after.entries == pytest.approx(kept_of(budget, one.seen))


def test_entropy_recall_plays_on_what_it_put_aside():
    never = game(engine("qwen2"), LENGTHS, "entropy_recall", "r0.4", moments="never")
    inner = game(engine("qwen2"), LENGTHS, "h2o", "r0.4")
    assert [one.answer.tokens for one in never] == [one.answer.tokens for one in inner]
    always = game(engine("qwen2"), LENGTHS, "entropy_recall", "r0.4", moments="always")
    assert always[1].answer.record["triggers"] == LENGTHS[1][1] - 1
    assert always[1].answer.record["recalled_entries"] > 0


def test_kvzip_chooses_among_all_entries_of_a_turn_that_is_over():
    """Compare with KVzip on the whole turn as one text. Without the repetition, answers would take the whole budget."""
    lengths = [(17, 6), (3, 9), (11, 8)]
    state, seen, kvzip = None, 0, policy("kvzip")
    for turn, one in zip(script(lengths), game(engine("qwen2"), lengths, "kvzip", "r0.3"), strict=True):
        said = [*turn.opening, *one.answer.tokens, *turn.closing]
        seen += len(said)
        state = kvzip.compress(engine("qwen2").extend(state, said, kvzip.statistics), kept_of("r0.3", seen))
        for layer, expected in zip(one.after.layers, state.layers, strict=True):
            for part, own in zip(layer.parts, expected.parts, strict=True):
                assert part.reconstruction.isfinite().all()
                assert part.positions.tolist() == own.positions.tolist()


# positions


class Recording(LocalEngine):
    """Record what was read on top of which state, and the resulting logits."""

    def extend(self, state, ids, *args, **kwargs):
        after = super().extend(state, ids, *args, **kwargs)
        self.heard.append((state, list(ids), after.logits))
        return after

    def repeated(self, state, ids):
        heard = len(self.heard)
        after = super().repeated(state, ids)
        del self.heard[heard:]  # tokens that are read to repeat a text are not part of the conversation
        return after


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EVICTING)
def test_positions_stay_true(family, kind):
    """Compare the logits after every reading with attention over the whole text in which evicted entries are masked."""
    local = Recording(engine(family).model)
    local.heard = []
    game(local, LENGTHS, kind, "r0.3")
    ids = [token for _, said, _ in local.heard for token in said]
    masks = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().repeat(3, 2, 1, 1)
    start, ends = 0, []
    for state, said, _ in local.heard:
        stop = start + len(said)
        for number, layer in enumerate(state.layers if state else []):
            for head, positions in enumerate(h for part in layer.parts for h in part.positions):
                masks[number, head, start:stop, :start] = False
                masks[number, head, start:stop, positions] = True
        start = stop
        ends.append(stop - 1)
    expected, _ = reference(family, ids, list(masks))
    unmasked, _ = reference(family, ids)
    got = torch.stack([logits for *_, logits in local.heard])
    torch.testing.assert_close(got, expected[ends], rtol=0, atol=2e-5)
    assert (expected[ends] - unmasked[ends]).abs().max() > 1e-2, "nothing was forgotten: nothing was tested"


# rows

MODEL = {"name": "x", "revision": None, "fingerprint": "x", "dtype": "float32"}


def spec(kind="full", budget="r1", **changes) -> dict:
    options = {} if kind == "text_drop" else hyper_parameters(kind)
    return {
        "chat_set": "set",
        "policy": kind,
        "kind": kind,
        "hyper_parameters": options,
        "budget": budget,
        "max_tokens": 6,
        "max_length": 1000,
        "chat_template": "auto",
        "hold": True,
        "answer_nll": True,
        "seed": 0,
        "model": MODEL,
    } | changes


def conversation(*users: str, system: str | None = None) -> dict:
    turns = [{"content": content, "checks": [{"id": f"c{i}"}]} for i, content in enumerate(users)]
    return {"conversation_id": "a", "system": system, "turns": json.dumps(turns)}


def talker(family="qwen2", template=FOLDING) -> LocalEngine:
    return LocalEngine(engine(family).model, word_tokenizer(template))


USERS = [text(20), text(5, 30), text(14, 50), text(9, 2)]


def rows_of(local, kind="full", budget="r1", users=USERS, system="w7 w8", **changes):
    own = conversation(*users, system=system)
    turns = chat.turns_of(local.tokenizer, own, chat=True)
    return chat.conversation_rows(local, own, turns, spec(kind, budget, **changes), chat=True)


def test_the_rows_add_up():
    local = talker()
    made = rows_of(local, "random", "r0.5")
    assert set(made.rows[0]) <= set(CHAT.names)
    assert set(made.layers[0]) <= set(CHAT_LAYERS.names)
    seen, left = 0, 0.0
    for number, row in enumerate(made.rows, 1):
        seen += row["prompt_tokens"] + row["completion_tokens"]
        assert row["turn"] == number
        assert row["user"] == USERS[number - 1]
        assert row["tokens_seen"] == seen
        assert row["entries_before"] == left + row["prompt_tokens"] + row["completion_tokens"]
        assert row["entries_after"] == row["budget_entries"] == math.ceil(seen / 2)
        left = row["entries_after"]
        a_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, channels, bytes
        assert row["bytes_before"] == row["entries_before"] * a_token
        assert row["bytes_after"] == row["total_bytes_after"] == left * a_token
        assert row["full_bytes"] == seen * a_token
        assert json.loads(row["checks"]) == [{"id": f"c{number - 1}"}]
        ids = json.loads(row["raw"])["token_ids"]
        assert row["text"] == local.tokenizer.decode(ids, skip_special_tokens=True)
        assert row["ttft_s"] <= row["read_s"]
        for when in ("before", "after"):
            own = [r for r in made.layers if r["turn"] == number and r["when"] == when]
            assert [r["layer"] for r in own] == [0, 1, 2]
            assert sum(r["bytes"] for r in own) == row[f"bytes_{when}"]
            assert {(r["kind"], r["kv_heads"], r["head_dim"], r["dtype"]) for r in own} == {("full", 2, 8, "float32")}
            assert {r["bytes_per_token"] for r in own} == {a_token / 3}


@pytest.mark.parametrize("kind", ["full", "random"])
def test_the_answers_are_scored_under_the_full_cache_of_their_own_conversation(kind):
    local = talker()
    made = rows_of(local, kind, "r1" if kind == "full" else "r0.3")
    turns = chat.turns_of(local.tokenizer, conversation(*USERS, system="w7 w8"), chat=True)
    ids, spans = [], []
    for turn, row in zip(turns, made.rows, strict=True):
        ids += turn.opening
        said = json.loads(row["raw"])["token_ids"]
        spans.append((len(ids), len(ids) + len(said)))
        ids += [*said, *turn.closing]
    logits, _ = reference("qwen2", ids)
    nats = -logits.log_softmax(-1)
    for row, (start, stop) in zip(made.rows, spans, strict=True):
        expected = sum(float(nats[i - 1, ids[i]]) for i in range(start, stop)) / (stop - start)
        assert row["answer_nll"] == pytest.approx(expected, abs=1e-4)
    assert all("answer_nll" not in row for row in rows_of(local, kind, "r0.3", answer_nll=False).rows)


@given(st.lists(st.integers(0, 3), max_size=20))
def test_repetition_is_the_share_of_grams_that_were_there_before(said):
    grams = [said[i : i + 4] for i in range(len(said) - 3)]
    again = [gram in grams[:i] for i, gram in enumerate(grams)]
    assert repetition(said) == (pytest.approx(sum(again) / len(again)) if again else None)


def test_a_turn_that_does_not_fit_is_a_row_and_so_are_those_after_it(monkeypatch):
    local = talker()
    good = rows_of(local)
    extend, third = LocalEngine.extend, chat.turns_of(local.tokenizer, conversation(*USERS), chat=True)[2].opening

    def out_of_memory(self, state, ids, *args, **kwargs):
        if list(ids) == third:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB\nmore lines")
        return extend(self, state, ids, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "extend", out_of_memory)
    made = rows_of(local)
    assert [row.get("error") for row in made.rows] == [None, None, *["OOM: Tried to allocate 9 GiB"] * 2]
    assert [row.get("text") for row in made.rows] == [row["text"] for row in good.rows[:2]] + [None, None]
    assert [row.get("answer_nll") for row in made.rows[:2]] == [
        pytest.approx(row["answer_nll"], abs=1e-5) for row in good.rows[:2]
    ]
    assert {row["turn"] for row in made.layers} == {1, 2}


def test_a_conversation_ends_where_it_grows_longer_than_the_model_may_read():
    made = rows_of(talker(), max_length=60)
    kinds = [(row.get("error") or "fine").partition(":")[0] for row in made.rows]
    ends = [row.get("tokens_seen") for row in rows_of(talker()).rows]
    openings = [len(t.opening) for t in chat.turns_of(talker().tokenizer, conversation(*USERS, system="w7 w8"), True)]
    starts = [end + n for end, n in zip([0, *ends], openings, strict=False)]
    assert kinds == ["fine" if start <= 60 else "TOO_LONG" for start in starts]
    assert {*kinds} == {"fine", "TOO_LONG"}


# sliding-window layers, 4 bit


def test_layers_with_a_window_are_listed_apart_and_left_alone():
    local, plain = sliding_model()
    local.tokenizer = word_tokenizer(FOLDING)
    made = rows_of(local, "streaming_llm", "t10")
    windows = loading.layer_windows(plain.config)
    for row in made.layers:
        window = windows[row["layer"]]
        assert row["kind"] == ("full" if window is None else "sliding")
        if window is not None:
            assert row["entries"] == min(window, made.rows[row["turn"] - 1]["tokens_seen"])
        elif row["when"] == "after":
            assert row["entries"] == 10
    last = made.rows[-1]
    own = [row["bytes"] for row in made.layers if (row["turn"], row["when"]) == (4, "after")]
    full = [row["bytes"] for row in made.layers if (row["turn"], row["when"], row["kind"]) == (4, "after", "full")]
    assert last["bytes_after"] == sum(full) < sum(own) == last["total_bytes_after"]


@needs_bitsandbytes
def test_a_model_shaped_like_gemma_3_plays_in_4_bit(tmp_path):
    config = sliding_model()[1].config
    torch.manual_seed(5)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    type(sliding_model()[1])(type(config)(**config.to_dict() | shape)).save_pretrained(tmp_path)
    nf4 = {"kind": "nf4", "double_quantization": True, "compute_dtype": "float32"}
    local = LocalEngine(loading.load_model(str(tmp_path), device="cpu", quantization=nf4), word_tokenizer(FOLDING))
    assert type(local.model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    local.eos = frozenset()
    full = rows_of(local, users=USERS[:2])
    for kind, budget in (("streaming_llm", "t10"), ("random", "r0.5")):
        made = rows_of(local, kind, budget, users=USERS[:2])
        assert [row["completion_tokens"] for row in made.rows] == [6, 6]
        assert made.rows[0]["text"] == full.rows[0]["text"]
        assert made.rows[1]["entries_after"] == made.rows[1]["budget_entries"]
        assert all(math.isfinite(row["answer_nll"]) for row in made.rows)


# the control text_drop


class Heard(LocalEngine):
    def extend(self, state, ids, *args, **kwargs):
        if state is None:
            self.afresh.append(list(ids))
        return super().extend(state, ids, *args, **kwargs)


def test_text_drop_drops_text_and_no_entries():
    local = Heard(engine("qwen2").model, word_tokenizer(FOLDING))
    local.afresh = []
    made = rows_of(local, "text_drop", "r0.5", answer_nll=False)
    tokenizer = local.tokenizer
    assert [row["policy"] for row in made.rows] == ["text_drop"] * 4
    for row, reread in zip(made.rows, local.afresh[1:], strict=True):
        assert row["entries_after"] == len(reread) <= row["budget_entries"] == math.ceil(row["tokens_seen"] / 2)
        # the template adds six tokens per turn, and the six answer tokens may contain no words
        assert row["entries_after"] > row["budget_entries"] - 12
        # whole turns in the template's form: only text is removed
        words = tokenizer.decode(reread)
        assert words.startswith("<bos> <start> user w7 w8")
        assert words.count("<start>") == words.count("<end>") == 2 * (words.count("<start> user"))
        assert json.loads(row["raw"])["read_again"] == len(reread)


def test_text_drop_remembers_what_a_model_that_read_only_the_rest_does():
    local = Recording(engine("qwen2").model, word_tokenizer(FOLDING))
    local.heard = []
    rows_of(local, "text_drop", "r0.5", answer_nll=False)
    checked = 0
    for state, said, logits in local.heard:
        if state is None:
            ids = []
        ids = [*ids, *said]
        expected, _ = reference("qwen2", ids)
        torch.testing.assert_close(logits, expected[-1], rtol=0, atol=2e-5)
        checked += 1
    assert checked == len(local.heard)
    assert sum(state is None for state, *_ in local.heard) == 5


def test_text_drop_with_room_for_all_drops_nothing():
    local = talker()
    full, dropped = rows_of(local), rows_of(local, "text_drop", "t1000")
    assert [row["text"] for row in dropped.rows] == [row["text"] for row in full.rows]
    assert {json.loads(row["raw"])["dropped_words"] for row in dropped.rows} == {0}


def test_text_drop_can_forget_everything():
    made = rows_of(talker(), "text_drop", "t2")
    assert [row["entries_after"] for row in made.rows] == [0] * 4
    alone = [rows_of(talker(), users=[user], system=None).rows[0] for user in USERS[1:]]
    assert [row["text"] for row in made.rows[1:]] == [row["text"] for row in alone]


exchanges = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4)


@given(exchanges=exchanges, system=st.integers(0, 3), k=st.integers(0, 30))
def test_as_few_words_as_need_be_are_cut_and_in_order(exchanges, system, k):
    words = iter(f" w{i}" for i in range(100))

    def some(n: int) -> tuple[str, ...]:
        return tuple(next(words) for _ in range(n))

    told = some(system)
    turns = tuple(text_drop.Exchange(some(a), some(b), None) for a, b in exchanges)

    def flat(version) -> list[str]:
        own, rest = version
        return [*own, *(word for turn in rest for word in (*turn.user, *turn.said))]

    everything = flat((told, turns))
    first = [*turns[0].user, *turns[0].said]
    middle = [word for turn in turns[1:-1] for word in (*turn.user, *turn.said)]
    last = [*turns[-1].user, *turns[-1].said] if len(turns) > 1 else []
    order = [*middle, *first[::-1], *told[::-1], *last]
    got = flat(text_drop.cut((told, turns), lambda version: len(flat(version)) <= k))
    gone = max(0, len(everything) - k)
    if len(turns) == 1 and gone >= len(first):  # a system message without a turn is removed as well
        gone = len(order)
    assert got == [word for word in everything if word not in order[:gone]]


# settings and jobs


def parsed(**changes) -> settings_module.Settings:
    policies = {"full": {}, "random": {"per_head": False}, "int4": {"kind": "quantized"}}
    config = {
        "chat": {"source": "generated", "n": 2, "controls": ["text_drop"]},
        "model": {"name": "org/model", "device": "cpu"},
        "kv": {"policies": policies, "budgets": [1, 0.5, {"tokens": 100}]},
    } | changes
    return settings_module.parse(config)


def test_the_grid_of_conversations():
    own = parsed()
    specs.check(own)
    assert chat_specs.cells(own) == [
        ("full", "r1"),
        ("int4", "r1"),
        ("random", "r0.5"),
        ("random", "t100"),
        ("text_drop", "r0.5"),
        ("text_drop", "t100"),
    ]
    control = chat_specs.cell(own, "text_drop", "t100")
    assert (control["kind"], control["hyper_parameters"]) == ("text_drop", {})
    assert chat_specs.cells(parsed(chat=None, perplexity={"corpus": "text", "path": "x"})) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv": {"policies": {"full": {}, "text_drop": {}}, "budgets": [0.5]}}, "chat.controls: [text_drop]"),
        ({"kv": {"policies": {"full": {}, "a": {"kind": "text_drop"}}, "budgets": [0.5]}}, "not a cache policy"),
        ({"kv": {"policies": {"full": {}, "kvpress.KnormPress": {}}, "budgets": [0.5]}}, "kvpress.KnormPress"),
        (
            {"kv": {"policies": {"full": {}, "entropy_recall": {"tau_quantile": 0.5}}, "budgets": [0.5]}},
            "cannot be calibrated on conversations",
        ),
        (
            {"kv": {"policies": {"full": {}}, "budgets": [0.5]}, "chat": {"source": "turns", "path": "no.json"}},
            "no.json",
        ),
        ({"chat": {"source": "mt_bench"}}, "chat.path"),
        ({"chat": {"source": "generated"}}, "chat.n"),
        ({"chat": {"source": "generated", "n": 2, "path": "x.json"}}, "chat.path"),
        ({"chat": {"source": "generated", "n": 2, "controls": ["full"]}}, "chat.controls"),
    ],
)
def test_what_cannot_be_played_is_refused_before_it_begins(changes, said):
    with pytest.raises(UserError) as error:
        specs.check(parsed(**changes))
    assert said in str(error.value)


@needs_data
@pytest.mark.parametrize(
    ("source", "file", "n", "turns"),
    [("mt_bench", "mt_bench_question.jsonl", 2, 2), ("mt_eval", "mteval_refinement_multi_inst.jsonl.gz", 1, 3)],
)
def test_real_conversations_are_played_by_a_real_small_model(tmp_path, source, file, n, turns):
    own = settings_module.parse(
        {
            "chat": {"source": source, "path": f"{DATA}/chat/{file}", "n": n, "max_turns": turns, "max_tokens": 8},
            "model": {"name": f"{DATA}/stories260K-hf", "device": "cpu"},
            "kv": {"policies": {"full": {}, "h2o": {}}, "budgets": [0.2]},
        }
    )
    specs.check(own)
    read = str(tmp_path / "c.parquet")
    assert multiturn.main(["--spec", json.dumps(chat_specs.conversations(own)), "--output", read]) == 0
    for key in chat_specs.cells(own):
        output, layers = (str(tmp_path / f"{key[0]}{end}.parquet") for end in ("", ".layers"))
        asked = ["--spec", json.dumps(chat_specs.cell(own, *key))]
        chat.main([*asked, "--conversations", read, "--output", output, "--layers", layers])
        table = pq.read_table(output)
        assert table.schema.equals(CHAT)
        rows = table.to_pylist()
        assert [row["turn"] for row in rows] == [*range(1, turns + 1)] * n
        assert {row["error"] for row in rows} == {None}
        assert {row["completion_tokens"] for row in rows} == {8}
        assert all(0 < row["answer_nll"] < 10 for row in rows)
        assert len(pq.read_table(layers)) == len(rows) * 5 * 2
        budget = Budget.parse(key[1])
        assert [row["entries_after"] for row in rows] == [budget.kept(row["tokens_seen"]) for row in rows]
        metadata = pq.read_schema(output).metadata
        assert metadata[b"chat_template"] == b"plain"
