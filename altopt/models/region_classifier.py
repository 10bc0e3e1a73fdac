"""The networks of SPP-net and slow R-CNN: conv layers, fully connected layers on regions, and a softmax over classes.

They differ in what the fully connected layers see: SPP-net pools a pyramid from the map of the whole image, R-CNN
runs the conv layers on each warped region by itself. Boxes are the regressors' business (altopt/training/ridge.py), and
after the fine-tuning SVMs take the softmax's place (altopt/training/svm.py).

Letters: R regions, K classes without background, D the hidden size, E features that fc6 sees.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling, roi_samples
from altopt.config import NetworkConfig
from altopt.errors import UsageError
from altopt.models import backbones
from altopt.models.backbones import STRIDE
from altopt.models.dropout import FullyConnected
from altopt.models.losses import Loss, LossModule, softmax_loss
from altopt.models.network_parts import NetworkOfParts
from altopt.models.resnet import Res5
from altopt.models.trunk import Trunk, own_images
from altopt.ops.pyramid import bins, pyramid_pool
from altopt.ops.roi_pool import roi_pool
from altopt.ops.warped_crops import warp


class RegionClassifier(NetworkOfParts):
    """``conv``, ``fc`` and ``head``.

    With ``levels`` fc6 takes the bins of that pyramid, and without the RoI grid of the network.
    """

    def __init__(self, network: NetworkConfig, num_classes: int, levels: Sequence[int] = ()) -> None:
        super().__init__()
        with torch.device("meta"):
            backbone = backbones.build(network.name)
            self.roi_size, self.hidden_size = backbone.roi_size, backbone.hidden_size
            self.pooled_size = backbone.channels * (bins(levels) if levels else backbone.roi_size**2)
            self.conv = backbone.conv
            if levels and isinstance(backbone.fc, Res5):
                raise UsageError(f"{network.name} has no fc6 that could take a pyramid: choose another network")
            self.fc = FullyConnected(self.pooled_size, self.hidden_size) if levels else backbone.fc
            self.head = nn.Sequential(OrderedDict([("cls_score", nn.Linear(self.hidden_size, num_classes + 1))]))

    def pool_pyramids(self, maps: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], levels: Sequence[int]) -> Tensor:
        """Return what fc6 sees of regions on whole images' maps, as ``pyramid_pool`` takes them: ``Tensor[R, E]``."""
        return pyramid_pool(maps, boxes, levels, 1 / STRIDE)

    def pool_crops(self, crops: Tensor) -> Tensor:
        """Return what fc6 sees of warped crops ``Tensor[R, 3, S, S]``, each whole map one RoI: ``Tensor[R, E]``."""
        whole = crops.new_tensor([[0, 0, crops.shape[3], crops.shape[2]]])
        return roi_pool(self.conv(crops), [whole] * len(crops), self.roi_size, 1 / STRIDE).flatten(1)


class RegionTraining(LossModule):
    """Fine-tuning by softmax on sampled regions; how they are pooled, heirs say."""

    def __init__(self, network: RegionClassifier, regions: RoISampling, seed: tuple[object, ...]) -> None:
        super().__init__()
        self.fc, self.head = network.fc, network.head
        self.regions, self.seed = regions, seed

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the regions to train on in an iteration; may be called from any thread."""
        return self.regions.prepare(sample, *self.seed, iteration)


class PyramidTraining(RegionTraining):
    """SPP-net's fine-tuning: fc6, fc7 and the softmax, on pyramids from the maps of whole images."""

    def __init__(self, network: RegionClassifier, levels: Sequence[int], regions: RoISampling,
                 seed: tuple[object, ...]) -> None:
        super().__init__(network, regions, seed)
        self.trunk, self.levels = Trunk(network.conv), tuple(levels)

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return ``cls``, the softmax loss over the sampled regions of prepared samples."""
        rois = roi_samples(batch)
        maps = self.trunk(batch)  # of each image: (C, h, w)
        pooled = pyramid_pool(maps, [each.rois for each in rois], self.levels, 1 / STRIDE)  # (R, E)
        return {"cls": softmax_loss(self.head(self.fc(pooled, rois)), rois)}


class WarpedTraining(RegionTraining):
    """Slow R-CNN's fine-tuning: the whole network on warped regions of images in their original frame."""

    def __init__(self, network: RegionClassifier, side: int, regions: RoISampling, seed: tuple[object, ...]) -> None:
        super().__init__(network, regions, seed)
        self.conv, self.pool_crops, self.side = network.conv, network.pool_crops, side

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return ``cls``, the softmax loss over the sampled regions of prepared samples."""
        rois = roi_samples(batch)
        images = own_images(batch)  # of each: (3, H, W)
        # One pass of all layers for all crops of the batch: (R, 3, S, S)
        crops = torch.cat([warp(image, each.rois, self.side) for image, each in zip(images, rois, strict=True)])
        pooled = self.pool_crops(crops)  # (R, E)
        return {"cls": softmax_loss(self.head(self.fc(pooled, rois)), rois)}
