"""Write a tiny GGUF file in the form of llama.cpp's converter; build the transformers model with the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from models import random_model
from transformers import LlamaForCausalLM

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["t h", "th e", "Ġ the", "o n", "i n"]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def vocabulary() -> list[str]:
    """Return the special tokens, the 256 characters that represent bytes as in GPT-2, and the merged tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(plain))]
    return [*SPECIAL, *map(chr, plain), *others, *(merge.replace(" ", "") for merge in MERGES)]


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return a seeded model of 3 layers whose sizes are multiples of 32, the size of a quantized block."""
    model = random_model(
        "llama",
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    return model.to(dtype)


def write_gguf(path: Path, model: LlamaForCausalLM | None = None, quantized: bool = False) -> str:
    """Write ``model`` (`tiny_llama`) with its tokenizer; return the path. quantized: store the layers' matrices as
    Q8_0."""
    model = model or tiny_llama()
    config, tokens = model.config, vocabulary()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # the output weights are tied to the embeddings
            continue
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp rotates adjacent channels, transformers the two halves of a head
            array = np.ascontiguousarray(
                array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
            )
        if quantized and ".layers." in name and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _name(name: str) -> str:
    """Return llama.cpp's name of a weight of transformers' Llama."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, *part, weight = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(part)]}.{weight}"
