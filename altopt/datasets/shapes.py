"""Synthetic images drawn on the spot: filled shapes of five classes on noise. Nothing is downloaded or stored.

A split "train:400" is 400 images, train-00000 to train-00399. An image depends on (seed, name of the split, number,
width, height), not on the count; ``altopt.datasets.shape_drawing`` draws it when it is first asked for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.datasets.checking import Look
from altopt.datasets.dataset import Json, Objects
from altopt.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from altopt.datasets.shape_drawing import Box

GENERATOR = 4  # part of the description: to be raised with any change of what is drawn
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SMALLEST_IMAGE = 40
KEPT_IMAGES = 1000  # of a data set, once drawn: more are drawn each time, so that memory stays flat
KEPT_BYTES = 2**30

_SPLIT = re.compile(r"([A-Za-z0-9_-]+):([1-9][0-9]{0,5})")


class ShapesDataset:
    """One or several splits of synthetic images of one size; the first that are asked for are kept."""

    def __init__(self, splits: tuple[str, ...], *, width: int = 320, height: int = 240, seed: int = 0) -> None:
        if min(width, height) < SMALLEST_IMAGE:
            raise UsageError(f"an image of {width} x {height} is too small: set at least {SMALLEST_IMAGE}")
        self.name = f"shapes {'+'.join(splits)}"
        self.classes = SHAPES
        self.category_ids = tuple(range(1, len(SHAPES) + 1))
        self._splits, self._width, self._height, self._seed = splits, width, height, seed
        counts: dict[str, int] = {}
        for split in splits:
            match = _SPLIT.fullmatch(split)
            if match is None:
                raise UsageError(f'"{split}" is not a split of shapes: name it and its number of images, as in '
                                 '"train:400"')
            if match[1] in counts:
                raise UsageError(f'split "{match[1]}" of shapes occurs twice: give each a name of its own')
            counts[match[1]] = int(match[2])
        self.ids = tuple(f"{name}-{number:05}" for name, count in counts.items() for number in range(count))
        self._drawn: dict[str, tuple[NDArray[np.uint8], list[Box], list[int]]] = {}

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the id itself."""
        return image_id

    def size(self, image_id: str) -> tuple[int, int]:
        """Return (width, height), of all images the same."""
        return self._width, self._height

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3], a copy of the caller's own."""
        return self._draw(image_id)[0].copy()

    def objects(self, image_id: str) -> Objects:
        """Return the shapes in the order in which they were drawn, each with the box of all of it, hidden or not."""
        _, boxes, labels = self._draw(image_id)
        return Objects.of(boxes, labels)

    def _draw(self, image_id: str) -> tuple[NDArray[np.uint8], list[Box], list[int]]:
        """Two threads may both draw an image; it is the same image."""
        drawn = self._drawn.get(image_id)
        if drawn is None:
            from altopt.datasets.shape_drawing import draw

            name, _, number = image_id.rpartition("-")
            seed = f"altopt shapes {GENERATOR}: {self._seed} {name} {int(number)} {self._width} {self._height}"
            drawn = draw(seed, SHAPES, self._width, self._height)
            kept = len(self._drawn) + 1
            if kept <= KEPT_IMAGES and kept * drawn[0].nbytes <= KEPT_BYTES:
                self._drawn[image_id] = drawn
        return drawn

    def files(self) -> list[Path]:
        """Return no file."""
        return []

    def description(self) -> Json:
        """Return everything that the images depend on."""
        size = {"width": self._width, "height": self._height}
        return {"kind": "shapes", "generator": GENERATOR, "splits": list(self._splits), **size, "seed": self._seed}

    def look(self) -> Look:
        """Return the numbers that are known without drawing: nobody has counted the objects."""
        sizes = dict.fromkeys(self.ids, (self._width, self._height))
        return Look(self.name, images=len(self.ids), size_of=sizes, classes=None)

    def check(self) -> list[str]:
        """Return no warning: what is drawn is valid."""
        return []
