"""Tiny random models of three families, and attention computed from its definition as an independent reference."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, attention_function

FAMILIES = ["qwen2", "llama", "mistral"]
VOCABULARY = 97

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def random_model(family: str, **changes) -> torch.nn.Module:
    """Return a seeded model whose attention is peaked, so that the choice of evicted entries changes the result."""
    torch.manual_seed(7)
    shape = SHAPE | changes
    config, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    if family == "mistral":
        shape["sliding_window"] = None
    model = model_class(config(**shape, attn_implementation="eager")).eval()
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data.mul_(12)
    model.generation_config.eos_token_id = None
    return model


@cache
def engine(family: str) -> LocalEngine:
    AttentionInterface.register(ATTENTION, attention_function)
    model = random_model(family)
    model.set_attn_implementation(ATTENTION)
    return LocalEngine(model)


def sliding_model() -> tuple[LocalEngine, torch.nn.Module]:
    """Return a Gemma-3-shaped model and its copy with eager attention; five layers with a window of 16 tokens, one
    without."""
    AttentionInterface.register(ATTENTION, attention_function)
    config = Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 16},
    )
    twins = []
    for implementation in (ATTENTION, "eager"):
        torch.manual_seed(7)
        model = Gemma3ForCausalLM(copy.deepcopy(config)).eval()
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.data.add_(1.5)
        model.requires_grad_(False)
        model.generation_config.eos_token_id = None
        model.set_attn_implementation(implementation)
        twins.append(model)
    return LocalEngine(twins[0]), twins[1]


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _written_out(module, query, key, value, attention_mask, *, scaling, visible, captured=None, **_):
    """Compute softmax attention entry by entry; visible[layer] is a boolean mask [Hkv, T, T] (query, entry)."""
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = visible[module.layer_idx].repeat_interleave(group, 0)
    logits = (query @ keys.transpose(2, 3)).double() * scaling
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    if captured is not None:
        captured[module.layer_idx] = (weights[0], query[0], key[0], value[0])
    return (weights.to(value.dtype) @ values).transpose(1, 2), None


@cache
def _written_out_model(family: str) -> torch.nn.Module:
    AttentionInterface.register("written_out", _written_out)
    model = random_model(family)
    model.set_attn_implementation("written_out")
    return model


@torch.no_grad()
def reference(family: str, ids: list[int], visible: list[torch.Tensor] | None = None):
    """Run one forward pass over all tokens without a cache; return logits [T, V] and (weights [H, T, T], q, k, v) per
    layer."""
    model = _written_out_model(family)
    kv_heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().expand(kv_heads, -1, -1)
    captured: dict[int, tuple] = {}
    output = model(
        input_ids=torch.tensor([ids]), use_cache=False, visible=visible or [causal] * layers, captured=captured
    )
    return output.logits[0].float(), [captured[i] for i in range(layers)]
