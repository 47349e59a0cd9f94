"""Jobs for a worker without a model; they record where they ran."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from kv_transition.errors import UserError


def note(path: str, text: str = "") -> None:
    """Append a line with the ids of this process and of its parent, and ``text``."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {text}\n")


def work(path: str, seconds: float = 0.0) -> None:
    note(path, f"{os.getcwd()} {os.environ.get('KVT_TEST', '')}")
    print("to standard output")
    print("to standard error", file=sys.stderr)
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        note(path, "tidied up")
        raise


def die_in_a_worker(path: str, how: str) -> None:
    """Raise MemoryError or kill the process, unless it is the client itself."""
    note(path)
    if os.environ["KVT_TEST"] != str(os.getpid()):
        if how == "memory":
            raise MemoryError
        os.kill(os.getpid(), signal.SIGKILL)


def fail(how: str) -> None:
    if how == "input":
        raise UserError("row 3: give a number")
    if how == "status":
        sys.exit(7)
    raise RuntimeError("a bug")
