import subprocess
import sys

import pytest

from altopt.machine import allocation

# In a process of its own: how memory is handed out depends on all that was done with it before.
FAULTS = """
import resource
import torch
from altopt.machine.allocation import give_back_freed_memory
from benchmarks.bench.rounds import Measured

SIZE = 200_000_000

class Contender:
    steps = None

def faults(keeps_memory):
    contender = Contender()
    contender.keeps_memory = keeps_memory
    measured = Measured(contender, torch.device("cpu"))
    measured.rise = SIZE
    give_back_freed_memory()
    measured._hold_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(True), faults(False), faults(True))
"""


@pytest.mark.slow
@pytest.mark.skipif(allocation._glibc() is None, reason="the C library has no such settings")
def test_a_step_finds_the_memory_that_its_earlier_ones_freed():
    """Although a contender before it gave all back; each page that comes anew from the system is a fault."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, given_back, kept_again = map(int, ran.stdout.split())
    assert max(kept, kept_again) < 20 < given_back
