"""What the rules' scripts have in common: where they log, and how they end on bad input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
