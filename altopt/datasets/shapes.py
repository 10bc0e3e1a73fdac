"""Synthetic pictures drawn on the spot: filled shapes of five classes on noise. Nothing is downloaded or stored.

A split "train:400" is 400 pictures, train-00000 to train-00399. A picture depends on (seed, name of the split, number,
width, height), not on the count; ``altopt.datasets.shape_drawing`` draws it when it is first asked for.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altopt.datasets.dataset import Objects
from altopt.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from altopt.datasets.shape_drawing import Box

GENERATOR = 4  # part of the description: to be raised with any change of what is drawn
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SMALLEST_PICTURE = 40
KEPT_PICTURES = 1000  # of a data set, once drawn: more are drawn anew each time, so that memory stays flat
KEPT_BYTES = 2**30

_SPLIT = re.compile(r"([A-Za-z0-9_-]+):([1-9][0-9]{0,5})")


class ShapesDataset:
    """One or several splits of synthetic pictures of one size; the first that are asked for are kept."""

    def __init__(self, splits: tuple[str, ...], *, width: int = 320, height: int = 240, seed: int = 0) -> None:
        if min(width, height) < SMALLEST_PICTURE:
            raise UsageError(f"a picture of {width} x {height} is too small: set at least {SMALLEST_PICTURE}")
        self.name = f"shapes {'+'.join(splits)}"
        self.classes = SHAPES
        self.category_ids = tuple(range(1, len(SHAPES) + 1))
        self._splits, self._width, self._height, self._seed = splits, width, height, seed
        self._counts = _counts(splits)
        self._drawn: dict[str, tuple[NDArray[np.uint8], list[Box], list[int]]] = {}

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Name of the split and number of each picture."""
        return tuple(f"{name}-{number:05}" for name, count in self._counts.items() for number in range(count))

    def coco_image_id(self, picture_id: str) -> int | str:
        """Return the id itself."""
        return picture_id

    def size(self, picture_id: str) -> tuple[int, int]:
        """Return (width, height), of all pictures the same."""
        return self._width, self._height

    def image(self, picture_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3], a copy of the caller's own."""
        return self._draw(picture_id)[0].copy()

    def objects(self, picture_id: str) -> Objects:
        """Return the shapes in the order in which they were drawn, each with the box of all of it, hidden or not."""
        _, boxes, labels = self._draw(picture_id)
        return Objects.of(boxes, labels)

    def _draw(self, picture_id: str) -> tuple[NDArray[np.uint8], list[Box], list[int]]:
        """Two threads may both draw a picture; it is the same picture."""
        drawn = self._drawn.get(picture_id)
        if drawn is None:
            from altopt.datasets.shape_drawing import draw

            name, _, number = picture_id.rpartition("-")
            seed = f"altopt shapes {GENERATOR}: {self._seed} {name} {int(number)} {self._width} {self._height}"
            drawn = draw(seed, SHAPES, self._width, self._height)
            kept = len(self._drawn) + 1
            if kept <= KEPT_PICTURES and kept * drawn[0].nbytes <= KEPT_BYTES:
                self._drawn[picture_id] = drawn
        return drawn

    def files(self) -> list[Path]:
        """Return no file."""
        return []

    def description(self) -> dict[str, Any]:
        """Return everything that the pictures depend on."""
        size = {"width": self._width, "height": self._height}
        return {"kind": "shapes", "generator": GENERATOR, "splits": list(self._splits), **size, "seed": self._seed}

    def check(self) -> list[str]:
        """Return no warning: what is drawn is valid."""
        return []


def _counts(splits: tuple[str, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for split in splits:
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise UsageError(f'"{split}" is no split of shapes: give a name and a count of pictures, as in "train:400"')
        if match[1] in counts:
            raise UsageError(f'split "{match[1]}" of shapes occurs twice: give each a name of its own')
        counts[match[1]] = int(match[2])
    return counts
