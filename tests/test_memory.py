"""Check that a process that keeps freed memory gets it again without the system's help."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from kv_transition.run.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size = 48 * 2**20
faults(size + 2**20)  # aligned memory needs a little more than its own size
print(faults(size) / (size // resource.getpagesize()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0.0, 0.1), ("default", 0.5, 2.0)])
def test_a_freed_block_is_used_again(how, least, most):
    done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True)
    assert least <= float(done.stdout) <= most
