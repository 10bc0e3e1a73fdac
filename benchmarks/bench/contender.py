"""What takes part in a bench: something that takes steps, and what it is called."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from altopt.machine.allocation import give_back_freed_memory, keep_freed_memory
from benchmarks.bench.memory import held_bytes
from benchmarks.bench.stopwatch import Stopwatch

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Identity:
    """What a contender is: the stage's function, or torchvision's part, and how it is done."""

    name: str
    precision: Precision
    store: bool = False  # reads stored maps of the frozen conv layers
    compiled: bool = False  # the conv layers went through torch.compile

    def __str__(self) -> str:
        marks = ["store"] * self.store + ["compiled"] * self.compiled
        return ", ".join([self.name, *marks, self.precision])


@dataclass(kw_only=True)
class Contender(ABC):
    """Something that takes steps; what ``prepare`` and ``finish`` do around a step is not timed."""

    identity: Identity
    images: int
    watch: Stopwatch
    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    steps: int | None = None  # how many at most; None is as many as there are rounds
    keeps_memory: bool = True  # as altopt's commands do

    def prepare(self) -> None:
        """Bring module and memory into the mode that the step needs: contenders share networks and the process."""
        self.module.train(self.optimizer is not None)
        if self.keeps_memory:
            keep_freed_memory()
        else:
            give_back_freed_memory()

    @abstractmethod
    def step(self, iteration: int) -> None:
        """Do the work of one step."""

    def finish(self) -> None:
        """Let go of what the step left behind."""
        self.module.zero_grad(set_to_none=True)

    def held(self) -> int:
        """Return the bytes that it holds between steps."""
        return held_bytes(self.module, self.optimizer)
