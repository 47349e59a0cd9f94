"""The prefill job: the model reads each prompt of a bin once and what it then remembers is stored.

    python -m kv_transition.run.prefill --spec JSON --bin BIN.parquet --index INDEX.json

The index says which prompts were read, and nothing that differs from run to run; the tensors beside it are a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_transition.cache.store import Prefill, PrefillStore
from kv_transition.engines.local import LocalEngine
from kv_transition.provenance import digest, read_metadata, write_json
from kv_transition.run import job


def store_of(model: dict[str, Any], code: str, bin_path: str) -> PrefillStore:
    """The store of this model under this version of the reading code, for the prompts of a bin."""
    root, mode, max_gb = job.store_settings()
    facts = {
        "model": model["fingerprint"],
        "dtype": model["dtype"],
        "tokenizer": read_metadata(bin_path).get("tokenizer_sha256", ""),
    }
    return PrefillStore(Path(root) / digest({"model": model, "code": code}), mode, max_gb, facts)


def read_once(
    engine: LocalEngine, store: PrefillStore, example: dict[str, Any], statistics: frozenset[str]
) -> tuple[Prefill, float]:
    """The prefill of an example and the seconds that loading it took: from the store, else by reading the prompt.

    statistics: those that the prefill must have. One that is read now also gets those that the experiment's other cells
    read and those of the stored prefill that it takes the place of.
    """
    started = engine.clock()
    prefill = store.load(example["prompt_sha256"], engine.layer_devices, statistics)
    if prefill is not None:
        return prefill, engine.clock() - started
    wanted = statistics | job.statistics() | (store.statistics(example["prompt_sha256"]) or frozenset())
    prefill = engine.prefill(example["context_ids"], example["question_ids"], wanted)
    store.save(example["prompt_sha256"], prefill)
    return prefill, 0.0


def missing(
    store: PrefillStore, examples: list[dict[str, Any]], statistics: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """The examples that have no stored prefill with these statistics; none where nothing is stored."""
    for example in examples if store.mode != "never" else []:
        there = store.statistics(example["prompt_sha256"])
        if there is None or not statistics <= there:
            yield example


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--bin", "--index")
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    store = store_of(spec["model"], spec["code"], arguments.bin)
    unread = list(missing(store, examples, job.statistics()))
    if unread:  # otherwise there is no need to load the model
        read(job.load_engine(spec["model"], arguments.threads), store, unread)
    write_json(
        arguments.index,
        {"code": spec["code"], "model": spec["model"], "prompts": [e["prompt_sha256"] for e in examples]},
    )


def read(engine: LocalEngine, store: PrefillStore, examples: list[dict[str, Any]]) -> None:
    """Read and store, as long as the store takes what is read."""
    import torch

    for number, example in enumerate(examples, 1):
        try:
            read_once(engine, store, example, job.statistics())
        except (torch.OutOfMemoryError, MemoryError):
            # The cell meets the same example and makes it a row with its failure.
            print(f"{example['example_id']}: out of memory, left to the cells", file=sys.stderr)
            continue
        if example["prompt_sha256"] not in store:
            print("the store takes no more; the cells read the other prompts themselves", file=sys.stderr)
            return
        print(f"read {number} of {len(examples)} prompts ({example['prompt_len']} tokens)", file=sys.stderr)


if __name__ == "__main__":
    job.run(main)
