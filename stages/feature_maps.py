"""Writing what conv layers make of every picture: for SPP-net's stage, and for the store of the stages that freeze."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from altopt.batches import Ahead
from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.extents import map_shape
from altopt.frozen import picture_map
from altopt.pictures import Sample, make_batch, read_sample
from cache.features import FeatureMapWriter, MapKey, Precision
from stages.step import Runtime

Shapes = Mapping[MapKey, tuple[int, int, int]]


def map_shapes(dataset: Dataset, frames: Sequence[NetworkConfig], flips: bool) -> Shapes:
    """Return (channels, height, width) of the map of every picture in every frame, with ``flips`` mirrored too."""
    shapes: dict[MapKey, tuple[int, int, int]] = {}
    for id in dataset.ids:
        of_frames = [map_shape(frame, dataset.size(id)) for frame in frames]
        for mirrored in (False, True) if flips else (False,):
            shapes |= {MapKey(id, mirrored, scale): shape for scale, shape in enumerate(of_frames)}
    return shapes


def write_maps(writer: FeatureMapWriter | None, shapes: Shapes, conv: nn.Sequential, dataset: Dataset,
               frames: Sequence[NetworkConfig], *, precision: Precision, device: torch.device,
               runtime: Runtime) -> int:
    """Write every map that the writer does not have yet, reading pictures ahead; return how many it had.

    ``conv`` is on the device. A map is computed in ``precision``, of one picture at a time. Several ranks divide the
    work; rank 0 has the writer.
    """
    def read(key: MapKey) -> Sample:
        return read_sample(dataset, key.image_id, frames[key.scale], flipped=key.mirrored)

    def work(own: Sequence[MapKey]) -> Iterator[Tensor]:
        with Ahead(read, own, runtime.readers) as ahead:
            for sample in ahead:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    features = picture_map(conv, make_batch([sample], device).images[0])
                yield features.to(getattr(torch, precision)).cpu()

    missing = runtime.ranks.same([key for key in shapes if not writer.done(key)] if writer is not None else None)
    found = len(shapes) - len(missing)
    with closing(runtime.ranks.spread(missing, work)) as made:
        for done, (features, key) in enumerate(zip(made, missing, strict=False), found + 1):
            assert writer is not None
            writer.write(key, features)
            runtime.report({"event": "pictures", "done": done, "total": len(shapes), "what": "maps"})
    return found
