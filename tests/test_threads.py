"""What becomes of freed memory."""

import ctypes
import os
import subprocess
import sys

import pytest

# 32 arrays of 2 MB, as a step's tensors are; how often the system had to hand out a page the third time.
USE = """
import resource
import numpy as np
from sdxl_trainer.threads import keep_freed_memory

def use():
    return [np.ones(1 << 18) for _ in range(32)][0].sum()

kept = keep_freed_memory()
use(), use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise() -> None:
    own = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    plain = {name: value for name, value in os.environ.items() if name not in own}
    found = []
    for environment in (plain, plain | own):
        command = [sys.executable, "-c", USE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append([int(word) for word in done.stdout.split()])
    (kept, again), (changed, fresh) = found
    assert (kept, changed) == (1, 0)
    assert again < 1000
    assert fresh > 10_000
