"""Writing what conv layers make of every picture: for SPP-net's stage, and for the store of the stages that freeze."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from altopt.batches import Ahead
from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.extents import map_shape
from altopt.frozen import picture_map
from altopt.pictures import Sample, make_batch, read_sample
from cache.features import FeatureMapWriter, MapKey, Precision

Shapes = Mapping[MapKey, tuple[int, int, int]]


def map_shapes(dataset: Dataset, frames: Sequence[NetworkConfig], flips: bool) -> Shapes:
    """Return (channels, height, width) of the map of every picture in every frame, with ``flips`` mirrored too."""
    shapes: dict[MapKey, tuple[int, int, int]] = {}
    for id in dataset.ids:
        of_frames = [map_shape(frame, dataset.size(id)) for frame in frames]
        for mirrored in (False, True) if flips else (False,):
            shapes |= {MapKey(id, mirrored, scale): shape for scale, shape in enumerate(of_frames)}
    return shapes


def write_maps(writer: FeatureMapWriter, shapes: Shapes, conv: nn.Sequential, dataset: Dataset,
               frames: Sequence[NetworkConfig], *, precision: Precision, device: torch.device, workers: int,
               report: Callable[[dict[str, Any]], None]) -> int:
    """Write every map that the writer does not have yet, reading pictures ahead; return how many it had.

    ``conv`` is on the device. A map is computed in ``precision``, of one picture at a time.
    """
    def read(key: MapKey) -> Sample:
        return read_sample(dataset, key.image_id, frames[key.scale], flipped=key.mirrored)

    missing = [key for key in shapes if not writer.done(key)]
    found = len(shapes) - len(missing)
    with Ahead(read, missing, workers) as ahead:
        for done, (key, sample) in enumerate(zip(missing, ahead, strict=True), found + 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                features = picture_map(conv, make_batch([sample], device).images[0])
            writer.write(key, features.to(getattr(torch, precision)))
            report({"event": "pictures", "done": done, "total": len(shapes), "what": "maps"})
    return found
