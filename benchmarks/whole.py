"""Runs a command and everything that it leaves behind to the end; writes what all of it cost.

    python benchmarks/whole.py FIGURES.json COMMAND ...

A worker that a job has started outlives the job, so that the processor time of the command's children leaves it out.
Linux hands processes without a parent to this one, which waits for them. The exit status is the command's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Return the exit status of the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.perf_counter()
    status = subprocess.run(sys.argv[2:]).returncode
    wall_s = time.perf_counter() - started
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall_s, "peak_mb": used.ru_maxrss / 1024}
    Path(sys.argv[1]).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
