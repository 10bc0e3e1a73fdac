"""How processes divide the batches of a training: each has neighbours of every batch, as evenly as can be."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from altopt.machine.distributed import SingleProcess

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Order(Protocol[Item_co]):
    """What each iteration trains on, by its number, as BatchOrder has it."""

    def __getitem__(self, iteration: int, /) -> Sequence[Item_co]:
        """Return the entries of an iteration."""


class LocalBatches(Generic[Item]):
    """This process's part of every batch of an order; all of it for a process by itself."""

    def __init__(self, group: SingleProcess, order: Order[Item]) -> None:
        self.group, self.order = group, order

    def __getitem__(self, iteration: int) -> list[Item]:
        """Return what this process works on in an iteration; may be called from any thread.

        One for which nothing is left works on the first entry, so that all do the same; what it finds counts nothing.
        """
        # Each process could read all entries and take its own; so only what it trains on is read.
        batch = self.order[iteration]
        return list(batch[self._own(len(batch))] or batch[:1])

    def idle(self, iteration: int) -> bool:
        """Return whether nothing of an iteration is left for this process."""
        return not self.order[iteration][self._own(self.size(iteration))]

    def size(self, iteration: int) -> int:
        """Return how many entries all processes work on in an iteration."""
        return len(self.order[iteration])

    def _own(self, entries: int) -> slice:
        rank, count = self.group.rank, self.group.count
        return slice(entries * rank // count, entries * (rank + 1) // count)
