"""How ranks divide the batches of a training, so that together they compute what one process would."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.pictures import Batch
from altopt.ranks import Ranks

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Order(Protocol[Item_co]):
    """What each iteration trains on, by its number, as BatchOrder has it."""

    def __getitem__(self, iteration: int, /) -> Sequence[Item_co]:
        """Return the entries of an iteration."""


class Slices(Generic[Item]):
    """The batches of an order, each cut into one piece of neighbours for every rank, as evenly as it can be.

    A rank for which nothing is left works on the first entry, and its count is 0: so all ranks do the same.
    """

    def __init__(self, ranks: Ranks, order: Order[Item]) -> None:
        self.ranks, self.order = ranks, order
        self._idle = False

    def __getitem__(self, iteration: int) -> list[Item]:
        """Return what this rank works on in an iteration; may be called from any thread."""
        batch = self.order[iteration]
        return list(batch[self._own(len(batch))] or batch[:1])

    def begin(self, batch: Batch, iteration: int) -> Batch:
        """Return the batch of this rank's samples as a part of the whole; what follows is about this iteration.

        Its pictures are padded to the size of the whole batch's: what conv layers make of an edge depends on what
        follows it. Maps are padded where conv layers follow (altopt/frozen.py).
        """
        own = self._own(len(self.order[iteration]))
        self._idle = own.start == own.stop
        batch = replace(batch, share=self.share, greatest=self.ranks.greatest)
        if batch.maps is not None:
            return batch
        height, width = batch.images.shape[2:]
        missing = (0, self.ranks.greatest(width) - width, 0, self.ranks.greatest(height) - height)
        if not any(missing):
            return batch
        return replace(batch, images=F.pad(batch.images, missing).contiguous(memory_format=torch.channels_last))

    def pictures(self, iteration: int) -> int:
        """Return how many pictures all ranks work on in an iteration."""
        return len(self.order[iteration])

    def share(self, count: int) -> float:
        """Return what part a count of pictures or RoIs is of the sum over the ranks, all of which have to ask."""
        counts = self.counts(count)
        return counts[self.ranks.rank] / max(sum(counts), 1)

    def counts(self, count: int) -> list[int]:
        """Return every rank's count, by rank."""
        return self.ranks.gather(0 if self._idle else count)

    def slice_dropout(self, module: nn.Module) -> None:
        """Put ``SlicedDropout`` in the place of every dropout in the module."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Dropout):
                    parent.add_module(name, SlicedDropout(child.p, self))

    def _own(self, entries: int) -> slice:
        rank, count = self.ranks.rank, self.ranks.count
        return slice(entries * rank // count, entries * (rank + 1) // count)


class SlicedDropout(nn.Dropout):
    """Dropout whose masks do not depend on the number of ranks: each draws the whole batch's, and uses its own rows.

    That costs K times the drawing, of some thousand numbers for each RoI.
    """

    def __init__(self, p: float, slices: Slices[Any]) -> None:
        super().__init__(p)
        self.slices = slices

    def forward(self, input: Tensor) -> Tensor:
        """Return ``Tensor[R, D]`` of this rank's R rows with some values dropped and the others scaled up."""
        if not self.training:
            return input
        counts = self.slices.counts(len(input))
        mask = F.dropout(torch.ones(sum(counts), *input.shape[1:], dtype=input.dtype, device=input.device), self.p)
        if counts[self.slices.ranks.rank] == 0:
            return input
        return input * torch.split(mask, counts)[self.slices.ranks.rank]
