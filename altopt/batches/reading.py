"""Which images make up iteration t, as a function of (seed, stage, t), and reading them ahead of time."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from altopt.machine.randomness import generator
from altopt.machine.threads import single_threads

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Entry:
    """An image to train on; with flips, its mirror image is an entry of its own."""

    id: str
    flipped: bool
    landscape: bool


class BatchOrder:
    """The batches of an endless training run, epoch after epoch, each entry once in an epoch.

    Landscape images are batched with landscape ones, which saves padding. What is left over of either kind goes
    together, and the last batch of an epoch may be short: any number of entries works with any batch size.
    """

    def __init__(self, entries: Sequence[Entry], batch: int, *key: object) -> None:
        self.entries, self.batch, self.key = entries, batch, key
        self.batches_per_epoch = -(-len(entries) // batch)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # readers are an epoch ahead at its end

    def __getitem__(self, iteration: int) -> list[Entry]:
        """Return the entries of an iteration, counted from 0."""
        epoch, position = divmod(iteration, self.batches_per_epoch)
        return [self.entries[k] for k in self._epoch(epoch)[position]]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        random = generator(*self.key, "epoch", epoch)
        order = torch.randperm(len(self.entries), generator=random).tolist()
        groups: list[list[int]] = []
        rest: list[int] = []
        for landscape in (True, False):
            kind = [k for k in order if self.entries[k].landscape == landscape]
            whole = len(kind) - len(kind) % self.batch
            groups += [kind[k : k + self.batch] for k in range(0, whole, self.batch)]
            rest += kind[whole:]
        groups += [rest[k : k + self.batch] for k in range(0, len(rest), self.batch)]
        return [groups[k] for k in torch.randperm(len(groups), generator=random).tolist()]


class Prefetcher(Iterator[Made]):
    """Iterate over ``make(item)`` in order while threads work on the next ones; ``waited`` is seconds spent waiting.

    Threads, not processes: decoding and resizing release the interpreter, an exception reaches the caller as it is,
    and nothing is left behind when the process is killed. With 0 workers everything happens in place.
    """

    def __init__(self, make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> None:
        self.waited = 0.0
        self._make: Callable[[Item], Made] = make
        self._items = iter(items)
        self._pool = single_threads(workers, "altopt-reader") if workers else None
        self._pending: deque[Future[Made]] = deque()
        for _ in range(2 * workers):  # one in the making and one ready for each reader
            self._submit()

    def _submit(self) -> None:
        assert self._pool is not None
        for item in self._items:
            self._pending.append(self._pool.submit(self._make, item))
            return

    def __next__(self) -> Made:
        """Return the next one; the exception that its making raised is raised here."""
        started = time.perf_counter()
        try:
            if self._pool is None:
                return self._make(next(self._items))
            if not self._pending:
                raise StopIteration
            future = self._pending.popleft()
            self._submit()
            return future.result()
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        """Drop what has not been asked for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[Made]":
        """Return itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close, also after an error."""
        self.close()
