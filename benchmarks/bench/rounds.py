"""Interleaved timing: one step of each contender in turn, round after round, so that all meet the same weather."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from altopt.machine.allocation import give_back_freed_memory, keep_freed_memory
from benchmarks.bench.contender import Contender
from benchmarks.bench.memory import PeakMemory, touch
from benchmarks.bench.stage_contenders import Trained
from benchmarks.bench.stopwatch import PARTS, synchronise
from cache.snapshots import WRITE_SHARE
from stages.shared.step import Runtime


class Measured:
    """The steps of one contender so far."""

    def __init__(self, contender: Contender, device: torch.device) -> None:
        self.contender, self.device = contender, device
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._last_parts: dict[str, float] = {}
        self.rise: int | None = None
        self.write_seconds = 0.0

    def warm_up(self) -> None:
        """Take steps that do not count: in the first kernels are chosen and momenta made, the second shows the memory.

        For that one the process begins without any that earlier steps have freed; which takes time, so it is a step of
        its own. A contender of few steps has neither.
        """
        if self.contender.steps is None:
            self._step(0, lambda: None)
            give_back_freed_memory()
            memory = PeakMemory(self.device)
            memory.start()
            self._step(0, lambda: None)
            self.rise = memory.rise()

    def take_turn(self, iteration: int) -> None:
        """Take a step that counts; on a GPU another one, because waiting at every part's border costs time itself."""
        if self.contender.steps is not None and len(self.seconds) >= self.contender.steps:
            return
        watch, on_gpu = self.contender.watch, self.device.type == "cuda"
        self._hold_memory()
        before = time.process_time()
        took = self._step(iteration, (lambda: None) if on_gpu else lambda: watch.start(self.device))
        self.processor.append(time.process_time() - before)
        self.seconds.append(took)
        if on_gpu:
            self._step(iteration, lambda: watch.start(self.device))
        self.parts.append(self._last_parts)

    def _hold_memory(self) -> None:
        """Let the process have what a command's earlier steps leave it; another contender may have given that back."""
        if self.contender.keeps_memory and self.rise and self.device.type == "cpu":
            keep_freed_memory()
            touch(self.rise)

    def _step(self, iteration: int, start_watch: Callable[[], None]) -> float:
        self.contender.prepare()
        synchronise(self.device)
        start_watch()
        began = time.perf_counter()
        self.contender.step(iteration)
        synchronise(self.device)
        took = time.perf_counter() - began
        self._last_parts = self.contender.watch.stop()
        self.contender.finish()
        return took

    def spread_snapshot(self, took: float) -> None:
        """Count a snapshot that took so many seconds as a part of the steps between two of them."""
        step = statistics.median(sum(parts.values()) for parts in self.parts)
        self.write_seconds = took * step / max(Runtime.snapshot_seconds, WRITE_SHARE * took)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-able; the parts are those of the median step, and what is written spread over it."""
        identity, middle = self.contender.identity, statistics.median_low(self.seconds)
        parts = dict(self.parts[self.seconds.index(middle)])
        parts["write"] += self.write_seconds
        total = sum(parts.values())
        held = self.contender.held()
        return {
            "name": identity.name, "precision": identity.precision, "store": identity.store,
            "compiled": identity.compiled, "images": self.contender.images,
            "seconds": statistics.median(self.seconds), "least": min(self.seconds), "greatest": max(self.seconds),
            "processor_seconds": statistics.median(self.processor), "steps": len(self.seconds),
            "parts": parts, "shares": {name: parts[name] / total for name in PARTS},
            "held_bytes": held, "peak_bytes": None if self.rise is None else held + self.rise,
        }


def run_rounds(contenders: Sequence[tuple[Contender, torch.device]], rounds: int,
               say: Callable[[str], None]) -> list[Measured]:
    """Take one step of each contender in turn, as often as there are rounds, after those that do not count."""
    measured = [Measured(*each) for each in contenders]
    for each in measured:
        say(f"warming up: {each.contender.identity}")
        each.warm_up()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: {len(measured)} contenders")
        for each in measured:
            each.take_turn(number)
    _spread_snapshots(measured)
    return measured


def _spread_snapshots(measured: Sequence[Measured]) -> None:
    """Time a snapshot of each module that is trained; contenders that share one share the time too."""
    took: dict[int, float] = {}
    for each in measured:
        if isinstance(each.contender, Trained):
            module = id(each.contender.module)
            if module not in took:
                clock = each.contender.watch.clock
                began = clock()
                each.contender.write_snapshot()
                took[module] = clock() - began
            each.spread_snapshot(took[module])
