"""Memory that a step freed is there for the next one, without the kernel."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from vl_dist.run.freed_memory import keep_freed_memory

def step():
    kept = [torch.ones(2**20) for _ in range(100)]  # 4 MB each: below the bound of blocks that are always given back
    torch.ones(2**20).add_(kept[0])

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """How often ten steps, after as many, ask the kernel for memory."""
    # With glibc's first bound; it moves it by what it sees, and then gives memory back only now and then.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
    run = subprocess.run([sys.executable, "-c", STEPS, way], capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_a_step_like_the_last_one_asks_the_kernel_for_no_memory() -> None:
    given_back = faults("plain")
    assert given_back > 100, "of 400 MB a step; kernels hand out one page or several at a time"
    assert faults("keep") < given_back / 10
