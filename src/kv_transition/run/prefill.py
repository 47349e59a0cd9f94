"""The prefill job: read each prompt of a bin once with the full cache and store the result.

    python -m kv_transition.run.prefill --spec JSON --bin BIN.parquet --index INDEX.json

The index lists the prompts that were read and contains nothing that changes from run to run. The tensors beside it are
a cache that may be deleted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kv_transition.cache.file import statistics_of
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
    engine: LocalEngine,
    store: PrefillStore,
    example: dict[str, Any],
    statistics: frozenset[str],
    context: Prefill | None = None,
) -> tuple[Prefill, float]:
    """Return the prefill of an example, from the store or by reading the prompt, and the seconds of loading it.

    statistics: those that the prefill must have. A prefill that is computed now also gets the statistics that other
    cells of the experiment read, and those of the stored prefill that it replaces. context: the prefill of another
    question about the same context, which is not read again unless a statistic is missing in it.
    """
    started = engine.clock()
    prefill = store.load(example["prompt_sha256"], engine.layer_devices, statistics)
    if prefill is not None:
        return prefill, engine.clock() - started
    wanted = statistics | job.statistics() | (store.statistics(example["prompt_sha256"]) or frozenset())
    there = context is not None and wanted <= statistics_of(context.context)
    read = (context.context, context.context_s) if there else None
    prefill = engine.prefill(example["context_ids"], example["question_ids"], wanted, read)
    store.save(example["prompt_sha256"], prefill)
    return prefill, 0.0


def key_of(example: dict[str, Any]) -> tuple[int, ...]:
    """Return what examples that ask about one context have in common: the tokens of it that are fed."""
    return tuple(example["context_ids"])


def by_context(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples with those of one context next to each other, else in their order."""
    first: dict[tuple[int, ...], int] = {}
    return sorted(examples, key=lambda example: first.setdefault(key_of(example), len(first)))


class Reader:
    """Reads the prompts of examples, and a context that several of them ask about once.

    It holds the last such context until another one is asked about, and nothing of a context that nobody shares.
    """

    def __init__(self, engine: LocalEngine, store: PrefillStore, examples: Iterable[dict[str, Any]]):
        times = Counter(map(key_of, examples))
        self._shared = {key for key, number in times.items() if number > 1}
        self.engine, self._store = engine, store
        self._key: tuple[int, ...] | None = None
        self._held: Prefill | None = None

    def holds(self, example: dict[str, Any]) -> bool:
        """Return whether the context of an example is the one that is held."""
        return self._held is not None and key_of(example) == self._key

    def prefill(self, example: dict[str, Any], statistics: frozenset[str]) -> tuple[Prefill, float]:
        """Return the prefill of an example and the seconds that loading it took, as `read_once` does."""
        if not self.holds(example):
            self._held = None  # before another one takes its memory
        found = read_once(self.engine, self._store, example, statistics, self._held)
        if self._held is None and key_of(example) in self._shared:
            self._key, self._held = key_of(example), found[0]
        return found


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

    reader = Reader(engine, store, examples)
    for number, example in enumerate(by_context(examples), 1):
        try:
            reader.prefill(example, job.statistics())
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
