"""Feature maps on disk: what frozen conv layers make of every image, computed once and read many times.

    image_ids  [N]     UTF-8 text: one entry for each map, so an image may stand there several times
    mirrored   [N]     uint8: 1 for the mirror image
    scales     [N]     int32: which of the scales, counted from 0
    shapes     [N, 3]  int32: channels, height and width of the map
    offsets    [N + 1] int64: map n owns the values offsets[n] .. offsets[n + 1]
    values     [V]     float32, or uint16 that holds bfloat16, each map in the order channels, rows, columns
    written    [N]     uint8: cache/preallocated.py

Attributes, all text but the version: "format_version", "conv" and "dataset" (digests), "settings" (JSON: how images
were brought into the network's frame), "precision" (float32 or bfloat16). A map is stored in the precision that it was
computed in, so that training on stored maps and on fresh ones is the same training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cache.checkpoints import raw_bytes
from cache.preallocated import Column, KeyedWriter, PreallocatedFile

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["float32", "bfloat16"]
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
SCHEMA: dict[str, Any] = {
    "image_ids": None, "mirrored": np.uint8, "scales": np.int32, "shapes": np.int32, "offsets": np.int64,
}


class MapKey(NamedTuple):
    """Which map: of which image, mirrored or not, at which of the scales."""

    image_id: str
    mirrored: bool
    scale: int


class FeatureMapWriter(KeyedWriter[MapKey]):
    """Writes maps of known shapes in any order; the file appears when all are there and the ``with`` block ends well.

    ``shapes`` gives (channels, height, width) of every map. ``attributes``: "conv", "dataset", "settings". What an
    interrupted writer of the same content left is not written again. Raises ResourceError when there is no room.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any], shapes: Mapping[MapKey, Sequence[int]],
                 precision: Precision) -> None:
        extents = np.array(list(shapes.values()), np.int32).reshape(-1, 3)
        self._offsets = np.concatenate([[0], np.cumsum(extents.astype(np.int64).prod(axis=1))]).astype(np.int64)
        self._shapes = dict(shapes)
        self._precision = precision
        index: dict[str, Any] = {
            "image_ids": [key.image_id for key in shapes],
            "mirrored": np.array([key.mirrored for key in shapes], np.uint8),
            "scales": np.array([key.scale for key in shapes], np.int32),
            "shapes": extents, "offsets": self._offsets,
        }
        columns = {"values": Column(STORED[precision], (int(self._offsets[-1]),))}
        super().__init__(path, {**attributes, "precision": precision}, index, columns, shapes)

    def write(self, key: MapKey, features: Tensor) -> None:
        """Write a map, ``Tensor[C, H, W]`` in the precision of the file. May be called by several threads."""
        if str(features.dtype) != f"torch.{self._precision}" or tuple(features.shape) != tuple(self._shapes[key]):
            raise ValueError(f"{key}: {features.dtype} {tuple(features.shape)}, not {self._precision} "
                             f"{tuple(self._shapes[key])}")
        unit = self._units[key]
        values = raw_bytes(features).view(STORED[self._precision])
        self._file.write(unit, {"values": (int(self._offsets[unit]), values)})


class FeatureMapFile:
    """Reads maps by key, on demand; may be shared by threads. Raises ArtifactError as ``PreallocatedFile`` does."""

    def __init__(self, path: Path) -> None:
        self.file = PreallocatedFile(path, SCHEMA)
        self.attributes = self.file.attributes
        self.precision = self.attributes.get("precision", "")
        self.settings: dict[str, Any] = json.loads(self.attributes.get("settings", "{}"))
        self._shapes, self._offsets = self.file.all("shapes"), self.file.all("offsets")
        keys = zip(self.file.texts("image_ids"), self.file.all("mirrored").astype(bool).tolist(),
                   self.file.all("scales").tolist(), strict=True)
        self.keys = {MapKey(*key): unit for unit, key in enumerate(keys)}
        self._check()

    def get(self, key: MapKey) -> Tensor:
        """Return a map, ``Tensor[C, H, W]`` in the precision of the file; ArtifactError when it has none."""
        import torch

        if key not in self.keys:
            raise self.file.error(f"it has no map of {key}", "make it for this data set and these scales")
        unit = self.keys[key]
        values = torch.from_numpy(self.file.rows("values", int(self._offsets[unit]), int(self._offsets[unit + 1])))
        return values.view(getattr(torch, self.precision)).view(*self._shapes[unit].tolist())

    def close(self) -> None:
        """Close the file; the next reading opens it again."""
        self.file.close()

    def __enter__(self) -> FeatureMapFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        count = len(self._shapes)
        if len(self.keys) != count or len(self._offsets) != count + 1:
            raise self.file.error("its index names a map twice, or has a wrong length")
        sizes = self._shapes.astype(np.int64).prod(axis=1)
        if (np.diff(self._offsets) != sizes).any() or self._offsets[-1] != self.file.length("values"):
            raise self.file.error("its offsets do not fit the shapes of its maps")
        if self.precision not in STORED:
            raise self.file.error(f"its precision is {self.precision or 'not given'}")
