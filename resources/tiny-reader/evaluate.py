"""Measure what the tiny reader answers right with its full cache.

    python resources/tiny-reader/evaluate.py

For each length, documents of the ``test`` split are read once and a question of each kind is asked on a
branch of the cache. Greedy decoding; an answer counts if it equals the expected one word by word. Writes
``evaluation.json`` next to the weights and renews the table in the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import defaultdict
from pathlib import Path

from kv_transition.data import synthetic

HERE = Path(__file__).resolve().parent

LENGTHS = (256, 512, 1024, 2048, 4096)
PROCESSES = 2
MAX_NEW_TOKENS = 12  # the longest answer, two names and ", based in", has 7 words
TABLE_MARKS = ("<!-- evaluation: begin -->", "<!-- evaluation: end -->")


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, by default at 95 %."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def load(folder: Path):
    """Return (tokenizer, model) with the weights in fp32."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    torch.set_num_threads(1)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), model.eval()


def answers(tokenizer, model, context: str, questions: list[str]) -> tuple[int, list[str]]:
    """Read a context once and answer each question from the cache as it was after the context.

    Returns:
        The number of tokens in the context and the answers.
    """
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        context_ids = tokenizer(context, return_tensors="pt").input_ids
        n_context = context_ids.shape[1]
        cache = DynamicCache(config=model.config)
        model.model(input_ids=context_ids, past_key_values=cache, use_cache=True)
        found = []
        for question in questions:
            segment = synthetic.QUESTION_TEMPLATE.format(question=question)
            ids = tokenizer(segment, add_special_tokens=False, return_tensors="pt").input_ids
            new: list[int] = []
            while len(new) < MAX_NEW_TOKENS:
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = int(output.logits[0, -1].argmax())
                if token == model.config.eos_token_id:
                    break
                new.append(token)
                ids = torch.tensor([[token]])
            found.append(tokenizer.decode(new))
            cache.crop(n_context - cache.get_seq_length())  # drop what the branch added
    return n_context, found


def measure(arguments: tuple[Path, int, int, int, int]) -> tuple[list[int], list[dict]]:
    """Answer questions on every ``PROCESSES``-th document of one length, from document ``first`` on."""
    folder, length, n_documents, seed, first = arguments
    tokenizer, model = load(folder)
    streams = [synthetic.reader_qa([length], n_documents, seed, {kind: 1.0}) for kind in synthetic.KINDS]
    sizes, results = [], []
    for i, examples in enumerate(zip(*streams, strict=True)):
        if i % PROCESSES != first:
            continue
        size, found = answers(tokenizer, model, examples[0]["context"], [e["question"] for e in examples])
        sizes.append(size)
        for example, answer in zip(examples, found, strict=True):
            results.append(
                {
                    "kind": example["meta"]["kind"],
                    "question": example["question"],
                    "answer": answer,
                    "expected": example["answers"][0],
                }
            )
    return sizes, results


def markdown_table(rows: list[dict]) -> str:
    """Lay the measured shares out, one line a kind and one column a length."""
    lengths = sorted({row["length"] for row in rows})
    cells = {(row["kind"], row["length"]): row for row in rows}
    lines = [
        "| prompt, tokens at most | " + " | ".join(map(str, lengths)) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    mean = {row["length"]: row["mean_context_tokens"] for row in rows}
    lines.append("| context, mean tokens | " + " | ".join(f"{mean[n]:.0f}" for n in lengths) + " |")
    for kind in synthetic.KINDS:
        entries = []
        for length in lengths:
            row = cells[kind, length]
            entries.append(f"{row['exact_match']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        lines.append(f"| {kind} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--documents", type=int, default=400, help="documents of each length")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--errors", action="store_true", help="print what was answered wrong")
    arguments = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.perf_counter()
    rows = []
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for length in arguments.lengths:
            jobs = [(arguments.model, length, arguments.documents, arguments.seed, k) for k in range(PROCESSES)]
            parts = pool.map(measure, jobs)
            sizes = [size for part, _ in parts for size in part]
            by_kind = defaultdict(list)
            for _, results in parts:
                for result in results:
                    by_kind[result["kind"]].append(result["answer"] == result["expected"])
                    if arguments.errors and result["answer"] != result["expected"]:
                        print(length, result)
            for kind in synthetic.KINDS:
                n, right = len(by_kind[kind]), sum(by_kind[kind])
                low, high = wilson_interval(right, n)
                rows.append(
                    {
                        "kind": kind,
                        "length": length,
                        "mean_context_tokens": sum(sizes) / len(sizes),
                        "n": n,
                        "correct": right,
                        "exact_match": right / n,
                        "low": low,
                        "high": high,
                    }
                )
                print(f"{length} {kind}: {right}/{n} = {right / n:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    report = {
        "seed": arguments.seed,
        "interval": "Wilson, 95 %",
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "results": rows,
    }
    (arguments.model / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    table = markdown_table(rows)
    print(table)
    card = arguments.model / "README.md"
    if card.exists():
        begin, end = TABLE_MARKS
        text = card.read_text()
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        card.write_text(f"{before}\n{table}\n{after}")


if __name__ == "__main__":
    main()
