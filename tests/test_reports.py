"""Test kinds of bugs that were reported for similar projects (table in docs/reliability.md).

Models of other shapes are compared with their own eager attention, without a cache.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import tokens
from transformers import AttentionInterface

from kv_transition.budget import Budget
from kv_transition.engines.loading import load_model, refuse_unsupported
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create, hyper_parameters, kinds, statistics
from kv_transition.run.decode import Setting, answer

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def rope(kind: str, **keys: object) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind} | keys}


RIGHT = {
    "one KV head": ("Llama", {"num_key_value_heads": 1}),
    "a KV head for each": ("Llama", {"num_key_value_heads": 4}),
    "tied weights": ("Llama", {"tie_word_embeddings": True}),
    "rope linear": ("Llama", rope("linear", factor=4.0)),
    "rope yarn": ("Llama", rope("yarn", factor=2.0, original_max_position_embeddings=32)),
    "rope llama3": ("Llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=32)),
    "experts": ("Mixtral", {"num_local_experts": 4}),
    "experts of Qwen3": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                      "moe_intermediate_size": 16}),
    "norms of queries and keys": ("Qwen3", {"head_dim": 8}),
    "partial rotation": ("Glm", SPECIAL | {"head_dim": 8}),
    "layers without positions": ("SmolLM3", SPECIAL),
    "learned positions": ("OPT", SPECIAL | {"ffn_dim": 48, "max_position_embeddings": 256}),
}  # fmt: skip
REFUSED = {
    "soft caps": ("Gemma2", {"head_dim": 8, "sliding_window": 16}, "caps its attention logits"),
    "attention sinks": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16}, "attention sinks"),
    "latent attention": ("DeepseekV3", {"n_routed_experts": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "n_group": 1,
                                        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 16, "topk_group": 1,
                                        "num_experts_per_tok": 2, "num_key_value_heads": 4}, "different sizes"),
    "state spaces beside attention": ("FalconH1", {}, "kind hybrid"),
    "linear attention": ("Jamba", {}, "kind linear_attention"),
    "chunks": ("Llama4", {}, "kind chunked_attention"),
    "windows only": ("Mistral", {"sliding_window": 16}, "nothing to evict"),
}  # fmt: skip


def twins(family: str, **changes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a random model with peaked attention, and its copy that uses this project's attention."""
    AttentionInterface.register(ATTENTION, attention_function)
    config = getattr(transformers, family + ("TextConfig" if family == "Llama4" else "Config"))(**SHAPE | changes)
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data.mul_(8)
    model.requires_grad_(False)
    own = copy.deepcopy(model)
    own.config._attn_implementation = ATTENTION
    own.set_attn_implementation(ATTENTION)
    return model, own


@pytest.mark.parametrize("shape", RIGHT)
def test_models_of_other_shapes_read_as_their_own_attention_does(shape):
    """Compare reading in chunks and token by token, also beyond the original maximum position."""
    family, changes = RIGHT[shape]
    plain, own = twins(family, **changes)
    ids = tokens(100)
    expected = plain(torch.tensor([ids]), use_cache=False).logits[0].float()
    engine = LocalEngine(own)
    state = engine.extend(engine.extend(None, ids[:40]), ids[40:90])
    got = [state.logits]
    for token in ids[90:95]:
        state = engine.extend(state, [token])
        got.append(state.logits)
    torch.testing.assert_close(torch.stack(got), expected[89:95], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", REFUSED)
def test_attention_of_another_kind_is_refused_and_never_answered_wrongly(shape):
    family, changes, said = REFUSED[shape]
    _, own = twins(family, **changes)

    def read() -> None:
        refuse_unsupported(own.config, "this model")
        LocalEngine(own).extend(None, tokens(20))

    with pytest.raises(UserError, match=said):
        read()


def test_a_model_that_keeps_to_its_own_attention_is_refused(tmp_path):
    """Check a model with position biases instead of rotation, which would answer with an empty cache."""
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"0 of 2 layers use transformers' attention interface"):
        LocalEngine(load_model(str(tmp_path), device="cpu")).extend(None, tokens(20))


LENGTH_DEPENDENT = {
    "dynamic": ("Llama", rope("dynamic", factor=2.0)),
    "longrope": ("Phi3", SPECIAL | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
                 | rope("longrope", short_factor=[1.0] * 4, long_factor=[3.0] * 4, partial_rotary_factor=1.0,
                        original_max_position_embeddings=64)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_scaling_that_follows_the_length_reads_as_transformers_own_cache_does(kind):
    """Compare with transformers' cache: the frequencies depend on the length so far, so keys in a cache have different
    ones."""
    family, changes = LENGTH_DEPENDENT[kind]
    plain, own = twins(family, **changes)
    with pytest.raises(UserError, match=rf"^prefill\.chunk_tokens: .*\({kind}\)"):
        LocalEngine(own, chunk_tokens=16)
    ids = tokens(100)
    output = plain(torch.tensor([ids[:90]]), use_cache=True)
    expected = [output.logits[0, -1]]
    for token in ids[90:95]:
        output = plain(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        expected.append(output.logits[0, -1])
    engine = LocalEngine(own)
    state = engine.extend(None, ids[:90])
    got = [state.logits]
    for token in ids[90:95]:
        state = engine.extend(state, [token])
        got.append(state.logits)
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind not in ("full", "entropy_recall")])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_prompt_shorter_than_every_window_is_answered(kind, length, heads):
    """Check prompts that are shorter than the observation window, the sinks and the recent tokens, with 1 and 2 KV
    heads."""
    _, own = twins("Llama", num_key_value_heads=heads)
    engine = LocalEngine(own)
    prefill = engine.prefill(tokens(length), tokens(2, seed=1), statistics(kind))
    for mode in ("before_question", "after_prompt"):
        setting = Setting(create(kind, hyper_parameters(kind)), Budget.parse("r0.5"), mode)
        assert len(answer(engine, prefill, tokens(2, seed=1), setting, 4, seed=0).tokens) == 4


@pytest.mark.parametrize("kind", ["snapkv", "h2o", "streaming_llm", "adakv", "pyramidkv"])
def test_half_precision_on_a_cpu_answers(kind):
    _, own = twins("Llama")
    engine = LocalEngine(own.to(torch.bfloat16))
    prefill = engine.prefill(tokens(60), tokens(5, seed=1), statistics(kind))
    got = answer(engine, prefill, tokens(5, seed=1), Setting(create(kind, hyper_parameters(kind)),
                 Budget.parse("r0.3"), "after_prompt"), 8, seed=0)  # fmt: skip
    assert len(got.tokens) == 8
    assert torch.isfinite(prefill.prompt.logits).all()
