"""The minimum cost of the grid: one process, each document read once, plain decoding.

    python benchmarks/floor.py --model FOLDER --data FILE.jsonl --budgets 0.5 0.2 --policies 5 --max-new-tokens 32

transformers alone, with its own attention and cache, greedy, one thread; documents are read one at a time. Plain
decoding uses as many entries as a policy would keep, every n-th of them, because the choice has no effect on the cost.
The full cache also answers once, as in the grid. With ``--batch``, so many answers are decoded together, if their
documents have the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""keys and values [B, Hkv, n, d] of each layer"""


def answer(
    model: torch.nn.Module, layers: Layers, kept: torch.Tensor, n: int, questions: list[list[int]], steps: int
) -> None:
    """Read a question of each sequence on top of the kept entries of ``n`` and decode ``steps`` tokens."""
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, kept], values[:, :, kept], number)
    feed, at = torch.tensor(questions), n
    for _ in range(steps):
        q = feed.shape[1]
        positions = torch.arange(at, at + q)[None]
        output = model(feed, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        at += q
        feed = output.logits[:, -1].argmax(-1, keepdim=True)
        feed.tolist()


def read(model: torch.nn.Module, context: list[int]) -> Layers:
    cache = DynamicCache(config=model.config)
    model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", required=True)
    parser.add_argument("--policies", type=int, required=True, help="how many there are beside the full cache")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1, help="answers that are decoded together")
    parser.add_argument("--output", type=Path, required=True, help="JSON file: CPU seconds by kind")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="sdpa").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model / "tokenizer")
    records = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    spent = {"load": time.process_time(), "read": 0.0, "decode": 0.0}
    shares = [1.0, *(budget for budget in arguments.budgets for _ in range(arguments.policies))]
    for first in range(0, len(records), arguments.batch):
        own = records[first : first + arguments.batch]
        contexts = [tokenizer(record["context"])["input_ids"] for record in own]
        questions = [tokenizer(record["question"], add_special_tokens=False)["input_ids"] for record in own]
        started = time.process_time()
        found = [read(model, context) for context in contexts]
        layers = found[0] if len(found) == 1 else [
            tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in zip(*found, strict=True)
        ]  # fmt: skip
        del found
        between = time.process_time()
        n = len(contexts[0])
        for share in shares:
            kept = torch.linspace(0, n - 1, max(1, int(share * n))).long()
            answer(model, layers, kept, n, questions, arguments.max_new_tokens)
        spent["read"] += between - started
        spent["decode"] += time.process_time() - between
    arguments.output.write_text(json.dumps({kind: round(seconds, 2) for kind, seconds in spent.items()}))


if __name__ == "__main__":
    main()
