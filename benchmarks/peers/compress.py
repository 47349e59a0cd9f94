"""What kvpress keeps of a prompt, and how the model goes on from there.

    .venv-kvpress/bin/python benchmarks/peers/compress.py CASES.json OUT.safetensors

CASES.json: ``{"tokens": [n ids], "cases": {name: {"model": folder, "press": class, "arguments": {}, "ratio": removed,
"max_pooling": bool, "question": [ids], "steps": t}}}``; ``press`` may be ``AdaKVPress(SnapKVPress)``.

OUT holds per case ``name.kept`` [L, Hkv, n] bool and ``name.tokens`` [t] int64, and per model ``folder.keys`` and
``folder.values`` [L, Hkv, n, d] of the full cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import kvpress
import torch
from kvpress.presses import snapkv_press
from safetensors.torch import save_file
from shim import cache_positions
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache


def press_of(name: str, arguments: dict[str, Any], ratio: float) -> Any:
    outer, _, inner = name.partition("(")
    if inner:
        scorer = getattr(kvpress, inner.removesuffix(")"))(compression_ratio=ratio, **arguments)
        return getattr(kvpress, outer)(press=scorer)
    return getattr(kvpress, outer)(compression_ratio=ratio, **arguments)


def max_pooling(attention: Tensor, kernel_size: int, padding: int, stride: int, group: int) -> Tensor:
    """attention [1, H, n] -> its group's mean, pooled by max, for every head of the group.

    Pooling makes plateaus; of equal entries the first is a trifle better, which settles the choice.
    """
    mean = attention.double().unflatten(1, (-1, group)).mean(2, keepdim=True).expand(-1, -1, group, -1).flatten(1, 2)
    pooled = functional.max_pool1d(mean, kernel_size, stride=stride, padding=padding)
    return pooled - 1e-14 * torch.arange(pooled.shape[-1])


def read(model: torch.nn.Module, tokens: list[int], press: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with cache_positions(model), press(model) if press else contextlib.nullcontext():
        model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    return cache


def kept(model: torch.nn.Module, full: DynamicCache, cache: DynamicCache) -> Tensor:
    """[L, Hkv, n]: which entries of the full cache are still there, found by their keys."""
    layers = []
    for number, (before, after) in enumerate(zip(full.layers, cache.layers, strict=True)):
        same = (before.keys[0][:, :, None] == after.keys[0][:, None]).all(-1).any(-1)
        masked = getattr(model.model.layers[number].self_attn, "masked_key_indices", None)
        if masked is not None:  # a press that masks leaves all entries where they are
            same[masked[1], masked[2]] = False
        layers.append(same)
    return torch.stack(layers)


def go_on(model: torch.nn.Module, cache: DynamicCache, length: int, question: list[int], steps: int) -> Tensor:
    """The question and ``steps`` greedy tokens, at their true positions."""
    tokens, feed = [], question
    for _ in range(steps):
        positions = torch.arange(length, length + len(feed))[None]
        logits = model(input_ids=torch.tensor([feed]), past_key_values=cache, position_ids=positions).logits
        length += len(feed)
        feed = [int(logits[0, -1].argmax())]
        tokens += feed
    return torch.tensor(tokens)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = json.loads(arguments.cases.read_text())
    tokens, found = given["tokens"], {}
    models: dict[str, torch.nn.Module] = {}
    for name, case in given["cases"].items():
        folder = case["model"]
        if folder not in models:
            models[folder] = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        model = models[folder]
        model.config.name_or_path = f"{folder}/tokenizer"  # where KVzipPress looks for the tokenizer
        # CriticalKVPress reads it, and not every family's config has it
        config = model.config
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # the only press that has to see all attention weights
        model.set_attn_implementation("eager" if case["press"] == "ObservedAttentionPress" else "sdpa")
        full = read(model, tokens, None)
        for part in ("keys", "values"):
            found[f"{folder}.{part}"] = torch.cat([getattr(layer, part) for layer in full.layers])
        press = press_of(case["press"], case["arguments"], case["ratio"])
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        patch = mock.patch.object(snapkv_press.F, "avg_pool1d", partial(max_pooling, group=group))
        with patch if case["max_pooling"] else contextlib.nullcontext():
            cache = read(model, tokens, press)
        found[f"{name}.kept"] = kept(model, full, cache)
        found[f"{name}.tokens"] = go_on(model, cache, len(tokens), case["question"], case["steps"])
    save_file(found, arguments.output)


if __name__ == "__main__":
    main()
