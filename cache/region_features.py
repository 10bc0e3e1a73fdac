"""Features of regions on disk: what SVMs and box regressors are trained on.

    image_ids       [N]      UTF-8 text
    offsets         [N + 1]  int64: image n owns the regions offsets[n] .. offsets[n + 1]
    pooled_offsets  [N + 1]  int64: and, of them, these pooled regions
    boxes           [R, 4]   float32: continuous x1, y1, x2, y2 in pixels of the original image
    labels          [R]      int32: the class of a region that is an annotated object, -1 for a proposal
    overlaps        [R, K]   float32: the largest IoU with an object of each class
    features        [R, D]   float32 or float16: the last hidden layer, fc7
    pooled          [Q, E]   the same type: what fc6 sees, kept for the proposals that regressors train on
    pooled_labels   [Q]      int32: the class of the object that such a proposal overlaps most
    pooled_targets  [Q, 4]   float32: the box deltas that lead to that object
    written         [N]      uint8: cache/preallocated.py

Attributes, all text but the version: "format_version", "method" (rcnn, spp_net), "model", "proposals" and "dataset"
(digests), "network" and "classes" and "settings" (JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.preallocated import Column, KeyedWriter, PreallocatedFile

Floats = NDArray[np.floating[Any]]
SCHEMA: dict[str, Any] = {
    "image_ids": None, "offsets": np.int64, "pooled_offsets": np.int64, "boxes": np.float32, "labels": np.int32,
    "overlaps": np.float32, "pooled_labels": np.int32, "pooled_targets": np.float32,
}


class RegionCount(NamedTuple):
    """How many regions an image has, and how many of them are kept pooled."""

    regions: int
    pooled: int


@dataclass(frozen=True)
class RegionSizes:
    """The widths of a row: K classes, D features, E pooled features; and how the last two are stored."""

    classes: int
    features: int
    pooled: int
    stored: Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """Everything about the regions of one image; shapes and types as in the file."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int32]
    overlaps: NDArray[np.float32]
    features: Floats
    pooled: Floats
    pooled_labels: NDArray[np.int32]
    pooled_targets: NDArray[np.float32]


class RegionFeatureWriter(KeyedWriter[str]):
    """Writes the regions of images, whose numbers are known, in any order; the file appears when all are there.

    What an interrupted writer of the same content left is not written again. Raises ResourceError without room.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any], counts: Mapping[str, RegionCount],
                 sizes: RegionSizes) -> None:
        ends = np.cumsum(np.array([(0, 0), *counts.values()], np.int64), axis=0)
        self._offsets, self._pooled_offsets = np.ascontiguousarray(ends[:, 0]), np.ascontiguousarray(ends[:, 1])
        self._counts = dict(counts)
        regions, pooled = int(ends[-1, 0]), int(ends[-1, 1])
        columns = {
            "boxes": Column(np.float32, (regions, 4)), "labels": Column(np.int32, (regions,)),
            "overlaps": Column(np.float32, (regions, sizes.classes)),
            "features": Column(sizes.stored, (regions, sizes.features)),
            "pooled": Column(sizes.stored, (pooled, sizes.pooled)),
            "pooled_labels": Column(np.int32, (pooled,)), "pooled_targets": Column(np.float32, (pooled, 4)),
        }
        index: dict[str, Any] = {
            "image_ids": list(counts), "offsets": self._offsets, "pooled_offsets": self._pooled_offsets,
        }
        super().__init__(path, attributes, index, columns, counts)

    def write(self, image_id: str, regions: ImageRegions) -> None:
        """Write one image; ValueError when its regions are not as many as was said."""
        if (len(regions.boxes), len(regions.pooled)) != self._counts[image_id]:
            raise ValueError(f"{image_id}: {len(regions.boxes)} regions and {len(regions.pooled)} pooled ones, not "
                             f"{self._counts[image_id]}")
        unit = self._units[image_id]
        row, pooled = int(self._offsets[unit]), int(self._pooled_offsets[unit])
        values = {name: (row, getattr(regions, name)) for name in ("boxes", "labels", "overlaps", "features")}
        values |= {name: (pooled, getattr(regions, name)) for name in ("pooled", "pooled_labels", "pooled_targets")}
        self._file.write(unit, values)


class RegionFeatureFile:
    """Reads regions image by image, and pooled regions row by row; never more than is asked for."""

    def __init__(self, path: Path) -> None:
        self.file = PreallocatedFile(path, SCHEMA)
        self.attributes = self.file.attributes
        self.classes: list[str] = json.loads(self.attributes.get("classes", "[]"))
        self.network: dict[str, Any] = json.loads(self.attributes.get("network", "{}"))
        self.settings: dict[str, Any] = json.loads(self.attributes.get("settings", "{}"))
        self.image_ids = self.file.texts("image_ids")
        self._offsets = self.file.all("offsets")
        self._check()

    def __len__(self) -> int:
        return len(self.image_ids)

    def width(self, name: Literal["features", "pooled"]) -> int:
        """Return the length of a row of a data set: D or E."""
        return self.file.width(name)

    def rows(self, name: Literal["boxes", "labels", "overlaps", "features"], image: int) -> NDArray[Any]:
        """Return the rows that the image, counted from 0, has in a data set."""
        return self.file.rows(name, int(self._offsets[image]), int(self._offsets[image + 1]))

    def features(self, image: int) -> NDArray[np.float32]:
        """Return the image's features, float32 [R, D]."""
        return self.rows("features", image).astype(np.float32, copy=False)

    def objects(self, image: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the classes and the features, float32 [G, D], of the regions that are annotated objects."""
        labels = self.rows("labels", image)
        count = int((labels >= 0).sum())  # objects come first
        begin = int(self._offsets[image])
        return labels[:count], self.file.rows("features", begin, begin + count).astype(np.float32, copy=False)

    def pooled_labels(self) -> NDArray[np.int32]:
        """Return the class of every pooled region, int32 [Q]."""
        return self.file.all("pooled_labels")

    def pooled_targets(self, regions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the deltas of these pooled regions, float32 [., 4]."""
        return np.concatenate([np.empty((0, 4), np.float32)]
                              + [self.file.rows("pooled_targets", int(q), int(q) + 1) for q in regions])

    def pooled(self, regions: NDArray[np.int64], block: int = 512) -> Iterator[NDArray[np.float32]]:
        """Yield the pooled features of these pooled regions, float32 [up to ``block``, E] at a time."""
        for begin in range(0, len(regions), block):
            rows = [self.file.rows("pooled", int(q), int(q) + 1) for q in regions[begin : begin + block]]
            yield np.concatenate(rows).astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the file; the next reading opens it again."""
        self.file.close()

    def __enter__(self) -> RegionFeatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        for name, rows in (("offsets", "features"), ("pooled_offsets", "pooled")):
            offsets = self.file.all(name)
            if len(offsets) != len(self.image_ids) + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any() \
                    or offsets[-1] != self.file.length(rows):
                raise self.file.error(f"{name} does not rise from 0 to the rows of {rows}")
