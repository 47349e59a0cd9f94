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
from kv_transition.provenance import digest, write_json
from kv_transition.run import job


def store_of(model: dict[str, Any], code: str, root: str, mode: str, max_gb: float) -> PrefillStore:
    """The store of this model under this version of the reading code."""
    return PrefillStore(Path(root) / digest({"model": model, "code": code}), mode, max_gb)


def read_once(
    engine: LocalEngine, store: PrefillStore, example: dict[str, Any], statistics: frozenset[str]
) -> tuple[Prefill, float]:
    """The prefill of an example and the seconds that loading it took: from the store, else by reading the prompt.

    statistics: those that the prefill must have. One that is read now also gets those that the experiment's other cells
    read and those of the stored prefill that it takes the place of.
    """
    started = engine.clock()
    prefill = store.load(example["prompt_sha256"], str(engine.device), statistics)
    if prefill is not None:
        return prefill, engine.clock() - started
    wanted = statistics | job.statistics() | (store.statistics(example["prompt_sha256"]) or frozenset())
    prefill = engine.prefill(example["context_ids"], example["question_ids"], wanted)
    store.save(example["prompt_sha256"], prefill)
    return prefill, 0.0


def missing(store: PrefillStore, examples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if store.mode != "never":
        yield from (example for example in examples if example["prompt_sha256"] not in store)


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--bin", "--index")
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    store = store_of(spec["model"], spec["code"], *job.store_settings())
    unread = list(missing(store, examples))
    if unread:  # otherwise there is no need to load the model
        import torch

        engine = job.load_engine(spec["model"], arguments.threads)
        for number, example in enumerate(unread, 1):
            try:
                read_once(engine, store, example, frozenset())
            except (torch.OutOfMemoryError, MemoryError):
                # The cell meets the same example and makes it a row with its failure.
                print(f"{example['example_id']}: out of memory, left to the cells", file=sys.stderr)
            print(f"read {number} of {len(unread)} prompts ({example['prompt_len']} tokens)", file=sys.stderr)
    write_json(
        arguments.index,
        {"code": spec["code"], "model": spec["model"], "prompts": [e["prompt_sha256"] for e in examples]},
    )


if __name__ == "__main__":
    job.run(main)
