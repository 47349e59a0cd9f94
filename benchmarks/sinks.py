"""What attention sinks are worth on real weights: perplexity of a small pretrained model that forgets as it reads.

    python benchmarks/sinks.py --model MODEL_FOLDER --books BOOK.txt.gz ... [--output FILE.json]
    python benchmarks/sinks.py --render FILE.json

Teacher forced over 512 tokens, one token at a time, as StreamingLLM evaluates itself (arXiv 2309.17453, section 4.1):
the cache is held at 256 entries (64 and 16 to see where it breaks) from the moment it has them, and tokens after the
256th are counted. Stories are samples of the model's own language (temperature
1, seeded); the books are the first 512 tokens after the front matter. Intervals: BCa bootstrap over sequences.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch
from document import put, table
from scipy.stats import bootstrap

from kv_transition.cache.batch import stack
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Policy
from kv_transition.policies.full import Full
from kv_transition.policies.streaming_llm import StreamingLLM

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
TOKENS, HALF, STORIES, FRONT_MATTER = 512, 256, 20, 4000
ENTRIES = (HALF, 64, 16)
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "StreamingLLM, 4 sinks": StreamingLLM(n_sink=4),
    "StreamingLLM, 2 sinks": StreamingLLM(n_sink=2),
    "StreamingLLM, 1 sink": StreamingLLM(n_sink=1),
    "StreamingLLM, no sink": StreamingLLM(n_sink=0),
}


def stories(engine: LocalEngine, count: int = STORIES) -> list[list[int]]:
    """Return samples of the model's own language, token ids [count, TOKENS]."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    start = engine.tokenizer.bos_token_id
    said = [[start] for _ in generators]
    state = stack([engine.extend(None, [start], frozenset()) for _ in generators], frozenset())
    while len(said[0]) < TOKENS:
        tokens = engine.next_tokens(state.logits, 1.0, generators)
        for sequence, token in zip(said, tokens, strict=True):
            sequence.append(token)
        state = engine.extend(state, [[token] for token in tokens], frozenset(), room=TOKENS)
    return said


def books(engine: LocalEngine, files: list[Path]) -> list[list[int]]:
    texts = [gzip.decompress(file.read_bytes()).decode("utf-8").replace("\r\n", "\n") for file in files]
    # enough characters for the tokens that are taken, not the whole book
    pieces = [text[FRONT_MATTER : FRONT_MATTER + 20 * TOKENS] for text in texts]
    start = engine.tokenizer.bos_token_id
    return [[start, *engine.tokenizer.encode(piece, add_special_tokens=False)][:TOKENS] for piece in pieces]


def losses(engine: LocalEngine, sequences: list[list[int]], policy: Policy, entries: int) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first: [sequences, tokens - 1], in nats."""
    state = stack([engine.extend(None, sequence[:1], frozenset()) for sequence in sequences], frozenset())
    found = []
    for column in torch.tensor(sequences).T[1:]:
        found.append(torch.nn.functional.cross_entropy(state.logits, column, reduction="none"))
        state = engine.extend(state, column[:, None].tolist(), frozenset(), room=TOKENS)
        state = policy.compress(state, entries)
    return torch.stack(found, dim=1).numpy()


def render(rows: list[dict]) -> None:
    """Write the table into docs/benchmarks.md: a row for each policy and size, a column for each text."""
    by_text: dict[tuple[str, int], dict[str, str]] = {}
    heads: dict[str, int] = {}
    for row in rows:
        figure = "{perplexity:.2f} [{ci_low:.2f}, {ci_high:.2f}]".format(**row)
        by_text.setdefault((row["policy"], row["entries"]), {})[row["text"]] = figure
        heads[row["text"]] = row["n"]
    lines = [[policy, str(entries), *(cells[text] for text in heads)] for (policy, entries), cells in by_text.items()]
    put(PAGE, "sinks", table(["policy", "entries", *(f"{text} (n = {n})" for text, n in heads.items())], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--books", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--render", type=Path, help="write the table of this file and run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        render(json.loads(arguments.render.read_text(encoding="utf-8")))
        return
    if not (arguments.model and arguments.books):
        parser.error("give --model and --books, or --render")
    torch.set_num_threads(1)
    engine = LocalEngine.from_pretrained(arguments.model, device="cpu")
    rows = []
    for text, sequences in (("stories", stories(engine)), ("books", books(engine, arguments.books))):
        settings = [(name, policy, k) for k in ENTRIES for name, policy in POLICIES.items() if name != "full"]
        for name, policy, k in [("full", Full(), TOKENS), *settings]:
            # only tokens that are predicted after something has been evicted
            loss = losses(engine, sequences, policy, k)[:, HALF:].mean(axis=1)
            interval = bootstrap((loss,), np.mean, n_resamples=9999, rng=0).confidence_interval
            row = {
                "text": text,
                "policy": name,
                "entries": k,
                "n": len(loss),
                "perplexity": float(np.exp(loss.mean())),
                "ci_low": float(np.exp(interval.low)),
                "ci_high": float(np.exp(interval.high)),
            }
            rows.append(row)
            print(
                "{text:8} {policy:22} {entries:4} {perplexity:8.2f} [{ci_low:.2f}, {ci_high:.2f}] n = {n}".format(**row)
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
