"""What the processes that work on one stage have to say to each other; by itself, a process says it to itself.

torchrun starts the same command K times, as ranks 0 to K - 1. Rank 0 alone runs the command: it decides what is stale,
holds the lock and writes. The others wait for the stages that it announces and take their part in those.

Each rank works on its part of a batch, and gradients are added up. The same number of processes gives the same bytes,
resumed or not: every sum has a fixed order. Another number trains the same model up to rounding. What is made from the
same network (proposals, features, detections) is equal for any number, since each image is one rank's alone.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from altopt.errors import UsageError
from altopt.machine.interruption import Terminated

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Value = TypeVar("Value")
Item = TypeVar("Item")
Made = TypeVar("Made")

SIGNALS = {KeyboardInterrupt: 130, Terminated: Terminated.exit_code}


class OtherRankError(Exception):
    """The command ends because of another rank or a signal, and who knows more says why; ``exit_code`` is theirs."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class SingleProcess:
    """One process by itself: what there is to agree on, it decides alone."""

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.rank == 0

    def announce(self, task: object) -> None:
        """Rank 0: give the others a task, which they get by ``broadcast``; None is the end."""
        self.broadcast(task)

    def broadcast(self, value: object) -> Any:
        """Return rank 0's value, which is pickled; what the others give does not matter."""
        return value

    def all_gather(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank."""
        return [value]

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value on rank 0, by rank; elsewhere nothing."""
        return [value]

    def all_reduce_sum(self, values: "Tensor") -> "Tensor":
        """Return the sums of a tensor over the ranks, on its device."""
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the greatest of the ranks' values."""
        return value

    def sum_gradients(self, parameters: Iterable["nn.Parameter"]) -> None:
        """Make each gradient the sum of the ranks', after ``loss.backward()``; where one has none, it counts as 0."""

    def own_device(self, device: "torch.device") -> "torch.device":
        """Return the device of this rank: each has a GPU of its own. Raises ``UsageError`` where there are too few."""
        if device.type != "cuda" or self.count == 1:
            return device
        import torch

        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise UsageError(f"there is no GPU for process {number + 1} of this machine: start at most "
                             f"{torch.cuda.device_count()}, or use --device cpu")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    def map_images(self, items: Sequence[Item],
                   work: Callable[[Sequence[Item]], Iterator[Made]]) -> Generator[Made, None, None]:
        """Yield on rank 0 what ``work`` makes of the items, one for each and in their order; elsewhere nothing.

        Rank k makes every K-th, beginning with the k-th. All go on in step until the last item is made, or until rank 0
        closes the iterator.
        """
        own = work(items[self.rank :: self.count])
        try:
            for begin in range(0, len(items), self.count):
                yield from self.gather(next(own, None))[: len(items) - begin]  # type: ignore[misc]
                if not self.broadcast(True):
                    return
        except GeneratorExit:
            self.broadcast(False)
            raise
