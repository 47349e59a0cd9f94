"""What the jobs that run a model have in common: their arguments, their examples, their engine, their errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata

STORE_VARIABLE = "KVT_PREFILL_STORE"
"""``root:mode:max_gb`` of the prefill store: where tensors lie changes no result, so no rule depends on it"""


STATISTICS_VARIABLE = "KVT_STATISTICS"
"""comma-separated statistics that the experiment's policies read: which of them a prefill holds beyond those that a
cell asks for changes no result either"""


def arguments(doc: str | None, argv: list[str] | None, *files: str, optional: Sequence[str] = ()) -> argparse.Namespace:
    """Parse ``--spec`` (JSON: everything the result depends on), ``--threads`` and the named files.

    optional: files that may be left out, or named without a value; they are None then.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, default=1)
    for file in files:
        parser.add_argument(file, required=True)
    for file in optional:
        parser.add_argument(file, nargs="?")
    return parser.parse_args(argv)


def store_settings() -> tuple[str, str, float]:
    """Root, mode and size in GB of the prefill store."""
    root, mode, max_gb = os.environ.get(STORE_VARIABLE, "results/prefill:auto:50").rsplit(":", 2)
    return root, mode, float(max_gb)


def statistics() -> frozenset[str]:
    """Statistics that some cell of the experiment reads."""
    return frozenset(filter(None, os.environ.get(STATISTICS_VARIABLE, "").split(",")))


def read_bin(path: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; run the prepare step first")
    return pq.read_table(path).to_pylist()


def bin_metadata(path: str) -> dict[str, str]:
    """What a bin's file says of its data set, for the files made from it."""
    known = read_metadata(path)
    return {key: known[key] for key in ("dataset", "revision", "split", "max_length") if key in known}


def load_engine(model: dict[str, Any], threads: int) -> LocalEngine:
    import torch

    torch.set_num_threads(threads)
    return LocalEngine.from_pretrained(
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


def run(main: Callable[[], None]) -> None:
    """Run a job's main; bad input becomes one sentence and status 2, a bug keeps its traceback."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
