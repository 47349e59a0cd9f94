"""Functions of rules that tests/test_script.py calls."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kv_transition.errors import UserError


def write(tables, pairs, options, output):
    print("said by the function", file=sys.stderr, flush=True)
    os.write(2, b"said by a library\n")
    Path(output).write_text(json.dumps({"tables": tables, "pairs": pairs, "options": options}))


def refuse(tables, output):
    raise UserError("scores.parquet: row 3 has no answer")


def break_down(tables, output):
    raise ZeroDivisionError("a bug")
