"""The network of both embedded models: a four-layer Qwen2 model, its initial weights and its optimisers."""

from __future__ import annotations

import math

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

PAD, BOS, EOS, UNK = range(4)
MUON_FACTOR = 5.0
"""learning rate of Muon over that of AdamW"""
EMBEDDING_STD = 0.08
PREVIOUS_TOKEN_GAIN = 4.5


def model_config(vocabulary: int, max_position_embeddings: int) -> Qwen2Config:
    """Return the architecture of the embedded models."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(seed: int, config: Qwen2Config) -> Qwen2ForCausalLM:
    """Return the model with its initial weights, which depend on the seed only."""
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 0.5 / math.sqrt(config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, EMBEDDING_STD, generator=generator)
            else:
                scale = residual_scale if "o_proj" in name or "down_proj" in name else 1.0
                parameter.normal_(0.0, scale / math.sqrt(parameter.shape[1]), generator=generator)
        set_previous_token_heads(model)
    return model


def set_previous_token_heads(model: Qwen2ForCausalLM) -> None:
    """Make head h of layer 0 look h + 1 tokens back, whatever the tokens are.

    A constant query and key score cos(theta * distance) on each rotary plane. Turning the query by theta * offset moves
    the peak from distance 0 to the offset; the three fastest planes make it sharp.
    """
    attention = model.model.layers[0].self_attn
    head_dim = model.config.head_dim
    planes = torch.arange(3)
    theta = model.config.rope_parameters["rope_theta"] ** (-2 * planes / head_dim)
    query_bias = attention.q_proj.bias.view(-1, head_dim)
    for head in range(len(query_bias)):
        angle = theta * (head + 1)
        query_bias[head, planes] = PREVIOUS_TOKEN_GAIN * torch.cos(angle)
        query_bias[head, planes + head_dim // 2] = -PREVIOUS_TOKEN_GAIN * torch.sin(angle)
    attention.k_proj.bias.view(-1, head_dim)[:, planes] = PREVIOUS_TOKEN_GAIN
    attention.q_proj.weight.mul_(0.3)  # content should not drown position
    attention.k_proj.weight.mul_(0.3)


def build_optimizers(model: Qwen2ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimiser, learning rate factor): Muon for the matrices, AdamW for all other parameters."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "embed_tokens" in name]
    return [
        (torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="original"), MUON_FACTOR),
        (torch.optim.AdamW(others, betas=(0.9, 0.97), weight_decay=0.0), 1.0),
    ]
