"""The state inside a stage, so that an interrupted training goes on where it was."""
# A snapshot is a shortcut: one that is missing, of another training or damaged costs time and nothing else.

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.errors import AltoptError
from cache.checkpoints import load_checkpoint, raw_bytes, read_description, save_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("altopt")

WRITE_SHARE = 50  # at most one part in so many of the time goes into writing


def save_snapshot(path: Path, *, key: str, iteration: int, tensors: Mapping[str, Tensor], seconds: float) -> None:
    """Write the state of the training that ``key`` stands for (stage, inputs, config); ResourceError without room."""
    # In the place of the last one, which is still there when this one could not be written.
    state = {"key": key, "iteration": iteration, "seconds": seconds, "checksum": _checksum(tensors)}
    save_checkpoint(path, tensors, {"kind": "snapshot", **state})


def load_snapshot(path: Path, key: str) -> tuple[int, dict[str, Tensor], float] | None:
    """Return iteration, tensors and seconds as saved; None, and why in the log, when of another training or damaged."""
    if not path.exists():
        return None
    try:
        if read_description(path).get("key") != key:
            logger.info("%s is of another training: starting at the beginning", path)
            return None
        tensors, description = load_checkpoint(path)
        if _checksum(tensors) != description["checksum"]:
            raise ValueError("the tensors are not the ones that were written")
        return int(description["iteration"]), tensors, float(description["seconds"])
    except (AltoptError, KeyError, ValueError, TypeError) as error:
        logger.warning("%s is not used (%s): starting at the beginning", path, error)
        return None


class SnapshotClock:
    """Says when a snapshot is due: after ``every`` seconds, or later where writing would take over 1/50 of the time."""

    def __init__(self, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._last = clock()
        self._took = 0.0

    def due(self) -> bool:
        """Return whether it is time to write."""
        return self._clock() - self._last >= max(self._every, WRITE_SHARE * self._took)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Measure the writing of a snapshot, done in the block; the next one is due counted from its end."""
        begin = self._clock()
        try:
            yield
        finally:
            self._last = self._clock()
            self._took = self._last - begin


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of names and values: it finds damage as a hash does, and a snapshot is written often."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(raw_bytes(tensors[name]).data, checksum)
    return checksum
