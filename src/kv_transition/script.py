"""How scripts and jobs end on bad input, and where scripts log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from kv_transition.errors import UserError


@contextmanager
def logged(path: str) -> Iterator[None]:
    """Standard error goes to a file; bad input ends the script with one sentence, there and on the screen."""
    with open(path, "w", encoding="utf-8") as log, redirect_stderr(log):
        try:
            yield
        except UserError as error:
            print(error, file=log)
            sys.exit(str(error))


def status(work: Callable[..., None], *arguments: object) -> int:
    """Exit status of a job: 0, or 2 with one sentence for bad input. A bug keeps its traceback."""
    try:
        work(*arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
