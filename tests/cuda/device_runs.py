"""What the tests of a device share: which devices there are, and a look at each step of the training loop."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from altopt.training import loop
from benchmarks.bench.measuring import float32_switches

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let a GPU multiply float32 as such and not as TF32, which has ten bits."""
    places = float32_switches()
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def around_steps(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Let ``around`` call each step of the training loop, the first one apart: it makes what is made once."""
    take, taken = loop.train_step, []

    def step(*arguments: Any, **keywords: Any) -> Any:
        taken.append(1)
        if len(taken) == 1:
            return take(*arguments, **keywords)
        return around(lambda: take(*arguments, **keywords))

    monkeypatch.setattr(loop, "train_step", step)


class Asking(TorchDispatchMode):
    """Counts ops at which the processor would wait for a GPU: to learn a value or a size, or to bring it numbers."""

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh", "_unique2", "nms")

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name == "index" and any(each is not None and each.dtype == torch.bool for each in arguments[1]):
            name = "nonzero"  # of a mask
        self.asked[name] += name in self.ASKS
        return op(*arguments, **(keywords or {}))
