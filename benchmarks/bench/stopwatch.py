"""Where the time of a step goes: a clock that is told by hooks which part begins and which ends.

The code that is timed knows nothing of it: modules are watched through PyTorch's own hooks, functions by putting a
wrapper in their place while the watch is worn. A part inside another interrupts it, so no second counts twice.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

PARTS = ("decode", "trunk", "rpn", "sampling", "roi_pool", "head", "backward", "optimizer", "write", "other")


class Stopwatch:
    """Seconds by part since ``start``; wherever a part begins or ends, the device's work is waited for.

    A watch that is not running ignores all that it is told. ``clock`` may be that of the processor's time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock: Callable[[], float] = clock
        self.seconds: dict[str, float] = {}  # of the step under way, by part
        self._open: list[str] = []
        self._device: torch.device | None = None
        self._since = 0.0

    def start(self, device: torch.device) -> None:
        """Begin anew; what no part claims is "other"."""
        self.seconds, self._device = {}, device
        synchronise(device)
        self._since, self._open = self.clock(), ["other"]

    def stop(self) -> dict[str, float]:
        """Stop, and return the seconds of every part of ``PARTS``."""
        if self._open:
            self._book()
        self._open = []
        return {name: self.seconds.get(name, 0.0) for name in PARTS}

    def enter(self, part: str) -> None:
        """Begin a part, inside the one that is under way."""
        if self._open:
            self._book()
            self._open.append(part)

    def leave(self, part: str) -> None:
        """End a part; the one around it goes on. One that is not under way is no part of this step."""
        if self._open and self._open[-1] == part:
            self._book()
            self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls counted as a part."""
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        return call

    def watch_module(self, module: nn.Module, part: str) -> None:
        """Count every call of the module as a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(part))
        module.register_forward_hook(lambda *_: self.leave(part))

    def watch_training(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Count as "backward" what lies between the losses and the optimizer's step, and that step as "optimizer"."""
        def end_forward(module: nn.Module, *_: Any) -> None:
            if module.training:
                self.enter("backward")

        def begin_update(*_: Any) -> None:
            self.leave("backward")
            self.enter("optimizer")

        module.register_forward_hook(end_forward)
        optimizer.register_step_pre_hook(begin_update)
        optimizer.register_step_post_hook(lambda *_: self.leave("optimizer"))

    @contextmanager
    def worn(self, functions: Iterable[tuple[object, str, str]]) -> Iterator[None]:
        """Count, during the block, calls of (module or class, name of its function, part)."""
        with ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield

    def _book(self) -> None:
        assert self._device is not None
        synchronise(self._device)
        now = self.clock()
        part = self._open[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
