"""Test that generate() with an EvictingCache on plain models gives the tokens of the engine, of cells and of the
server."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, engine, random_model, sliding_model, tokens
from serving import NAME, ask, words
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, pipeline
from transformers.generation.streamers import BaseStreamer

import kv_transition as kvt
from kv_transition.api.chosen import budget_of, policy_of
from kv_transition.cache.state import EVERY
from kv_transition.cache.store import PrefillStore
from kv_transition.engines.local import LocalEngine
from kv_transition.policies import catalog
from kv_transition.policies.catalog import kinds
from kv_transition.run.command import answer_seed
from kv_transition.run.decode import Setting, answer
from kv_transition.serve.app import create_app
from kv_transition.serve.model import Served
from kv_transition.serve.prefills import Prefills
from kv_transition.studies.grid import run as cell

POLICIES = [
    *({"kind": kind} for kind in kinds()),
    {"kind": "entropy_recall", "tau": 1.0},
    {"kind": "entropy_recall", "moments": "always", "inner": "tova"},
    {"kind": "entropy_merge", "count_bias": True},
    {"kind": "streaming_llm", "positions": "cache"},
]
OWN_BUDGET = ("full", "quantized")
NEW = 8


@cache
def plain(family):
    """Return a model as transformers loads it, with transformers' attention."""
    model = random_model(family)
    model.set_attn_implementation("sdpa")
    return model


@cache
def told(family):
    return LocalEngine(engine(family).model, words())


def generated(model, prompts, cache=None, **options):
    """Return the new tokens of generate() for prompts padded on the left; greedy unless ``options`` say otherwise."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": mask} | options
    return model.generate(ids, past_key_values=cache, **options)[:, longest:].tolist()


def by_engine(family, context, question, policy, budget, mode, seed, new=NEW):
    """Return the answer of LocalEngine, which tests/test_engine.py compares with attention from its definition."""
    model, own = told(family), policy_of(policy)
    setting = Setting(own, budget_of(budget, own), mode)
    return answer(model, model.prefill(context, question, own.statistics), question, setting, new, seed)


def from_whole_prompt(family, context, question, policy, budget, mode, seed, new=NEW):
    """Return the same as `by_engine`, but read context and question together for kvzip, as a cache receives the
    prompt."""
    if mode == "before_question" or policy["kind"] != "kvzip":
        return by_engine(family, context, question, policy, budget, mode, seed, new)
    model, own = told(family), policy_of(policy)
    setting = Setting(own, budget_of(budget, own), mode)
    return answer(model, model.prefill(context + question, [], own.statistics), question, setting, new, seed)


def budget_for(policy, budget):
    return None if policy["kind"] in OWN_BUDGET else budget


# -- the same tokens


@cache
def client(family):
    own = told(family)
    return TestClient(create_app(Served(NAME, own, Prefills(own, 10**9, EVERY), 1024)))


def by_cell(folder, family, context, question, policy, budget, mode):
    """Return the text of the cell's only row; the seed of its answer is `answer_seed`."""
    spec = {
        "mode": mode, "policy": "mine", "kind": policy["kind"], "budget": str(budget_of(budget, policy_of(policy))),
        "first_token": "compressed", "hyper_parameters": catalog.resolve(policy["kind"], policy)[1],
        "decoding": {"temperature": 0.0, "repeats": 1, "batch": 1, "seed": 0},
    }  # fmt: skip
    example = {
        "task": "t", "example_id": "e0", "bin": 0, "prompt_sha256": "sha", "prompt_len": len(context + question),
        "context_ids": context, "question_ids": question, "max_new_tokens": NEW,
    }  # fmt: skip
    (row,) = cell.rows(told(family), [example], spec, PrefillStore(folder, mode="never"))
    return row["text"]


def by_server(family, context, question, policy, budget, mode, seed):
    """Return the tokens of the server's answer to a request."""
    chosen = catalog.resolve(policy["kind"], policy)[1] | {"kind": policy["kind"]}
    asked = {"kv_policy": chosen, "kv_mode": mode, "kv_seed": seed, "kv_context": len(context), "max_tokens": NEW}
    asked |= {} if budget is None else {"kv_budget": budget}
    return ask(client(family), prompt=context + question, **asked)["kv"]["token_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["before_question", "after_prompt"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy.values())))
def test_every_way_gives_the_same_tokens(tmp_path, family, mode, policy):
    context, question = tokens(64, seed=1), tokens(7, seed=2)
    seed = answer_seed(0, "e0", 0)
    budget = budget_for(policy, 0.3)
    expected = by_engine(family, context, question, policy, budget, mode, seed)

    at = len(context) if mode == "before_question" else None
    held = kvt.EvictingCache(plain(family), policy, budget, context_tokens=at, tokenizer=words(), seed=seed)
    in_one_piece = from_whole_prompt(family, context, question, policy, budget, mode, seed)
    assert generated(plain(family), [context + question], held) == [in_one_piece.tokens]
    assert held.entries == pytest.approx(in_one_piece.kept[-1])
    assert held.nbytes == in_one_piece.cache_bytes

    read = kvt.load(plain(family), words()).read(context, policies=[policy])
    by_name = read.ask(question, policy, budget, mode=mode, max_new_tokens=NEW, seed=seed)
    assert list(by_name.tokens) == expected.tokens
    assert by_name.cache_bytes == expected.cache_bytes

    said = words().decode(expected.tokens)
    assert by_cell(tmp_path, family, context, question, policy, budget, mode) == said
    assert by_server(family, context, question, policy, budget, mode, seed) == expected.tokens


def test_every_policy_is_among_them():
    newer = {"kvzip", "cake", "r_kv", "criticalkv", "lagkv", "chunkkv"}
    assert {policy["kind"] for policy in POLICIES} == set(kinds()) >= newer


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    policy=st.sampled_from(POLICIES),
    sizes=st.tuples(st.integers(2, 60), st.integers(1, 20)),
    budget=st.sampled_from([0.05, 0.3, 0.75, 1.0, {"tokens": 1}, {"tokens": 16}, {"tokens": 500}]),
    mode=st.sampled_from(["before_question", "after_prompt"]),
    chunk=st.sampled_from([None, 1, 7, 64]),
    seed=st.integers(0, 5),
)
def test_any_prompt_in_any_pieces_at_any_budget(tmp_path, family, policy, sizes, budget, mode, chunk, seed):
    context, question = tokens(sizes[0], seed=seed), tokens(sizes[1], seed=seed + 50)
    budget, drawn = budget_for(policy, budget), answer_seed(0, "e0", 0)
    expected = by_engine(family, context, question, policy, budget, mode, drawn)
    in_one_piece = from_whole_prompt(family, context, question, policy, budget, mode, drawn)
    at = len(context) if mode == "before_question" else None
    options = {"chunk_tokens": chunk, "tokenizer": words(), "seed": drawn}
    held = kvt.EvictingCache(plain(family), policy, budget, context_tokens=at, **options)
    assert generated(plain(family), [context + question], held) == [in_one_piece.tokens]
    assert held.get_seq_length() == sum(sizes) + NEW - 1
    said = words().decode(expected.tokens)
    assert by_cell(tmp_path, family, context, question, policy, budget, mode) == said
    assert by_server(family, context, question, policy, budget, mode, drawn) == expected.tokens


def test_sliding_window_layers_are_left_to_themselves():
    mine, twin = sliding_model()
    context, question = tokens(50), tokens(5, seed=1)
    setting = Setting(policy_of("h2o"), kvt.Budget.parse("r0.4"), "after_prompt")
    expected = answer(mine, mine.prefill(context, question), question, setting, NEW, 0)
    held = kvt.EvictingCache(twin, "h2o", 0.4)
    assert generated(twin, [context + question], held) == [expected.tokens]
    assert held.nbytes == expected.cache_bytes


# -- transformers' own use of the cache


def test_the_model_is_as_before_without_the_cache():
    model, prompt = random_model("llama"), tokens(40)
    before, forward = generated(model, [prompt]), model.config._attn_implementation
    generated(model, [prompt], kvt.EvictingCache(model, "snapkv", 0.2))
    assert generated(model, [prompt]) == before
    assert generated(model, [prompt], DynamicCache(config=model.config)) == before
    assert model.config._attn_implementation == forward
    with pytest.raises(IndexError):  # an error in the middle of a forward pass
        generated(model, [[VOCABULARY + 1, 5]], kvt.EvictingCache(model, "snapkv", 0.2))
    assert generated(model, [prompt]) == before
    twin = copy.deepcopy(model)
    assert generated(twin, [prompt], kvt.EvictingCache(twin, "full")) == before


def test_sampling_draws_from_the_compressed_cache():
    """Check that first draws follow the distribution of the engine's logits, and that a seed repeats them."""
    prompt, n = tokens(30, seed=3), 4000
    setting = Setting(policy_of("h2o"), kvt.Budget.parse("r0.3"), "after_prompt")
    model = engine("qwen2")
    state = setting.compress(model.extend(None, prompt), setting.entries(30), keep_last=True).without_last()
    expected = model.extend(state, prompt[-1:], setting.while_decoding).logits.softmax(-1)

    def draws():
        torch.manual_seed(5)
        held = kvt.EvictingCache(plain("qwen2"), "h2o", 0.3)
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": n, "max_new_tokens": 1}
        return generated(plain("qwen2"), [prompt], held, **options)

    first = draws()
    counts = torch.bincount(torch.tensor(first).flatten(), minlength=VOCABULARY) / n
    # five standard errors of a share of n draws
    assert (counts - expected).abs().max() < 5 * 0.5 / n**0.5
    assert draws() == first


@pytest.mark.parametrize("policy", [{"kind": k} for k in kinds() if k not in ("entropy_recall", "quantized")])
def test_a_batch_gives_what_each_prompt_gives_alone(policy):
    prompts = [tokens(n, seed=n) for n in (40, 60, 60)]
    budget = budget_for(policy, {"tokens": 16})

    def said(*prompts):
        held = kvt.EvictingCache(plain("qwen2"), policy, budget, tokenizer=words())
        return generated(plain("qwen2"), prompts, held)

    together = said(*prompts)
    alone = [said(prompt)[0] for prompt in prompts]
    assert together == alone


def test_answers_are_streamed():
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    heard, prompt = Heard(), tokens(30)
    held = kvt.EvictingCache(plain("qwen2"), "tova", 0.3)
    got = generated(plain("qwen2"), [prompt], held, streamer=heard)
    assert heard.tokens == prompt + got[0]
    assert heard.ended


def test_a_chat_pipeline_answers_from_it():
    model, tokenizer = plain("qwen2"), words()
    messages = [{"role": "user", "content": " ".join(f"w{i % 60}" for i in range(40))}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = by_engine("qwen2", ids[:-1], ids[-1:], {"kind": "h2o"}, 0.3, "after_prompt", 0)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    held = kvt.EvictingCache(model, "h2o", 0.3)
    (said,) = chat(messages, past_key_values=held, max_new_tokens=NEW, do_sample=False)
    assert said["generated_text"][-1]["content"] == tokenizer.decode(expected.tokens)


def test_a_policy_may_be_a_class_or_an_object_written_here():
    class Newest(kvt.Policy):
        """Keeps the newest entries."""

        def score(self, layer, index, k, length, seed):
            return layer.positions.float()

    prompt = tokens(40)
    made = [kvt.EvictingCache(plain("llama"), policy, 0.25) for policy in (Newest, Newest())]
    first, second = (generated(plain("llama"), [prompt], held) for held in made)
    assert first == second
    positions = made[0].state.layers[0].positions
    assert positions.tolist() == [[list(range(30, 40 + NEW - 1))] * 2]


def test_reset_makes_room_for_another_prompt():
    held = kvt.EvictingCache(plain("llama"), "random", 0.3, seed=4)
    first = generated(plain("llama"), [tokens(30)], held)
    held.reset()
    generated(plain("llama"), [tokens(40, seed=2)], held)
    held.reset()
    assert generated(plain("llama"), [tokens(30)], held) == first


# -- invalid use


def says(pattern):
    return pytest.raises(kvt.UserError, match=pattern)


def test_what_cannot_be_made_is_refused_in_a_sentence():
    model = plain("llama")
    with says("snapkv needs a budget: a fraction such as budget=0.2"):
        kvt.EvictingCache(model, "snapkv")
    with says("kvzip asks the model to repeat the prompt; give tokenizer="):
        kvt.EvictingCache(model, "kvzip", 0.2)
    with says("the hyper-parameters of full determine what it keeps"):
        kvt.EvictingCache(model, "full", 0.2)
    with says(r'128 is not in \(0, 1\]; a number of tokens is {"tokens": 128}'):
        kvt.EvictingCache(model, "snapkv", 128)
    with says("there is no policy 'snapvk'; choose one of"):
        kvt.EvictingCache(model, "snapvk", 0.2)
    with says("snapkv has no such hyper-parameter"):
        kvt.EvictingCache(model, {"kind": "snapkv", "windows": 3}, 0.2)
    with says("3 is not a policy"):
        kvt.EvictingCache(model, 3, 0.2)
    with says("prefills the prompt itself"):
        kvt.EvictingCache(model, "kvpress.KnormPress", 0.2)
    with says("not a language model of transformers"):
        kvt.EvictingCache("model", "snapkv", 0.2)


def test_a_model_that_cannot_be_evicted_is_refused():
    shape = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(**shape, intermediate_size=16, num_key_value_heads=2, sliding_window=8)
    with says("every layer of 'MistralForCausalLM' has a sliding window, so there is nothing to evict"):
        kvt.EvictingCache(MistralForCausalLM(config), "snapkv", 0.2)

    class Closed(GPT2LMHeadModel):
        _supports_attention_backend = False

    with says("the attention of Closed cannot be replaced"):
        kvt.EvictingCache(Closed(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30)), "snapkv", 0.2)


def test_a_cache_is_for_one_prompt():
    model, held = plain("llama"), kvt.EvictingCache(plain("llama"), "snapkv", 0.3)
    generated(model, [tokens(30)], held)
    for prompt in (tokens(30), tokens(90)):
        with says("already contains a prompt; create a new one for each prompt"):
            generated(model, [prompt], held)
    with says("use chunk_tokens instead of prefill_chunk_size"):
        generated(model, [tokens(30)], kvt.EvictingCache(model, "snapkv", 0.3), prefill_chunk_size=10)


def test_what_generate_cannot_do_with_it_is_refused():
    model, prompt = plain("llama"), [tokens(30)]
    with says("num_beams must be 1"):
        generated(model, prompt, kvt.EvictingCache(model, "snapkv", 0.3), num_beams=2)
    with says("cannot remove tokens"):
        generated(model, prompt, kvt.EvictingCache(model, "snapkv", 0.3), prompt_lookup_num_tokens=3)
    with says("belongs to another model"):
        generated(random_model("qwen2"), prompt, kvt.EvictingCache(model, "snapkv", 0.3))
    with says("inputs_embeds are not supported"):
        model(inputs_embeds=torch.zeros(1, 4, 32), past_key_values=kvt.EvictingCache(model, "snapkv", 0.3))
    with says("the prompt is empty"):
        generated(model, [[]], kvt.EvictingCache(model, "snapkv", 0.3))
    with says("must be smaller than the prompt"):
        generated(model, prompt, kvt.EvictingCache(model, "snapkv", 0.3, context_tokens=30))


def test_batches_that_do_not_fit_together_are_refused():
    model, long, short = plain("llama"), tokens(30), tokens(20, seed=1)
    mask = torch.tensor([[1] * 30, [1] * 20 + [0] * 10])
    with says("pad batches on the left"):
        generated(model, [long, short + [0] * 10], kvt.EvictingCache(model, "snapkv", 0.3), attention_mask=mask)
    with says("h2o acts at each token, so all sequences of a batch must hold the same number of entries"):
        generated(model, [long, short], kvt.EvictingCache(model, "h2o", 0.3))
    with says("entropy_recall decodes one answer at a time"):
        generated(model, [long, long], kvt.EvictingCache(model, "entropy_recall", 0.3))
    with says("one number per token"):
        mask = torch.ones(1, 1, 30, 30)
        model(torch.tensor([long]), attention_mask=mask, past_key_values=kvt.EvictingCache(model, "snapkv", 0.3))
