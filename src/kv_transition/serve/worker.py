"""The thread that uses the model: requests wait for it in a queue, and answers are decoded together."""

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
from kv_transition.serve.refusal import RefusalError

_LONGEST_WAIT_S = 60

_RETRY_S = 5
"""Retry-After of a server that is being stopped, in seconds"""

_LAST_PASS_S = 0.5
"""Seconds that a stop waits for the forward pass, which checks at each layer whether it should end"""


class Task(Protocol):
    """The work of a job: it takes steps until it ends."""

    def choose(self) -> bool:
        """Prepare the next step; return whether there is one."""


T = TypeVar("T", bound=Task)


class Job(Generic[T]):
    """A piece of work that sends messages to the event loop: any number of messages, and at the end a result or an
    exception.

    It must be created in the event loop.
    """

    def __init__(self, begin: Callable[[Job[T]], T], end: Callable[[Job[T], T], Any]):
        """begin: the part that runs alone, such as reading a prompt. end: returns the result when there is no further
        step.
        """
        self.cancelled = False
        """set when no client waits for the result; the worker checks it"""
        self.begin, self.end = begin, end
        self.task: T | None = None
        self.started = 0.0
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Any] = asyncio.Queue()

    async def next(self) -> Any:
        return await self._told.get()

    def tell(self, what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so no client waits
            self._loop.call_soon_threadsafe(self._told.put_nowait, what)


class Worker(Generic[T]):
    """Runs jobs in the order of their arrival, up to ``batch`` at a time.

    One job begins between two steps of the running jobs, so that waiting prompts delay an answer by at most one prompt
    per step. Every step is one call of ``step`` for all running jobs.
    """

    def __init__(self, step: Callable[[Sequence[T]], Sequence[Exception | None]], *, limit: int, batch: int):
        """step: takes a step of each task and returns the error of each, or None. limit: maximum number of waiting
        jobs, in addition to the running ones.
        """
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
        """The number of jobs that have begun."""
        return len(self._running) + (self._beginning is not None)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, after `stop`."""
        return not self._thread.is_alive()

    def interrupted(self) -> bool:
        """Return whether no client waits for the current work of the thread."""
        beginning = self._beginning
        return self._stopped or (beginning is not None and beginning.cancelled)

    def submit(self, job: Job[T]) -> None:
        """Append a job to the queue. Raises RefusalError if the queue is full, or after `refuse`."""
        with self._changed:
            if self._stopped:
                raise _stopping()
            if len(self._waiting) >= self._limit:
                wait = min(_LONGEST_WAIT_S, max(1, math.ceil(self._job_s * len(self._waiting))))
                raise RefusalError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{len(self._waiting)} requests are waiting; retry later",
                    code="overloaded",
                    retry_after=wait,
                )
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job[T]) -> None:
        """Cancel a job, whether it waits or runs."""
        job.cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def refuse(self) -> None:
        """Accept no more jobs, and refuse all waiting and running jobs."""
        with self._changed:
            self._stopped = True
            told = [*self._waiting, *self._running, *([self._beginning] if self._beginning else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in told:
            job.cancelled = True
            job.tell(_stopping())

    def stop(self) -> None:
        """Refuse all jobs and wait at most `_LAST_PASS_S` seconds for the thread; see `ended`."""
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
        """Wait for work, and begin the next job if fewer than ``batch`` run; return false after a stop."""
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
        """End the jobs that have no further step."""
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
        # the job's share of the time, because several jobs run together
        own = (time.perf_counter() - job.started) / len(self._running)
        self._job_s += (own - self._job_s) / 4
        self._running.remove(job)
        job.task = None
        job.tell(told)


def _stopping() -> RefusalError:
    return RefusalError(
        HTTPStatus.SERVICE_UNAVAILABLE, "the server is being stopped", code="stopping", retry_after=_RETRY_S
    )
