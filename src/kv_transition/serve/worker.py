"""The one thread that uses the model: requests wait for it in a short queue, and answers are decoded together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Generic, Protocol, TypeVar

from kv_transition.engines.reading import INTERRUPTED
from kv_transition.serve.refusals import RefusalError

_LONGEST_WAIT_S = 60

_RETRY_S = 5
"""After how long a server that is stopped may be there again"""

_LAST_PASS_S = 0.5
"""How long a stop waits for the model: it looks at each layer whether it should end"""


class Task(Protocol):
    """What a job has begun: it takes steps until it ends."""

    def choose(self) -> bool:
        """Decide about the next step; whether there is one."""


T = TypeVar("T", bound=Task)


class Job(Generic[T]):
    """A piece of work that tells the event loop what comes of it: any number of things, and last a result or an
    exception. Made within the loop."""

    def __init__(self, begin: Callable[[Job[T]], T], end: Callable[[Job[T], T], Any]):
        """begin: what is done alone, such as to read a prompt. end: makes the result, once there is no further step."""
        self.cancelled = False
        """set when nobody waits any more; whoever works on it looks at it"""
        self.begin, self.end = begin, end
        self.task: T | None = None
        self.started = 0.0
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Any] = asyncio.Queue()

    async def next(self) -> Any:
        return await self._told.get()

    def tell(self, what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._told.put_nowait, what)


class Worker(Generic[T]):
    """Carries out jobs in the order of their coming, up to ``batch`` at a time.

    One job begins between two steps of those that go on, so that a line of prompts does not keep answers waiting for
    more than one of them. Every step is one call of ``step`` for all.
    """

    def __init__(self, step: Callable[[Sequence[T]], Sequence[Exception | None]], *, limit: int, batch: int):
        """step: takes a step of each task, gives what each failed with. limit: jobs that may wait beside those under
        way."""
        self._step, self._limit, self._batch = step, limit, batch
        self._waiting: deque[Job[T]] = deque()
        self._running: list[Job[T]] = []
        self._beginning: Job[T] | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._job_s = 1.0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        return len(self._running) + (self._beginning is not None)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, after `stop`."""
        return not self._thread.is_alive()

    def interrupted(self) -> bool:
        """Whether nobody waits for what the thread is doing now."""
        beginning = self._beginning
        return self._stopped or (beginning is not None and beginning.cancelled)

    def submit(self, job: Job[T]) -> None:
        """Raises RefusalError when the line is full, or after `refuse`."""
        with self._changed:
            if self._stopped:
                raise _stopping()
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

    def withdraw(self, job: Job[T]) -> None:
        """Cancel this job, whatever its state."""
        job.cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def refuse(self) -> None:
        """Take no job any more, and tell all that wait and all that run that they get no answer."""
        with self._changed:
            self._stopped = True
            told = [*self._waiting, *self._running, *([self._beginning] if self._beginning else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in told:
            job.cancelled = True
            job.tell(_stopping())

    def stop(self) -> None:
        """`refuse`, and wait a moment for the thread; see `ended`."""
        self.refuse()
        self._thread.join(_LAST_PASS_S)

    def _run(self) -> None:
        INTERRUPTED.set(self.interrupted)
        while self._next():
            if self._beginning:
                self._begin(self._beginning)
            self._choose()
            self._take_step()

    def _next(self) -> bool:
        """Wait until there is something to do, and take in the next job if there is a place; false once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopped)
            if self._waiting and len(self._running) < self._batch:
                self._beginning = self._waiting.popleft()
            return not self._stopped

    def _begin(self, job: Job[T]) -> None:
        job.started = time.perf_counter()
        try:
            job.task = job.begin(job)
            self._running.append(job)
        except Exception as error:
            job.tell(error)
        finally:
            self._beginning = None

    def _choose(self) -> None:
        """End those that have no further step."""
        for job in list(self._running):
            try:
                if not job.task.choose():
                    self._end(job, job.end(job, job.task))
            except Exception as error:
                self._end(job, error)

    def _take_step(self) -> None:
        if not self._running:
            return
        going = list(self._running)
        try:
            failures = self._step([job.task for job in going])
        except Exception as error:
            failures = [error] * len(going)
        for job, failure in zip(going, failures, strict=True):
            if failure is not None:
                self._end(job, failure)

    def _end(self, job: Job[T], told: Any) -> None:
        # what a job takes of the time while it shares it
        own = (time.perf_counter() - job.started) / len(self._running)
        self._job_s += (own - self._job_s) / 4
        self._running.remove(job)
        job.task = None
        job.tell(told)


def _stopping() -> RefusalError:
    return RefusalError(
        HTTPStatus.SERVICE_UNAVAILABLE, "the server is being stopped", code="stopping", retry_after=_RETRY_S
    )
