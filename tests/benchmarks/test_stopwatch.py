import types

import pytest
import torch
from torch import nn

from benchmarks.bench.stopwatch import PARTS, Stopwatch

CPU = torch.device("cpu")


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return Stopwatch(clock)


def spent(watch):
    parts = watch.stop()
    assert tuple(parts) == PARTS
    return {name: seconds for name, seconds in parts.items() if seconds}


def test_a_part_inside_another_interrupts_it(watch, clock):
    watch.start(CPU)
    clock.run(1)
    with watch.part("rpn"):
        clock.run(2)
        with watch.part("sampling"):
            clock.run(4)
        clock.run(8)
    clock.run(16)
    assert spent(watch) == {"other": 17, "rpn": 10, "sampling": 4}


def test_a_new_start_forgets_what_was(watch, clock):
    watch.start(CPU)
    watch.enter("trunk")
    clock.run(1)
    watch.start(CPU)
    clock.run(2)
    assert spent(watch) == {"other": 2}


def test_a_watch_that_does_not_run_ignores_parts(watch, clock):
    with watch.part("trunk"):
        clock.run(1)
    assert spent(watch) == {}


def test_a_part_that_is_not_under_way_cannot_end(watch, clock):
    watch.start(CPU)
    watch.enter("head")
    watch.leave("trunk")
    clock.run(3)
    assert spent(watch) == {"head": 3}


def test_a_training_step_is_divided_by_hooks(watch, clock):
    class Slow(nn.Linear):
        def forward(self, input):
            clock.run(1)
            return super().forward(input)

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Slow(2, 2)

        def forward(self, input):
            clock.run(2)
            return self.conv(input).sum()

    module = Training()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    watch.watch_module(module.conv, "trunk")
    watch.watch_training(module, optimizer)
    optimizer.register_step_post_hook(lambda *_: clock.run(32))  # after the watch's own
    watch.start(CPU)
    loss = module(torch.ones(1, 2))
    loss.backward()
    clock.run(4)
    optimizer.step()
    assert spent(watch) == {"trunk": 1, "other": 34, "backward": 4}


def test_functions_are_wrapped_during_the_block_only(watch, clock):
    module = types.SimpleNamespace(pool=lambda seconds: clock.run(seconds) or "pooled")
    plain = module.pool
    watch.start(CPU)
    with watch.worn([(module, "pool", "roi_pool")]):
        assert module.pool(5) == "pooled"
    module.pool(7)
    assert module.pool is plain
    assert spent(watch) == {"roi_pool": 5, "other": 7}
