"""The prefill job: read each prompt of a bin once with the full cache and store the result.

    python -m kv_transition.run.prefill --spec JSON --bin BIN.parquet --index INDEX.json

The index lists the prompts that were read and contains nothing that changes from run to run. The tensors beside it are
a cache that may be deleted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
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


def key_of(example: dict[str, Any]) -> tuple[int, ...]:
    """Return the key of an example's context: its token ids."""
    return tuple(example["context_ids"])


def by_context(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples in their order, except that those with one context follow each other."""
    first: dict[tuple[int, ...], int] = {}
    return sorted(examples, key=lambda example: first.setdefault(key_of(example), len(first)))


def as_stored(examples: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is stored for each prompt, by its hash: the prompt, or only its context if several prompts share it.

    Questions are short, so reading one again costs less than storing its context a second time.
    """
    prompts: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for example in examples:
        prompts.setdefault(key_of(example), {})[example["prompt_sha256"]] = example
    found = {}
    for key, own in prompts.items():
        # named as a prompt without a question
        alone = {"prompt_sha256": sha256(json.dumps([key, []]).encode()).hexdigest(), "question_ids": []}
        alone |= {"prompt_len": len(key)} if len(own) > 1 else {}
        found |= {name: example | alone if len(own) > 1 else example for name, example in own.items()}
    return found


class Reader:
    """Reads the prompts of examples; a context that several examples share is read only once.

    It holds the last such context until an example has another one. A context of a single example is not held.
    """

    def __init__(self, engine: LocalEngine, store: PrefillStore, examples: Sequence[dict[str, Any]]):
        times = Counter(map(key_of, examples))
        self._shared = {key for key, number in times.items() if number > 1}
        self._stored = as_stored(examples)
        self.engine, self._store = engine, store
        self._key: tuple[int, ...] | None = None
        self._held: Prefill | None = None

    def holds(self, example: dict[str, Any]) -> bool:
        """Return whether the context of an example is the one that is held."""
        return self._held is not None and key_of(example) == self._key

    def prefill(self, example: dict[str, Any], statistics: frozenset[str]) -> tuple[Prefill, float]:
        """Return the prefill of an example and the seconds that loading it took, as `read_once` does."""
        stored, seconds = self._stored[example["prompt_sha256"]], 0.0
        if not self.holds(example) or not statistics <= statistics_of(self._held.context):
            self._held = None  # free its memory before the next one is read
            found, seconds = read_once(self.engine, self._store, stored, statistics)
            if key_of(example) not in self._shared:
                return found, seconds
            self._key, self._held = key_of(example), found
        if stored["prompt_sha256"] == example["prompt_sha256"]:
            return self._held, seconds
        read = self._held.context, self._held.context_s
        return self.engine.prefill(example["context_ids"], example["question_ids"], statistics, read), seconds


def missing(
    store: PrefillStore, examples: Iterable[dict[str, Any]], statistics: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Yield the prompts or contexts that the store should have but lacks with these statistics; none if it is off."""
    wanted = {stored["prompt_sha256"]: stored for stored in as_stored(examples).values()}
    for name, stored in wanted.items() if store.mode != "never" else ():
        there = store.statistics(name)
        if there is None or not statistics <= there:
            yield stored


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--bin", "--index")
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    store = store_of(spec["model"], spec["code"], arguments.bin)
    unread = list(missing(store, examples, job.statistics()))
    if unread:  # otherwise the model is not needed
        read(job.load_engine(spec["model"], arguments.threads), store, unread)
    write_json(
        arguments.index,
        {"code": spec["code"], "model": spec["model"], "prompts": [e["prompt_sha256"] for e in examples]},
    )


def read(engine: LocalEngine, store: PrefillStore, examples: Sequence[dict[str, Any]]) -> None:
    """Read and store prompts until the store takes no more."""
    import torch

    for number, example in enumerate(examples, 1):
        try:
            read_once(engine, store, example, job.statistics())
        except (torch.OutOfMemoryError, MemoryError):
            # A cell reads the same example and records its failure as a row.
            print(f"{example['example_id']}: out of memory; the cells will record it", file=sys.stderr)
            continue
        if example["prompt_sha256"] not in store:
            print("the store takes no more prompts; the cells will read the others themselves", file=sys.stderr)
            return
        print(f"read {number} of {len(examples)} prompts ({example['prompt_len']} tokens)", file=sys.stderr)


if __name__ == "__main__":
    job.run(main)
