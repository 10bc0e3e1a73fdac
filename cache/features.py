"""Feature maps on disk: what frozen conv layers make of every image, computed once and read many times.

A unit of the file (cache/preallocated.py) is a map, named IMAGE/upright/SCALE or IMAGE/mirrored/SCALE, the scales
counted from 0. Its one array, ``map``, is float32 or bfloat16 [height, width, channels]. The description holds "conv"
and "dataset" (digests), "settings" (how images came into the network's frame) and "precision".
"""
# In channels_last order, as layers read it, and in the precision that it was computed in: so training on stored maps
# and on fresh ones is the same.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from cache.checkpoints import raw_bytes
from cache.preallocated import PreallocatedFile, PreallocatedWriter

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["float32", "bfloat16"]
KIND = "feature maps"


class MapKey(NamedTuple):
    """Which map: of which image, mirrored or not, at which of the scales."""

    image_id: str
    mirrored: bool
    scale: int

    def __str__(self) -> str:
        return f"{self.image_id}/{'mirrored' if self.mirrored else 'upright'}/{self.scale}"


class FeatureMapWriter(PreallocatedWriter[MapKey]):
    """Writes maps of known shapes in any order; the file appears when all are there and the ``with`` block ends well.

    ``shapes`` gives (channels, height, width) of every map. ``description``: "conv", "dataset", "settings". What an
    interrupted writer of the same content left is not written again. Raises ResourceError when there is no room.
    """

    def __init__(self, path: Path, description: Mapping[str, object], shapes: Mapping[MapKey, tuple[int, int, int]],
                 precision: Precision) -> None:
        self._shapes, self._precision = shapes, precision
        super().__init__(path, KIND, {**description, "precision": precision}, {
            key: {"map": (precision, (height, width, channels))}
            for key, (channels, height, width) in shapes.items()})

    def write(self, key: MapKey, features: Tensor) -> None:
        """Write a map, ``Tensor[C, H, W]`` in the precision of the file; ValueError for another shape or precision."""
        if str(features.dtype) != f"torch.{self._precision}" or tuple(features.shape) != self._shapes[key]:
            raise ValueError(f"{key}: {features.dtype} {tuple(features.shape)}, not {self._precision} "
                             f"{self._shapes[key]}")
        channels, height, width = features.shape
        # Layers have left it channels_last: then this is no copy either.
        values = raw_bytes(features.permute(1, 2, 0)).view(np.uint16 if self._precision == "bfloat16" else np.float32)
        self.put(key, {"map": values.reshape(height, width, channels)})


class FeatureMapFile(PreallocatedFile):
    """Reads maps by key, on demand; may be shared by threads. Raises ArtifactError as ``PreallocatedFile`` does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        self.precision = str(self.description.get("precision"))
        self.settings = cast(dict[str, object], self.description.get("settings"))
        parts = (unit.rsplit("/", 2) for unit in self.units)
        self.keys = tuple(MapKey(image_id, side == "mirrored", int(scale)) for image_id, side, scale in parts)

    def get(self, key: MapKey) -> Tensor:
        """Return a map, ``Tensor[C, H, W]`` as it was computed; ArtifactError for one that is missing or damaged."""
        # In channels_last layout, and the file's own memory: not to be written to.
        import torch

        unit = str(key)
        if unit not in self.units:
            raise self.error(f"it has no map of {unit}", "make it for this data set and these scales")
        if not self.whole(unit):
            raise self.error(f"its map of {unit} is damaged")
        values = self.units[unit]["map"]  # (H, W, C)
        # As bytes, because NumPy has no bfloat16; and not by from_numpy, which warns of memory that is read-only.
        tensor = torch.from_dlpack(values.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return tensor.view(dtype).view(values.shape).permute(2, 0, 1)  # (C, H, W)
