"""Features of regions on disk: what SVMs and box regressors are trained on.

A unit of the file (cache/preallocated.py) is an image, with R regions, objects first, and Q of them kept pooled:

    boxes           [R, 4]  float32: continuous x1, y1, x2, y2 in pixels of the original image
    labels          [R]     int32: the class of a region that is an annotated object, -1 for a proposal
    overlaps        [R, K]  float32: the largest IoU with an object of each class
    features        [R, D]  float32 or float16: the last hidden layer, fc7
    pooled          [Q, E]  the same type: what fc6 sees, kept for the proposals that regressors train on
    pooled_labels   [Q]     int32: the class of the object that such a proposal overlaps most
    pooled_targets  [Q, 4]  float32: the box deltas that lead to that object

The description holds "method" (rcnn, spp_net), "model", "proposals" and "dataset" (digests), "network", "classes" and
"settings". Readers leave the checksums alone: the hash in the artifact's record covers all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cache.preallocated import PreallocatedFile, PreallocatedWriter

Floats = NDArray[np.float32] | NDArray[np.float16]
KIND = "region features"


class RegionCount(NamedTuple):
    """How many regions an image has, and how many of them are kept pooled."""

    regions: int
    pooled: int


@dataclass(frozen=True)
class RegionSizes:
    """The widths of a row, and how features are stored."""

    classes: int  # K
    features: int  # D
    pooled: int  # E
    stored: Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """Everything about the regions of one image; shapes and types as in the file."""

    boxes: NDArray[np.float32]  # (R, 4)
    labels: NDArray[np.int32]  # (R,)
    overlaps: NDArray[np.float32]  # (R, K)
    features: Floats  # (R, D)
    pooled: Floats  # (Q, E)
    pooled_labels: NDArray[np.int32]  # (Q,)
    pooled_targets: NDArray[np.float32]  # (Q, 4)


class RegionFeatureWriter(PreallocatedWriter[str]):
    """Writes the regions of images, whose numbers are known, in any order; the file appears when all are there.

    Raises ResourceError without room.
    """
    # What an interrupted writer of the same content left is not written again.

    def __init__(self, path: Path, description: Mapping[str, object], counts: Mapping[str, RegionCount],
                 sizes: RegionSizes) -> None:
        super().__init__(path, KIND, description, {id: {  # in the order of the file
            "boxes": ("float32", (regions, 4)), "labels": ("int32", (regions,)),
            "overlaps": ("float32", (regions, sizes.classes)), "features": (sizes.stored, (regions, sizes.features)),
            "pooled": (sizes.stored, (pooled, sizes.pooled)), "pooled_labels": ("int32", (pooled,)),
            "pooled_targets": ("float32", (pooled, 4)),
        } for id, (regions, pooled) in counts.items()})

    def write(self, image_id: str, regions: ImageRegions) -> None:
        """Write one image; ValueError when its regions are not as many as was said."""
        self.put(image_id, vars(regions))


class RegionFeatureFile(PreallocatedFile):
    """Reads regions image by image, and pooled regions row by row; never more than is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        self.classes = cast(list[str], self.description.get("classes"))
        self.image_ids = tuple(self.units)
        # Regressors number the pooled regions of all images from 0 to Q - 1.
        self._pooled_ends = np.cumsum([len(self.units[id]["pooled"]) for id in self.image_ids], dtype=np.int64)  # (N,)

    def __len__(self) -> int:
        return len(self.image_ids)

    def width(self, name: Literal["features", "pooled"]) -> int:
        """Return the length of a row: D or E; 0 without images."""
        return next((arrays[name].shape[1] for arrays in self.units.values()), 0)

    def rows(self, name: Literal["boxes", "overlaps", "features"], image: int) -> NDArray[np.float32]:
        """Return the rows of the image, counted from 0, as float32 [R, ...]."""
        return self.units[self.image_ids[image]][name].astype(np.float32, copy=False)

    def labels(self, image: int) -> NDArray[np.int32]:
        """Return the classes of the image's regions, int32 [R]."""
        return cast(NDArray[np.int32], self.units[self.image_ids[image]]["labels"])

    def objects(self, image: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the classes and the features, float32 [G, D], of the regions that are annotated objects."""
        labels = self.labels(image)
        count = int((labels >= 0).sum())  # objects come first
        return labels[:count], self.units[self.image_ids[image]]["features"][:count].astype(np.float32, copy=False)

    def pooled_labels(self) -> NDArray[np.int32]:
        """Return the class of every pooled region, int32 [sum of Q]."""
        labels = [self.units[id]["pooled_labels"].astype(np.int32, copy=False) for id in self.image_ids]
        return np.concatenate([np.empty(0, np.int32), *labels])

    def pooled_targets(self, regions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the deltas of these pooled regions, float32 [., 4]."""
        return self._pooled_rows("pooled_targets", regions, 4)

    def pooled(self, regions: NDArray[np.int64], block: int = 512) -> Iterator[NDArray[np.float32]]:
        """Yield the pooled features of these pooled regions, float32 [up to ``block``, E] at a time."""
        for begin in range(0, len(regions), block):
            yield self._pooled_rows("pooled", regions[begin : begin + block], self.width("pooled"))

    def _pooled_rows(self, name: str, regions: Sequence[int] | NDArray[np.int64], width: int) -> NDArray[np.float32]:
        values = np.empty((len(regions), width), np.float32)
        for n, image in enumerate(np.searchsorted(self._pooled_ends, regions, side="right").tolist()):
            # Where the image's regions end, the number of the region falls short of it: so this index is negative.
            values[n] = self.units[self.image_ids[image]][name][int(regions[n]) - self._pooled_ends[image]]
        return values
