"""The client: find or start the worker of a job, send the job, wait, and return its exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kv_transition.errors import UserError
from kv_transition.worker import frames, runs
from kv_transition.worker.key import PACKAGE, Worker, of_imports
from kv_transition.worker.place import Place, place_of

VARIABLE = "KVT_WORKER"
"""``auto``: workers run the jobs; ``never``: each job runs in its own process"""
_TRIES = 3
_GRACE_S = 10.0
"""seconds that an interrupted client waits until its job has cleaned up"""


class _EndedError(Exception):
    """The worker has ended. begun: whether it had started the job."""

    def __init__(self, begun: bool):
        self.begun = begun


def call(function: str, arguments: dict[str, Any], imports: Sequence[str]) -> int | None:
    """Call ``module:function`` with keywords (JSON values) in a worker that has ``imports`` imported, or else in this
    process.

    The output appears on this process's streams. Returns the exit status; None if this process has no memory left for
    the call. Raises UserError if KVT_WORKER is neither auto nor never.
    """
    job = {"call": function, "arguments": arguments}
    status = carry_out(job, of_imports(imports))
    if status is not None:
        return status
    from kv_transition.worker.perform import perform

    return perform(job)


def workers_wanted() -> bool:
    """Return whether jobs are sent to workers. Raises UserError if KVT_WORKER is neither auto nor never."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "never"):
        raise UserError(f"{VARIABLE}: {wanted!r} is not allowed; set it to auto or never")
    return wanted == "auto" and hasattr(socket, "send_fds")


def carry_out(job: dict[str, Any], worker: Worker | None) -> int | None:
    """Return the exit status of a job that a worker has run; None if the job must run in this process.

    Raises UserError if KVT_WORKER is neither auto nor never.
    """
    if not workers_wanted() or worker is None:
        return None
    place = place_of(worker.name)
    if place is None:
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    message = job | {"environment": dict(os.environ), "folder": os.getcwd(), "run": os.environ.get(runs.VARIABLE)}
    for _ in range(_TRIES):
        try:
            return _handed_over(message, place, worker)
        except OSError as error:
            print(f"no worker is available ({error}), so the job runs in its own process", file=sys.stderr)
            return None
        except _EndedError as ended:
            if ended.begun:
                print("the worker ended, so the job runs again in its own process", file=sys.stderr)
                return None
    return None


def _handed_over(message: dict[str, Any], place: Place, worker: Worker) -> int | None:
    with _connection(place, worker) as connection, _Interruptible():
        begun = False
        try:
            frames.send(connection, message, [1, 2])
            while (got := frames.receive(connection)) is not None:
                answer, _ = got
                if answer["state"] == frames.TAKEN:
                    begun = True
                    continue
                return _status(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except KeyboardInterrupt:
            _wait_for_the_end(connection)
            raise SystemExit(130) from None
    raise _EndedError(begun)


def _status(answer: dict[str, Any]) -> int | None:
    """Return the exit status in the last message of a worker; None if the job must run in this process."""
    if answer["state"] == frames.DONE:
        print(answer["report"], file=sys.stderr)
        return int(answer["status"])
    if answer["state"] == frames.STOPPED:
        return 130
    print(f"{answer['reason']}, so the job runs in its own process", file=sys.stderr)
    return None


def _wait_for_the_end(connection: socket.socket) -> None:
    """Tell the worker to end the job, and wait until it has ended."""
    with suppress(OSError, ValueError, KeyboardInterrupt):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_GRACE_S)
        while frames.receive(connection) is not None:
            pass


class _Interruptible:
    """Context that treats SIGTERM like Ctrl-C."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _connection(place: Place, worker: Worker) -> socket.socket:
    """Return a connection to the worker, which is started if needed. Raises OSError if that fails."""
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connected(place)
    with place.locked():
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return _connected(place)  # another client has started it meanwhile
        place.clear()
        _start(place, worker)
    return _connected(place)


def _connected(place: Place) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    for wait_s in (0.05, 0.2, 1.0, 5.0, None):
        try:
            connection.connect(str(place.socket))
            return connection
        except BlockingIOError:  # its queue is full
            if wait_s is None:
                break
            time.sleep(wait_s)
        except BaseException:
            connection.close()
            raise
    connection.close()
    raise BlockingIOError("too many jobs wait for it")


def _start(place: Place, worker: Worker) -> None:
    """Start the worker's process with a socket that already listens, so that clients can connect at once."""
    import subprocess

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.socket))
        os.chmod(place.socket, 0o600)
        listener.listen(1024)
        path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "kv_transition.worker.server", str(listener.fileno()), str(place.folder)]
        with place.log.open("wb") as log:
            subprocess.Popen(
                [*command, json.dumps(worker._asdict())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C must reach the client only
            )
