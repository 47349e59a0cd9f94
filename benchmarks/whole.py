"""Run a command and all processes that it leaves running to their end; write the total cost.

    python benchmarks/whole.py FIGURES.json COMMAND ...

A worker that a job has started runs longer than the job, so the CPU time of the command's children does not include it.
Linux makes this process the parent of orphaned processes, and it waits for them. The exit status is the command's.
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
