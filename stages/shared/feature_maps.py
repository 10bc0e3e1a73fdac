"""Writing what conv layers make of every image: for SPP-net's stage, and for the store of frozen layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from altopt.batches.reading import Prefetcher
from altopt.batches.samples import Sample, make_batch
from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.extents import map_shape
from altopt.models.trunk import image_maps
from cache.features import FeatureMapWriter, MapKey, Precision
from stages.shared.events import ImagesDone
from stages.shared.step import Runtime

Shapes = Mapping[MapKey, tuple[int, int, int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def map_shapes(dataset: Dataset, frames: Sequence[NetworkConfig], flips: bool) -> Shapes:
    """Return (channels, height, width) of the map of every image in every frame, with ``flips`` mirrored too."""
    shapes: dict[MapKey, tuple[int, int, int]] = {}
    for id in dataset.ids:
        of_frames = [map_shape(frame, dataset.size(id)) for frame in frames]
        for mirrored in (False, True) if flips else (False,):
            shapes |= {MapKey(id, mirrored, scale): shape for scale, shape in enumerate(of_frames)}
    return shapes


def computed_map(conv: nn.Sequential, sample: Sample, precision: Precision, device: torch.device) -> Tensor:
    """Return what the conv layers, which are on the device, make of one image: ``Tensor[C, h, w]`` on the CPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = image_maps(conv, make_batch([sample], device))[0]
    return features.to(DTYPES[precision]).cpu()


def write_maps(writer: FeatureMapWriter | None, shapes: Shapes, conv: nn.Sequential, read: Callable[[MapKey], Sample],
               *, precision: Precision, device: torch.device, runtime: Runtime) -> int:
    """Write every map that the writer does not have yet, reading samples ahead; return how many it had.

    ``conv`` is on the device. Several ranks divide the work; rank 0 has the writer.
    """
    def work(own: Sequence[MapKey]) -> Iterator[Tensor]:
        with Prefetcher(read, own, runtime.readers) as ahead:
            for sample in ahead:
                # One image at a time: convolutions of several sum in another order, which changes last bits.
                yield computed_map(conv, sample, precision, device)

    missing = runtime.ranks.broadcast([key for key in shapes if not writer.done(key)] if writer is not None else None)
    found = len(shapes) - len(missing)
    # Closed at once after an error, or readers would go on in the background while the file is given up.
    with closing(runtime.ranks.map_images(missing, work)) as made:
        for done, (features, key) in enumerate(zip(made, missing, strict=False), found + 1):
            assert writer is not None
            writer.write(key, features)
            runtime.report(ImagesDone(done, len(shapes), "maps"))
    return found
