"""Test the Python library: read a context once, compress it, ask questions; compare with attention from its
definition."""

from __future__ import annotations

import subprocess
import sys

import polars as pl
import pytest
import torch
from models import VOCABULARY, engine, random_model, reference, tokens
from serving import words

import kv_transition as kvt
from kv_transition.data.prompts import PromptBuilder, Template
from kv_transition.policies.snapkv import SnapKV

CONTEXT, QUESTION = tokens(60, seed=1), tokens(6, seed=2)
WORDING = "w7 {context} w8 {input} w9"


@pytest.fixture
def model():
    return kvt.load(random_model("llama"), words(), template=WORDING, chat=False)


@pytest.fixture
def context(model):
    return model.read(CONTEXT)


def says(pattern):
    return pytest.raises(kvt.UserError, match=pattern)


# -- names


def test_importing_the_package_takes_no_torch():
    heavy = ("torch", "transformers", "altair", "polars", "numpy")
    code = f"import sys, kv_transition; print([name for name in {heavy} if name in sys.modules])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert {name: getattr(kvt, name).__name__ for name in kvt.__all__} == {name: name for name in kvt.__all__}
    assert set(kvt.__all__) <= set(dir(kvt))
    with pytest.raises(AttributeError, match="has no attribute 'lead'"):
        _ = kvt.lead


# -- read and ask


def test_a_context_is_read_once_and_each_question_by_itself(model, monkeypatch):
    fed, extend = [], model.engine.extend
    monkeypatch.setattr(model.engine, "extend", lambda state, ids, *more, **named: (
        fed.append(len(ids)) or extend(state, ids, *more, **named)
    ))  # fmt: skip
    context = model.read(CONTEXT)
    compressed = [context.compress(policy, 0.3) for policy in ("h2o", "snapkv", "knorm")]
    assert fed == [len(CONTEXT)]
    for held in compressed:
        held.ask(QUESTION, max_new_tokens=3)
    # the question, and two of the three answer tokens, because the last one is not read
    assert fed == [len(CONTEXT)] + [len(QUESTION), 1, 1] * 3


@pytest.mark.parametrize("policy", ["full", "h2o", "snapkv", "adakv", "entropy_merge", "quantized"])
def test_questions_do_not_change_what_they_are_asked_of(context, policy):
    budget = None if policy in ("full", "quantized") else 0.3
    others = [tokens(n, seed=n) for n in (3, 9)]
    alone = context.compress(policy, budget).ask(QUESTION)
    held = context.compress(policy, budget)
    for other in others:
        held.ask(other)
    assert held.ask(QUESTION).tokens == alone.tokens
    assert context.ask(QUESTION, policy, budget).tokens == alone.tokens


def test_the_full_cache_answers_as_a_plain_forward_pass(context):
    reply = context.ask(QUESTION, max_new_tokens=5)
    logits, _ = reference("llama", CONTEXT + QUESTION + list(reply.tokens))
    drawn = logits[len(CONTEXT + QUESTION) - 1 : -1]
    assert list(reply.tokens) == drawn.argmax(-1).tolist()
    probabilities = drawn.double().softmax(-1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    assert reply.entropies == pytest.approx(entropies.tolist(), abs=1e-5)
    assert reply.kept == tuple(float(len(CONTEXT + QUESTION) + i) for i in range(5))
    assert reply.cache_bytes == reply.full_bytes


@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
def test_entropies_belong_to_the_tokens(context, mode):
    """Check that each token has one entropy, also with a step observer and with a last prompt token that is read
    again."""
    for policy in ("h2o", {"kind": "entropy_recall", "tau": 1.0}):
        longer = context.ask(QUESTION, policy, 0.3, mode=mode, max_new_tokens=6)
        shorter = context.ask(QUESTION, policy, 0.3, mode=mode, max_new_tokens=3)
        assert len(longer.entropies) == len(longer.tokens) == 6
        assert shorter.entropies == longer.entropies[:3]
        assert all(0 <= entropy <= torch.log(torch.tensor(float(VOCABULARY))) for entropy in longer.entropies)


def test_texts_are_worded_as_the_pipeline_words_them(model):
    """Check that texts are put into the template as in the pipeline."""
    text, question = "w1 w2 w3", "w4 w5"
    prompt = PromptBuilder(words(), Template.parse(WORDING, "t"), 100, False)(text, question)
    assert model.context_ids(text) == prompt.context_ids == [7, 1, 2, 3]
    assert model.question_ids(text, question) == prompt.question_ids == [8, 4, 5, 9]
    told = kvt.load(model.engine.model, words(), template="{context} {input}")
    prompt = PromptBuilder(words(), Template.parse("{context} {input}", "t"), 100, True)(text, question)
    assert told.context_ids(text) == prompt.context_ids
    assert told.question_ids(text, question) == prompt.question_ids
    answer = told.read(text).ask(question, max_new_tokens=4)
    assert str(answer) == answer.text == words().decode(answer.tokens)


def test_a_model_from_a_folder_is_the_same_model(tmp_path, model):
    random_model("llama").save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    loaded = kvt.load(tmp_path, template=WORDING, chat=False, device="cpu")
    assert loaded.read("w1 w2 w3").ask("w4").tokens == model.read("w1 w2 w3").ask("w4").tokens


# -- kept entries


def test_the_kept_positions_are_a_row_each(context):
    kept = context.compress("streaming_llm", {"tokens": 10}).kept()
    held = [*range(4), *range(54, 60)]
    layers, heads = range(3), range(2)
    expected = [(layer, head, position) for layer in layers for head in heads for position in held]
    assert kept.rows() == expected
    assert kept.columns == ["layer", "head", "position"]


def test_heads_may_keep_different_numbers(context):
    counts = context.compress("adakv", 0.5).kept().group_by("layer", "head").len()
    assert counts["len"].n_unique() > 1
    assert counts.group_by("layer").agg(pl.col("len").sum())["len"].to_list() == [2 * 30] * 3


@pytest.mark.parametrize("columns", [7, 60, 100])
def test_the_heat_map_shows_the_share_of_each_stretch(context, columns):
    compressed = context.compress("h2o", 0.5)
    drawn = kvt.heat_map(compressed, columns).data
    for layer in range(3):
        positions = compressed.kept().filter(layer=layer)["position"]
        for row in drawn.filter(layer=layer).iter_rows(named=True):
            inside = positions.is_between(row["start"], row["end"], closed="left").sum()
            assert row["share"] == pytest.approx(inside / (2 * (row["end"] - row["start"])))
    assert drawn.group_by("layer").agg((pl.col("end") - pl.col("start")).sum())["end"].to_list() == [60] * 3


def streaming_sees(n, length, sinks, k):
    """Return the mask of a stream whose first n tokens are read in full, and which then holds k entries at each
    token."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(n, length):
        visible[i, sinks : i - (k - sinks)] = False
    return visible


@pytest.mark.parametrize("policy", ["full", "streaming_llm"])
def test_a_text_is_scored_against_what_is_left(context, policy):
    text = tokens(12, seed=3)
    scored = context.compress(policy, None if policy == "full" else {"tokens": 10}).score(text)
    k = 10 if policy == "streaming_llm" else 10**6
    visible = streaming_sees(len(CONTEXT), len(CONTEXT + text), 4, k).expand(2, -1, -1)
    logits, _ = reference("llama", CONTEXT + text, [visible] * 3)
    own = logits[len(CONTEXT) : -1].double().log_softmax(-1)
    expected = [-float(row[token]) for row, token in zip(own, text[1:], strict=True)]
    assert scored.nats == pytest.approx(expected, abs=1e-4)
    assert scored.perplexity == pytest.approx(torch.tensor(expected).mean().exp().item(), rel=1e-4)


# -- user-defined policies


class Oldest(kvt.Policy):
    """Keeps the oldest entries."""

    def score(self, layer, index, k, length, seed):
        return -layer.positions.float()


@pytest.mark.parametrize("policy", [Oldest, Oldest()])
def test_a_policy_is_given_as_a_class_or_an_object(context, policy):
    compressed = context.compress(policy, 0.25)
    assert compressed.policy == "Oldest"
    assert sorted(set(compressed.kept()["position"])) == list(range(15))


@pytest.mark.parametrize("policy", ["snapkv", {"kind": "snapkv"}])
def test_a_policy_is_given_by_name(context, policy):
    assert context.compress(policy, 0.25).kept().equals(context.compress(SnapKV, 0.25).kept())


# -- the grid


def test_the_grid_is_what_asking_gives(context):
    """Check that the grid has the answers and scores that single questions give."""
    questions = [QUESTION, tokens(4, seed=5)]
    full = [context.ask(q, max_new_tokens=4).text for q in questions]
    table = kvt.grid(
        context, questions, ["snapkv", "quantized", "full"], [0.2, {"tokens": 30}], answers=[[full[0]], ["w1"]],
        max_new_tokens=4,
    )  # fmt: skip
    cells = [("full", "r1"), ("snapkv", "r0.2"), ("snapkv", "t30"), ("quantized", "r1")]
    assert table.select("policy", "budget", "question").rows() == [(*cell, i) for cell in cells for i in range(2)]
    assert table["score"][:2].to_list() == [1.0, float(full[1].split() == ["w1"])]
    assert table.filter(policy="snapkv")["share"].to_list() == [0.2, 0.2, 0.5, 0.5]
    for policy, budget, number, text in table.select("policy", "budget", "question", "text").iter_rows():
        asked = context.ask(questions[number], policy, None if budget == "r1" else budget, max_new_tokens=4)
        assert text == asked.text


def test_the_grid_after_the_prompt_is_what_asking_gives(context):
    """Check a grid with compression after the prompt, and that a plot without scores is refused."""
    table = kvt.grid(context, [QUESTION], {"mine": Oldest}, [0.5], mode="after_prompt", max_new_tokens=4)
    asked = context.ask(QUESTION, Oldest, 0.5, mode="after_prompt", max_new_tokens=4)
    assert table.filter(policy="mine")["text"].to_list() == [asked.text]
    assert table["score"].null_count() == len(table)
    with says("no scores to draw; give the right answers to grid"):
        kvt.plot(table)


def test_the_plot_shows_mean_scores_against_bytes():
    rows = [("full", "r1", 0, 1.0, 100), ("full", "r1", 1, 0.5, 100)]
    rows += [("snapkv", "r0.2", 0, 0.5, 20), ("snapkv", "r0.2", 1, 0.0, 30), ("snapkv", "r0.5", 0, 1.0, 50)]
    table = pl.DataFrame(rows, schema=["policy", "budget", "question", "score", "cache_bytes"], orient="row")
    chart = kvt.plot(table.with_columns(full_bytes=pl.lit(100)))
    line, points, whole = chart.layer
    assert line.data.select("budget", "score", "held").rows() == [("r0.2", 0.25, 0.25), ("r0.5", 1.0, 0.5)]
    assert points.data.equals(line.data)
    assert whole.data["score"].to_list() == [0.75]
    assert "2 questions about one context" in chart.to_dict()["title"]["subtitle"]


# -- invalid use


def test_bad_use_is_a_sentence(model, context):
    with says("snapkv needs a budget"):
        context.compress("snapkv")
    with says("the hyper-parameters of quantized determine what it keeps"):
        context.compress("quantized", 0.2)
    with says(r"budget: 2 is not in \(0, 1\]"):
        context.compress("snapkv", 2)
    with says("there is no policy 'snap'"):
        context.compress("snap", 0.2)
    with says("'later' is neither before_question nor after_prompt"):
        context.ask(QUESTION, "h2o", 0.2, mode="later")
    with says("snapkv reads recent_queries, which this cache does not have"):
        model.read(CONTEXT, policies=["knorm"]).compress("snapkv", 0.2)
    with says("the context is empty"):
        model.read([])
    with says("the question is empty"):
        context.ask([])
    with says("max_new_tokens: 0 leaves no answer"):
        context.ask(QUESTION, max_new_tokens=0)
    with says("a text of 1 tokens cannot be scored"):
        context.compress("full").score([3])
    with says("loaded without a tokenizer; give one to load"):
        kvt.load(engine("qwen2").model).read("w1")
    with says(r"it must contain \{input\}"):
        kvt.load(random_model("llama"), words(), template="{context} w1")
    with says("not a language model of transformers"):
        kvt.load(3)


def test_a_grid_that_cannot_be_made_is_a_sentence(context):
    with says("questions: give a list"):
        kvt.grid(context, "w1", ["snapkv"], [0.2])
    with says("answers: there are 2 for 1 questions"):
        kvt.grid(context, [QUESTION], ["snapkv"], [0.2], answers=[["a"], ["b"]])
    with says("give a list of texts for each question"):
        kvt.grid(context, [QUESTION], ["snapkv"], [0.2], answers=["a"])
    with says("metric: there is no 'f1'"):
        kvt.grid(context, [QUESTION], ["snapkv"], [0.2], metric="f1")
    with says("policies: snapkv occurs twice"):
        kvt.grid(context, [QUESTION], ["snapkv", {"kind": "snapkv", "window": 4}], [0.2])
