"""How each method looks at the regions of an image: pooled from the map of the whole image, or warped one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from altopt.batches.samples import Sample, make_batch, read_sample
from altopt.config import NetworkConfig
from altopt.extents import original_frame, scale_of
from altopt.ops.pyramid import pool_at_nearest_scale
from altopt.ops.warped_crops import warp
from cache.features import FeatureMapFile, MapKey
from stages.shared.regions import Pool, RegionNetwork

Maps = list[Tensor]


class WarpedRegions:
    """Slow R-CNN: each region is cut out of the original image and goes through the conv layers by itself."""

    def __init__(self, network: RegionNetwork) -> None:
        self.network = network
        self.side: int = network.description["crop_side"]

    def read(self, id: str) -> Sample:
        """Return the image in its original frame."""
        dataset = self.network.dataset
        return read_sample(dataset, id, original_frame(self.network.config.network, dataset.size(id)))

    def open(self, prepared: Sample) -> Pool:
        """Return what crops boxes out of the image, warps them, and runs the conv layers on each."""
        image = make_batch([prepared], self.network.device).images[0]  # (3, H, W)
        return lambda boxes: self.network.classifier.pool_crops(warp(image, boxes, self.side))


class PyramidRegions:
    """SPP-net: each region pools a pyramid from the map whose scale suits it best. Where maps come from, heirs say.

    Fast R-CNN's RoI pooling is such a pyramid, of one level.
    """

    def __init__(self, network: RegionNetwork, frames: Sequence[NetworkConfig], area: int) -> None:
        self.network, self.frames, self.area = network, frames, area

    def scales(self, id: str) -> list[float]:
        """Return input pixels for one original pixel, in each frame."""
        size = self.network.dataset.size(id)
        return [scale_of(size, frame.short_side, frame.max_side) for frame in self.frames]

    def pool(self, maps: Maps, scales: list[float]) -> Pool:
        """Return what pools boxes from a map ``Tensor[1, C, H, W]`` and a scale for each frame."""
        classifier, levels = self.network.classifier, self.network.levels
        return lambda boxes: pool_at_nearest_scale(
            boxes, scales, self.area, lambda scale, here: classifier.pool_pyramids(maps[scale], [here], levels))


class StoredPyramids(PyramidRegions):
    """Pyramids from stored maps."""

    def __init__(self, network: RegionNetwork, frames: Sequence[NetworkConfig], area: int,
                 stored: FeatureMapFile) -> None:
        super().__init__(network, frames, area)
        self.stored = stored

    def read(self, id: str) -> tuple[Maps, list[float]]:
        """Return the image's maps and their scales."""
        return [self.stored.get(MapKey(id, False, s)) for s in range(len(self.frames))], self.scales(id)

    def open(self, prepared: tuple[Maps, list[float]]) -> Pool:
        """Return what pools from the maps, once they are on the device."""
        maps, scales = prepared
        return self.pool([each.to(self.network.device).float()[None] for each in maps], scales)


class FreshPyramids(PyramidRegions):
    """Pyramids from maps that the conv layers make on the spot."""

    def read(self, id: str) -> tuple[list[Sample], list[float]]:
        """Return the image in every frame, and the scales."""
        return [read_sample(self.network.dataset, id, frame) for frame in self.frames], self.scales(id)

    def open(self, prepared: tuple[list[Sample], list[float]]) -> Pool:
        """Return what pools from what the conv layers make of the image in every frame."""
        samples, scales = prepared
        device, conv = self.network.device, self.network.classifier.conv
        with torch.inference_mode(), self.network.autocast():
            return self.pool([conv(make_batch([sample], device).images) for sample in samples], scales)
