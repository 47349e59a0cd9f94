"""Arguments, examples and errors of the jobs of a bin, for models and endpoints alike."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kv_transition import parsing
from kv_transition.errors import UserError
from kv_transition.provenance import digest, read_metadata
from kv_transition.script import status

_SEED_BITS = 40


def arguments(doc: str | None, argv: list[str] | None, *files: str, optional: Sequence[str] = ()) -> argparse.Namespace:
    """Return the parsed ``--spec`` (JSON: everything that the result depends on), ``--threads`` and named files.

    optional: files that may be omitted or named without a value; they are None then.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--spec", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, default=1)
    for file in files:
        parser.add_argument(file, required=True)
    for file in optional:
        parser.add_argument(file, nargs="?")
    return parser.parse_args(argv)


def read_bin(path: str) -> list[dict[str, Any]]:

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; run the prepare step first")
    return parsing.read_parquet(path).to_pylist()


def bin_metadata(path: str) -> dict[str, str]:
    """Return the metadata of a bin's file about its data set, for the files computed from it."""
    known = read_metadata(path)
    return {key: known[key] for key in ("dataset", "revision", "split", "max_length") if key in known}


def answer_seed(seed: int, example_id: str, repeat: int) -> int:
    """Return the seed of one answer. It depends only on these three arguments."""
    return int(digest([seed, example_id, repeat]), 16) % 2**_SEED_BITS


def run(main: Callable[[], None]) -> None:
    """Run a job's main. Bad input becomes one sentence and status 2; a bug keeps its traceback."""
    if code := status(main):
        sys.exit(code)
