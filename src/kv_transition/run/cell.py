"""One cell of the grid: every example of a bin under one policy, budget and mode.

    python -m kv_transition.run.cell --spec JSON --bin BIN.parquet --output CELL.parquet

Each example: take its prefill, compress it to the budget, let the question in, decode.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kv_transition.budget import Budget
from kv_transition.cache.state import CacheState
from kv_transition.cache.store import Prefill
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Policy
from kv_transition.policies.catalog import create
from kv_transition.provenance import digest, rows_to_table, write_table
from kv_transition.run import job
from kv_transition.run.prefill import read_once, store_of
from kv_transition.tables import CELLS

_SEED_BITS = 40


@dataclass(frozen=True)
class Setting:
    """What is done to the cache and how the answer is decoded."""

    policy: Policy
    budget: Budget
    mode: str
    first_token: str = "compressed"
    temperature: float = 0.0


@dataclass
class Answer:
    """Generated tokens with the anatomy of the cache and the seconds of each step."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    budget_entries: int = 0
    kept: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    full_bytes: int = 0
    prefill_s: float = 0.0
    compress_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0


def answer(
    engine: LocalEngine, prefill: Prefill, question_ids: list[int], setting: Setting, max_new_tokens: int, seed: int
) -> Answer:
    """Forget down to the budget, then answer."""
    result = Answer()
    before_question = setting.mode == "before_question"
    state = prefill.context if before_question else prefill.prompt
    result.prefill_s = prefill.context_s if before_question else prefill.prompt_s
    k = state.length if setting.budget.is_full else setting.budget.kept(state.length)
    result.budget_entries = k

    started = engine.clock()
    state = compress(setting, state, k, seed, keep_last=not before_question)
    compressed = engine.clock()
    result.compress_s = compressed - started

    if before_question:
        state = engine.extend(state, question_ids, setting.policy.statistics)
        state = hold(setting, state, k, seed)
    elif setting.first_token == "compressed":
        # No answer token may come from the full cache, so the last prompt token is read again.
        state = engine.extend(state.without_last(), question_ids[-1:], setting.policy.statistics)
    result.first_token_s = engine.clock() - compressed

    state = decode(engine, state, setting, k, max_new_tokens, seed, result)
    result.decode_s = engine.clock() - compressed
    result.cache_bytes = state.nbytes
    result.full_bytes = round(state.nbytes / state.entries * state.length)
    return result


def decode(
    engine: LocalEngine, state: CacheState, setting: Setting, k: int, max_new_tokens: int, seed: int, result: Answer
) -> CacheState:
    """Generate until the model stops or ``max_new_tokens`` are there; returns the cache as it is then."""
    generator = torch.Generator().manual_seed(seed)
    result.kept.append(state.entries)
    while True:
        token = engine.next_token(state, setting.temperature, generator)
        if token in engine.eos:
            result.finish_reason = "stop"
            return state
        result.tokens.append(token)
        if len(result.tokens) == max_new_tokens:
            return state
        state = hold(setting, engine.extend(state, [token], setting.policy.statistics), k, seed)
        result.kept.append(state.entries)


def compress(setting: Setting, state: CacheState, k: int, seed: int, *, keep_last: bool = False) -> CacheState:
    return state if setting.budget.is_full else setting.policy.compress(state, k, seed=seed, keep_last=keep_last)


def hold(setting: Setting, state: CacheState, k: int, seed: int) -> CacheState:
    """The state held at K, if the policy acts while decoding."""
    return compress(setting, state, k, seed) if setting.policy.acts_each_step else state


def rows(engine: LocalEngine, examples: list[dict[str, Any]], spec: dict[str, Any], store: Any) -> Iterator[dict]:
    """The cell's rows, an answer each, in the order of the bin."""
    setting = Setting(
        policy=create(spec["kind"], spec["hyper_parameters"]),
        budget=Budget.parse(spec["budget"]),
        mode=spec["mode"],
        first_token=spec["first_token"],
        temperature=spec["decoding"]["temperature"],
    )
    identity = {"mode": spec["mode"], "policy": spec["policy"], "budget": spec["budget"], "cell_hash": digest(spec)}
    for example in examples:
        for repeat in range(spec["decoding"]["repeats"]):
            row = identity | {
                **{key: example[key] for key in ("task", "example_id", "bin", "prompt_sha256")},
                "repeat": repeat,
                "prompt_tokens": example["prompt_len"],
                "batch_size": 1,
                "co_running": False,
                "engine": engine.name,
            }
            seed = int(digest([spec["decoding"]["seed"], example["example_id"], repeat]), 16) % 2**_SEED_BITS
            try:
                prefill, load_s = read_once(engine, store, example)
                got = answer(engine, prefill, example["question_ids"], setting, example["max_new_tokens"], seed)
            except (torch.OutOfMemoryError, MemoryError) as error:
                reason = str(error).strip().splitlines() or ["no memory left"]
                yield row | {"error": f"OOM: {reason[0]}"}
                continue
            yield row | {
                "text": engine.tokenizer.decode(got.tokens, skip_special_tokens=True),
                "finish_reason": got.finish_reason,
                "completion_tokens": len(got.tokens),
                "budget_entries": got.budget_entries,
                "protected": setting.policy.protected(got.budget_entries),
                "kept_final": got.kept[-1],
                "kept_mean": sum(got.kept) / len(got.kept),
                "cache_bytes": got.cache_bytes,
                "full_bytes": got.full_bytes,
                "load_s": load_s,
                "prefill_s": got.prefill_s,
                "compress_s": got.compress_s,
                "ttft_s": got.prefill_s + got.compress_s + got.first_token_s,
                "decode_s": got.decode_s,
                "latency_s": got.prefill_s + got.compress_s + got.decode_s,
                "peak_mem_mb": engine.peak_memory_mb(),
                "raw": json.dumps({"token_ids": got.tokens}),
            }


def main(argv: list[str] | None = None) -> None:
    arguments = job.arguments(__doc__, argv, "--bin", "--output")
    spec = arguments.spec
    examples = job.read_bin(arguments.bin)
    started = time.perf_counter()
    engine = job.load_engine(spec["model"], arguments.threads)
    model_load_s = time.perf_counter() - started
    store = store_of(spec["model"], spec["prefill_code"], *job.store_settings())
    table = rows_to_table(rows(engine, examples, spec, store), CELLS)
    facts = {
        "config_hash": digest({key: value for key, value in spec.items() if key not in ("code", "prefill_code")}),
        "model": spec["model"]["name"],
        "model_revision": spec["model"]["revision"],
        "model_fingerprint": spec["model"]["fingerprint"],
        "dtype": spec["model"]["dtype"],
        "model_load_s": round(model_load_s, 3),
        "hyper_parameters": spec["hyper_parameters"],
        "kind": spec["kind"],
        "clock": "process" if engine.device.type == "cpu" else "wall",
        **engine.description,
        **job.bin_metadata(arguments.bin),
    }
    write_table(arguments.output, table, facts)


if __name__ == "__main__":
    job.run(main)
