"""Run one job in this process with the output streams, folder and environment of the client."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130


class SpentError(BaseException):
    """The worker cannot run another job. It is a BaseException, so that jobs do not catch it."""


def perform(job: dict[str, Any]) -> int | None:
    """Run a job and return its exit status as the interpreter would set it; None if it ran out of memory.

    job: ``module`` and ``arguments`` (the list after ``python -m MODULE``), or ``call`` ("module:function") and
    ``arguments`` (keywords of the function).
    """
    try:
        if "call" in job:
            module, _, function = job["call"].partition(":")
            getattr(importlib.import_module(module), function)(**job["arguments"])
        else:
            sys.argv = [job["module"], *job["arguments"]]
            sys.modules.pop(job["module"], None)  # it runs as the main module, so it must be imported again
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError:
        return None
    except Exception as error:
        if type(error).__name__ == "UserError":
            print(error, file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1


@contextmanager
def as_of(client: dict[str, Any], output: int, error: int) -> Iterator[None]:
    """Give this process the client's standard output and error, folder and environment within the block."""
    kept = os.dup(1), os.dup(2)
    environment, folder, argv = dict(os.environ), os.getcwd(), sys.argv
    try:
        os.dup2(output, 1)
        os.dup2(error, 2)
        os.environ.clear()
        os.environ.update(client["environment"])
        os.chdir(client["folder"])
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for fd in kept:
            os.close(fd)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = argv
