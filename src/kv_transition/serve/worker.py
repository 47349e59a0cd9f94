"""The one thread that uses the model: requests wait for it in a short line."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from kv_transition.serve.refusals import RefusalError

_LONGEST_WAIT_S = 60


class Job:
    """A piece of work that tells the event loop what comes of it: any number of things, and last a result or an
    exception. Made within the loop."""

    def __init__(self, work: Callable[[Job], Any]):
        self.cancelled = False
        """set when nobody waits any more; the work looks at it"""
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Any] = asyncio.Queue()

    async def next(self) -> Any:
        return await self._told.get()

    def tell(self, what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._told.put_nowait, what)

    def run(self) -> None:
        try:
            self.tell(self._work(self))
        except Exception as error:
            self.tell(error)


class Worker:
    """Runs jobs one by one in the order of their coming."""

    def __init__(self, limit: int):
        """limit: jobs that may wait beside the one that runs."""
        self._limit = limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._job_s = 1.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> bool:
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Raises RefusalError when the line is full."""
        with self._changed:
            if len(self._waiting) >= self._limit:
                wait = min(_LONGEST_WAIT_S, max(1, math.ceil(self._job_s * len(self._waiting))))
                raise RefusalError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{len(self._waiting)} requests wait already; come again later",
                    code="overloaded",
                    retry_after=wait,
                )
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Nobody waits for this job any more, wherever it stands."""
        job.cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def stop(self) -> None:
        """End the running job at its next token, drop those that wait."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            if self._running:
                self._running.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                self._running = self._waiting.popleft()
            started = time.perf_counter()
            self._running.run()
            self._job_s += (time.perf_counter() - started - self._job_s) / 4
            self._running = None
