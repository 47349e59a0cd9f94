"""Engine, prefill store and metadata of the jobs that run a model."""

from __future__ import annotations

import os
import time
from typing import Any

from kv_transition.data import gguf
from kv_transition.engines.local import LocalEngine
from kv_transition.provenance import digest
from kv_transition.run import memory
from kv_transition.run.command import answer_seed, arguments, bin_metadata, read_bin, run

__all__ = [
    "answer_seed",
    "arguments",
    "bin_metadata",
    "hold",
    "let_go",
    "load_engine",
    "model_facts",
    "read_bin",
    "run",
    "statistics",
    "store_settings",
]

STORE_VARIABLE = "KVT_PREFILL_STORE"
"""environment variable ``root:mode:max_gb`` of the prefill store; it changes no result, so it is not part of a spec"""


STATISTICS_VARIABLE = "KVT_STATISTICS"
"""environment variable with the comma-separated statistics that the experiment's policies read. A prefill may have more
statistics than a cell needs, so this changes no result either"""


def store_settings() -> tuple[str, str, float]:
    """Return root, mode and size in GB of the prefill store."""
    root, mode, max_gb = os.environ.get(STORE_VARIABLE, "results/prefill:auto:50").rsplit(":", 2)
    return root, mode, float(max_gb)


def statistics() -> frozenset[str]:
    """Return the statistics that some cell of the experiment reads."""
    return frozenset(filter(None, os.environ.get(STATISTICS_VARIABLE, "").split(",")))


def model_facts(model: dict[str, Any], engine: LocalEngine) -> dict[str, str]:
    """Return the metadata of a results file about the model and the clock of its timings."""
    return {
        "model": model["name"],
        "model_revision": model["revision"],
        "model_fingerprint": model["fingerprint"],
        **({"weights_from": gguf.origin(model["name"])} if gguf.is_gguf(model["name"]) else {}),
        "dtype": model["dtype"],
        "clock": "process" if engine.device.type == "cpu" else "wall",
        **engine.description,
    }


_held: dict[str, LocalEngine] = {}
"""the model of a warm worker, by the digest of its spec; empty in other processes"""


def hold(model: dict[str, Any]) -> None:
    """Load a model for all jobs that this process, or a fork of it, will run."""
    _held[digest(model)] = _load(model)


def let_go() -> None:
    """Release the held model."""
    _held.clear()


def load_engine(model: dict[str, Any], threads: int) -> LocalEngine:
    """Return the engine of a model, loaded unless this process holds it. Raises UserError if that fails."""
    import torch

    torch.set_num_threads(threads)
    engine = _held.get(digest(model)) or _load(model)
    engine.peak_memory_mb()  # reset the peak, so that it excludes loading and the previous job
    return engine


def _load(model: dict[str, Any]) -> LocalEngine:
    started = time.perf_counter()
    engine = LocalEngine.from_pretrained(
        model["name"],
        revision=model["revision"],
        dtype=model["dtype"],
        device=model["device"],
        quantization=model["quantization"],
        device_map=model["device_map"],
        attention=model["attn_implementation"],
        statistics=model["attention_statistics"],
        chunk_tokens=model["chunk_tokens"],
    )
    engine.load_s = time.perf_counter() - started
    if engine.device.type == "cpu":
        memory.keep_freed_memory()
    return engine
