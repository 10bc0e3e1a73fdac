import resource

import pytest
import torch

from altopt import allocation
from altopt.allocation import give_back_freed_memory, keep_freed_memory
from stages.bench.memory import touch
from stages.bench.rounds import Measured

SIZE = 200_000_000


class Takes:
    """A contender's step that needs memory, and how many pages came anew from the system for it."""

    steps = None

    def __init__(self, keeps_memory):
        self.keeps_memory = keeps_memory
        self.faults = 0

    def step(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SIZE, dtype=torch.uint8)
        self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def memory_as_before():
    yield
    give_back_freed_memory()


@pytest.mark.skipif(allocation._glibc() is None, reason="the C library has no such settings")
@pytest.mark.parametrize("keeps", [True, False])
def test_a_step_finds_the_memory_that_its_earlier_ones_freed(memory_as_before, keeps):
    """Although a contender before it gave all back."""
    taken = Takes(keeps)
    measured = Measured(taken, torch.device("cpu"))
    measured.rise = SIZE
    give_back_freed_memory()
    measured._hold_memory()
    taken.step()
    assert (taken.faults < 20) == keeps


@pytest.mark.skipif(allocation._glibc() is None, reason="the C library has no such settings")
def test_touched_memory_is_there(memory_as_before):
    keep_freed_memory()
    touch(SIZE)
    taken = Takes(True)
    taken.step()
    assert taken.faults < 20
