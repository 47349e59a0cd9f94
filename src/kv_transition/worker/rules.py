"""The jobs of cheap rules, which call a worker that has the libraries of the analysis imported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from kv_transition.errors import UserError
from kv_transition.worker import client

IMPORTS = ("kv_transition.outputs.build", "kv_transition.outputs.exports")
"""modules that a worker imports once for all calls; they import most of the libraries that the analysis needs"""
_CALL = "kv_transition.script:call"
_LIGHT = ("kv_transition.provenance", "kv_transition.outputs.resolved")
"""modules whose import takes less time than a call of a worker"""


def carry_out(
    function: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], params: Mapping[str, Any], log: str
) -> None:
    """Call ``module:name`` as `script.call` does, in a worker that has the libraries imported, or else in this process.

    Standard error goes to the file ``log``. Raises SystemExit with the status of a call that fails: the log then
    contains one sentence for bad input or the traceback of a bug, and it is shown on the screen.
    """
    given = {"inputs": _plain(inputs), "outputs": _plain(outputs), "params": _plain(params)}
    # converted through JSON in any case, so that a function receives the same values with and without a worker
    arguments = json.loads(json.dumps({"function": function, **given}))
    with _errors_to(log):
        try:
            if function.partition(":")[0] in _LIGHT:
                from kv_transition.worker.perform import perform

                status = perform({"call": _CALL, "arguments": arguments})
            else:
                status = client.call(_CALL, arguments, IMPORTS)
        except UserError as error:
            print(error, file=sys.stderr)
            status = 2
    if status != 0:  # None: out of memory
        print(Path(log).read_text(encoding="utf-8"), file=sys.stderr, end="")
        raise SystemExit(1 if status is None else status)


def _plain(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return Snakemake's named values as JSON values: a list of files as a list, a file as a text."""
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in named.items()}


@contextmanager
def _errors_to(path: str) -> Iterator[None]:
    """Redirect the standard error of this process, its libraries and its worker to a file within the block."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(path, "w", encoding="utf-8", buffering=1) as log, redirect_stderr(log):
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
