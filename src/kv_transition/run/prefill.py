"""The prefill job: read each prompt of a bin once with the full cache and store the result.

    python -m kv_transition.run.prefill --spec JSON --bin BIN.parquet --index INDEX.json

The index lists the prompts that were read and contains nothing that changes from run to run. The tensors beside it are
a cache that may be deleted.
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
    """Return the prefill store of this model and this version of the code, for the prompts of a bin."""
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
    """Return the prefill of an example, from the store or by reading the prompt, and the seconds of loading it.

    statistics: those that the prefill must have. A prefill that is computed now also gets the statistics that other
    cells of the experiment read, and those of the stored prefill that it replaces.
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
    """Yield the examples that have no stored prefill with these statistics; none if nothing is stored."""
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
    """Read and store prompts until the store is full."""
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
