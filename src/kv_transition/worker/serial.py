"""Jobs one after the other in the worker's own process: used on a GPU, whose context cannot be forked."""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kv_transition.worker import frames, runs
from kv_transition.worker.perform import INTERRUPTED, SpentError, as_of, perform

_TICK_S = 0.5
_GRACE_S = 10.0
_GROWTH = 2 * 2**30
"""bytes by which the memory of this process may grow after loading"""


class Serial:
    """Runs one job at a time; the other jobs wait in the queue of the socket."""

    def __init__(self) -> None:
        self._modules = set(sys.modules)
        self._begun_at = _resident()
        self.waiting: dict[int, Any] = {}

    def begin(self, connection: socket.socket, job: dict[str, Any], files: list[int]) -> None:
        """Run the job. Raises SpentError if no other job can follow: memory ran out, or the process grew too large."""
        torch = sys.modules["torch"]
        refused = _refusals(torch)
        started = time.process_time()
        status: int | None = None
        with connection, suppress(OSError):
            frames.send(connection, {"state": frames.TAKEN, "pid": os.getpid()})
            told = None
            try:
                with _watched(connection, job.get("run")), as_of(job, *files):
                    status = perform(job)
            except SpentError as end:  # the worker received SIGTERM
                told = end
            for fd in files:
                os.close(fd)
            again = told or status is None or _refusals(torch) > refused
            if again:
                answer = {
                    "state": frames.AGAIN,
                    "reason": "the worker has ended" if told else "it ran out of memory there",
                }
                self._give_up()
            elif status == INTERRUPTED:
                answer = {"state": frames.STOPPED}
            else:
                peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
                cpu_s = time.process_time() - started
                report = f"worker {os.getpid()}: {cpu_s:.2f} s of processor time, {_resident() / 2**20:.0f} MiB"
                answer = {"state": frames.DONE, "status": status, "report": f"{report}, {peak:.0f} MiB of the GPU"}
            frames.send(connection, answer)
            if again or _resident() - self._begun_at > _GROWTH:
                raise SpentError
        self._tidy(torch)

    def attend(self, ready: list[int]) -> None:
        """Do nothing, because no job runs between two calls of `begin`."""

    def stop(self) -> None:
        """Do nothing, because no job runs between two calls of `begin`."""

    def _tidy(self, torch: Any) -> None:
        """Restore the state in which the first job started."""
        importlib.import_module("kv_transition.engines.compiled").decoder_of.cache_clear()
        own = "kv_transition."
        for name in [name for name in sys.modules if name.startswith(own) and name not in self._modules]:
            del sys.modules[name]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _give_up(self) -> None:
        """Free the GPU before the client needs it."""
        importlib.import_module("kv_transition.run.job").let_go()
        self._tidy(sys.modules["torch"])


def _refusals(torch: Any) -> int:
    """Return how often the GPU had no memory left, including the cases that a job recorded as a row."""
    return torch.cuda.memory_stats().get("num_ooms", 0) if torch.cuda.is_available() else 0


def _resident() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def _watched(connection: socket.socket, run: str | None) -> Iterator[None]:
    """Interrupt the job if its client or its run ends; end the worker itself if the job does not stop."""
    over = threading.Event()

    def gone() -> bool:
        if run and not runs.is_alive(run):
            return True
        ready, _, _ = select.select([connection], [], [], _TICK_S)
        try:
            return bool(ready) and not connection.recv(1)
        except OSError:
            return True

    def watch() -> None:
        while not over.is_set():
            if gone() and not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                if not over.wait(_GRACE_S):
                    os._exit(1)
                return

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
        watcher.join()
