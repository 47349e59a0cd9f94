"""The worker process: it loads what its jobs share, and then runs jobs until none arrives for a while.

    python -m kv_transition.worker.server LISTENING_SOCKET FOLDER WORKER

It ends if no job arrives for ``KVT_WORKER_IDLE_S`` seconds (30), if every run that it worked for has ended, or on
SIGTERM. If it cannot run a job, the client runs the job itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from kv_transition.worker import frames, runs
from kv_transition.worker.key import Worker, code_digest
from kv_transition.worker.perform import SpentError
from kv_transition.worker.place import Place

IDLE_VARIABLE = "KVT_WORKER_IDLE_S"
_TICK_S = 0.5
_PATIENCE_S = 10.0
"""seconds within which a connected client must send its job"""

_JOBS = (
    "kv_transition.run.prefill",
    "kv_transition.studies.grid.run",
    "kv_transition.studies.grid.calibrate",
    "kv_transition.studies.recall.run",
    "kv_transition.studies.perplexity.run",
    "kv_transition.studies.chat.run",
    # reading a table would import it, and pandas with it
    "pyarrow.dataset",
)


class Carrier(Protocol):
    """The interface of the two ways to run jobs, `Forked` and `Serial`."""

    def begin(self, connection: socket.socket, job: dict[str, Any], files: list[int]) -> None:
        """Start or run a job, after sending `frames.TAKEN`."""

    @property
    def waiting(self) -> dict[int, Any]:
        """Return the file descriptors that signal events of running jobs."""

    def attend(self, ready: list[int]) -> None:
        """Handle the jobs whose descriptors are ready, and those whose run has ended."""

    def stop(self) -> None:
        """End every job; its client runs it again."""


def main() -> None:
    """Serve jobs until the worker has no reason to stay."""
    number, folder, what = sys.argv[1:]
    known = json.loads(what)
    worker = Worker(**known | {"imports": tuple(known["imports"])})
    listener = socket.socket(fileno=int(number))
    place = Place(Path(folder), worker.name)
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            carrier = _loaded(worker)
        except (Exception, SpentError) as error:  # a job without a worker meets the same error and reports it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _refuse(listener, f"the worker could not load its model or modules ({reason})")
            return
        _serve(listener, carrier)
    finally:
        _leave(place, listener)


def _terminated(*_: object) -> None:
    raise SpentError


def _loaded(worker: Worker) -> Carrier:
    """Return the `Carrier` of a worker after importing and loading everything that its jobs share."""
    from kv_transition.worker.forked import Forked

    if worker.model is None:
        for module in worker.imports:
            importlib.import_module(module)
        _require_unchanged(worker)
        return Forked()
    import torch

    for module in _JOBS:
        importlib.import_module(module)
    policies = importlib.import_module("kv_transition.policies")
    for found in pkgutil.iter_modules(policies.__path__, "kv_transition.policies."):
        importlib.import_module(found.name)
    _require_unchanged(worker)
    on_gpu = importlib.import_module("kv_transition.engines.loading").usable_device(worker.model["device"]) != "cpu"
    if not on_gpu:
        # a forked process would lack the threads of a pool
        torch.set_num_threads(1)
    importlib.import_module("kv_transition.run.job").hold(worker.model)
    if on_gpu:
        from kv_transition.worker.serial import Serial

        return Serial()
    return Forked()


def _require_unchanged(worker: Worker) -> None:
    """Raise RuntimeError if the code was edited after the client computed its digest."""
    if code_digest() != worker.code:
        raise RuntimeError("the code was edited after the job started")


def _serve(listener: socket.socket, carrier: Carrier) -> None:
    gc.collect()
    gc.freeze()  # so that garbage collection in a forked process does not copy shared memory
    idle_s = float(os.environ.get(IDLE_VARIABLE) or 30)
    listener.setblocking(False)
    used, for_runs = time.monotonic(), set()
    try:
        while True:
            ready, _, _ = select.select([listener, *carrier.waiting], [], [], _TICK_S)
            if listener in ready and (run := _accept(listener, carrier)) is not None:
                for_runs.add(run)
            carrier.attend([fd for fd in ready if fd is not listener])
            if ready or carrier.waiting:
                used = time.monotonic()
            elif time.monotonic() - used > idle_s or _are_over(for_runs):
                return
    except SpentError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        carrier.stop()


def _are_over(for_runs: set[str]) -> bool:
    """Return whether all runs have ended; a job that was started by hand belongs to no run and counts as active."""
    return bool(for_runs) and "" not in for_runs and not any(map(runs.is_alive, for_runs))


def _accept(listener: socket.socket, carrier: Carrier) -> str | None:
    """Start a client's job; return its run ("" if it has none), or None if no job was started."""
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return None
    connection.settimeout(_PATIENCE_S)
    try:
        got = frames.receive(connection, files=2)
        if got is None or len(got[1]) != 2:
            raise ValueError("no job")
        job, files = got
        run = job.get("run") or ""
    except (OSError, ValueError, AttributeError):
        connection.close()
        return None
    carrier.begin(connection, job, files)
    return run


def _refuse(listener: socket.socket, reason: str) -> None:
    """Tell every waiting client that this worker cannot serve it."""
    listener.settimeout(_TICK_S)
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                frames.send(connection, {"state": frames.UNABLE, "reason": reason})


def _leave(place: Place, listener: socket.socket) -> None:
    """Remove the socket and the log; clients that got no answer start another worker."""
    with place.locked():
        place.clear()
        listener.close()


if __name__ == "__main__":
    main()
