"""How ranks divide the batches of a training, so that together they compute what one process would."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from altopt.batches.samples import Batch
from altopt.machine.distributed import SingleProcess

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Order(Protocol[Item_co]):
    """What each iteration trains on, by its number, as BatchOrder has it."""

    def __getitem__(self, iteration: int, /) -> Sequence[Item_co]:
        """Return the entries of an iteration."""


class LocalBatches(Generic[Item]):
    """The batches of an order, each cut into one piece of neighbours for every rank, as evenly as it can be.

    A rank for which nothing is left works on the first entry, and its count is 0: so all ranks do the same.
    """

    def __init__(self, ranks: SingleProcess, order: Order[Item]) -> None:
        self.ranks, self.order = ranks, order
        self._idle = False

    def __getitem__(self, iteration: int) -> list[Item]:
        """Return what this rank works on in an iteration; may be called from any thread."""
        batch = self.order[iteration]
        return list(batch[self._own(len(batch))] or batch[:1])

    def begin(self, batch: Batch, iteration: int) -> Batch:
        """Return the batch of this rank's samples as a part of the whole; what follows is about this iteration."""
        own = self._own(len(self.order[iteration]))
        self._idle = own.start == own.stop
        return replace(batch, weight=self.weight, middle=len(self.order[iteration]) // 2 - own.start)

    def images(self, iteration: int) -> int:
        """Return how many images all ranks work on in an iteration."""
        return len(self.order[iteration])

    def weight(self, count: int) -> float:
        """Return what each of so many images or RoIs of this rank has in the mean over those of all ranks.

        All ranks have to ask. Whose batch has nothing left for them, theirs count nothing.
        """
        total = sum(self.ranks.all_gather(0 if self._idle else count))
        return 0.0 if self._idle else 1 / max(total, 1)

    def _own(self, entries: int) -> slice:
        rank, count = self.ranks.rank, self.ranks.count
        return slice(entries * rank // count, entries * (rank + 1) // count)

