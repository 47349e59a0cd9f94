"""Jobs as forked copies of the worker: each copy starts with the loaded model, and its failure affects no other job.

A copy starts in the state that the worker had before its first job, including every random generator, as a separate
process would. It has its own CPU time and memory, while the weights are in memory only once. CUDA does not survive a
fork, so this works on a CPU only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kv_transition.worker import frames, runs
from kv_transition.worker.perform import as_of, perform

_GRACE_S = 5.0
"""seconds from the interruption of a job until it is killed"""


@dataclass
class _Job:
    pid: int
    connection: socket.socket
    ending: int
    """descriptor that the job writes its exit status to; it is closed when the job ends"""
    run: str | None
    interrupted: float | None = None
    """time at which it was interrupted"""
    gone: bool = False
    """whether its client has closed the connection"""


class Forked:
    """Runs any number of jobs at the same time; the callers limit the number."""

    def __init__(self) -> None:
        self._jobs: dict[int, _Job] = {}
        # Nothing is written to this pipe: when it closes, the worker has ended, and its jobs must end.
        self._alive, self._life = os.pipe()

    @property
    def waiting(self) -> dict[int, Any]:
        """Return the descriptors of all jobs, except the connections of clients that have gone."""
        fds: dict[int, Any] = {}
        for job in self._jobs.values():
            fds[job.ending] = job
            if not job.gone:
                fds[job.connection.fileno()] = job
        return fds

    def begin(self, connection: socket.socket, job: dict[str, Any], files: list[int]) -> None:
        """Fork a process that runs the job."""
        ending, end = os.pipe()
        try:
            frames.send(connection, {"state": frames.TAKEN, "pid": os.getpid()})
            pid = os.fork()
        except OSError:
            for fd in (ending, end, *files):
                os.close(fd)
            connection.close()
            return
        if not pid:
            self._carry_out(job, files, end, [ending, connection.fileno()])
        for fd in (end, *files):
            os.close(fd)
        self._jobs[pid] = _Job(pid, connection, ending, job.get("run"))

    def _carry_out(self, job: dict[str, Any], files: list[int], end: int, close: list[int]) -> None:
        """Run the job in the forked process; never returns."""
        status: int | None = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for fd in [self._life, *close, *self.waiting]:
                os.close(fd)
            threading.Thread(target=self._end_with_the_worker, daemon=True).start()
            with as_of(job, *files):
                status = perform(job)
        finally:
            os.write(end, json.dumps({"status": status}).encode())
            os._exit(0)

    def _end_with_the_worker(self) -> None:
        os.read(self._alive, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    def attend(self, ready: list[int]) -> None:
        """Report the jobs that have ended, and end those whose client or run has gone."""
        for job in list(self._jobs.values()):
            if job.ending in ready:
                self._over(job)
                continue
            if not job.gone and job.connection.fileno() in ready:
                job.gone = _said_nothing_more(job.connection)
            if job.interrupted is None and (job.gone or (job.run and not runs.is_alive(job.run))):
                job.interrupted = time.monotonic()
                os.kill(job.pid, signal.SIGINT)
            elif job.interrupted is not None and time.monotonic() - job.interrupted > _GRACE_S:
                os.kill(job.pid, signal.SIGKILL)

    def _over(self, job: _Job) -> None:
        said = os.read(job.ending, 4096)
        os.close(job.ending)
        _, ended, used = os.wait4(job.pid, 0)
        del self._jobs[job.pid]
        cpu_s, peak_mb = used.ru_utime + used.ru_stime, used.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
        status = json.loads(said)["status"] if said else None
        if job.interrupted is not None:
            answer = {"state": frames.STOPPED}
        elif status is not None:
            report = f"worker {os.getpid()}: {cpu_s:.2f} s of processor time, at most {peak_mb:.0f} MiB"
            answer = {"state": frames.DONE, "status": status, "report": report}
        elif os.WIFSIGNALED(ended):
            answer = {"state": frames.AGAIN, "reason": f"it was killed in the worker (signal {os.WTERMSIG(ended)})"}
        else:
            answer = {"state": frames.AGAIN, "reason": "it ran out of memory in the worker"}
        with job.connection, suppress(OSError):
            frames.send(job.connection, answer)

    def stop(self) -> None:
        """Kill every job. Files are written atomically, so no partial file remains."""
        for job in list(self._jobs.values()):
            os.kill(job.pid, signal.SIGKILL)
            self._over(job)


def _said_nothing_more(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1)
    except OSError:
        return True
