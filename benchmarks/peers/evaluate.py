"""One run of kvpress' own evaluation flow: a process per press and ratio, a prefill per example, greedy answers.

    .venv-kvpress/bin/python benchmarks/peers/evaluate.py --model FOLDER --data FILE.jsonl --press SnapKVPress
        --ratio 0.8 --max-new-tokens 32 --output predictions.csv

The steps are those of kvpress' evaluate.py (its `evaluation` folder, which the package does not contain): press, text
generation pipeline, a data frame grouped by context, answers into a CSV. Left out is what would only cost it time here:
its command line, its registry of all benchmarks' scorers and the download of a data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kvpress
import pandas as pd
import torch
from shim import cache_positions
from transformers import PreTrainedTokenizerFast, pipeline


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--press", required=True)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    press = getattr(kvpress, arguments.press)(compression_ratio=arguments.ratio)
    generator = pipeline(
        "kv-press-text-generation",
        model=str(arguments.model),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(arguments.model / "tokenizer"),
        device="cpu",
    )
    generator.model.eval()
    examples = pd.read_json(arguments.data, lines=True, dtype={"id": str})
    examples["predicted_answer"] = None
    with cache_positions(generator.model):
        for context, group in examples.groupby("context"):
            output = generator(
                context,
                questions=group["question"].to_list(),
                press=press,
                max_new_tokens=arguments.max_new_tokens,
            )
            examples.loc[group.index, "predicted_answer"] = output["answers"]
    examples.drop(columns="context").to_csv(arguments.output, index=False)


if __name__ == "__main__":
    main()
