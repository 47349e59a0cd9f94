"""The minimum cost of the grid: one process, each document read once, plain decoding.

    python benchmarks/floor.py --model FOLDER --data FILE.jsonl --budgets 0.5 0.2 --policies 5 --max-new-tokens 32

transformers alone, with its own attention and cache, greedy, one sequence at a time, one thread. Plain decoding uses as
many entries as a policy would keep, every n-th of them, because the choice has no effect on the cost. The full cache
also answers once, as in the grid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast


def answer(
    model: torch.nn.Module, layers: list[tuple[torch.Tensor, torch.Tensor]], kept: torch.Tensor, n: int,
    question: list[int], steps: int,
) -> None:  # fmt: skip
    """Read a question on top of the kept entries of ``n`` and decode ``steps`` tokens."""
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, kept], values[:, :, kept], number)
    feed, at = question, n
    for _ in range(steps):
        positions = torch.arange(at, at + len(feed))[None]
        output = model(torch.tensor([feed]), past_key_values=cache, position_ids=positions, logits_to_keep=1)
        at += len(feed)
        feed = [int(output.logits[0, -1].argmax())]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", required=True)
    parser.add_argument("--policies", type=int, required=True, help="how many there are beside the full cache")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="sdpa").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model / "tokenizer")
    for line in arguments.data.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        context = tokenizer(record["context"])["input_ids"]
        question = tokenizer(record["question"], add_special_tokens=False)["input_ids"]
        cache, n = DynamicCache(config=model.config), len(context)
        model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        shares = [1.0, *(budget for budget in arguments.budgets for _ in range(arguments.policies))]
        for share in shares:
            kept = torch.linspace(0, n - 1, max(1, int(share * n))).long()
            answer(model, layers, kept, n, question, arguments.max_new_tokens)


if __name__ == "__main__":
    main()
