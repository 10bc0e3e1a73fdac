"""The networks of SPP-net and slow R-CNN: conv layers, fully connected layers on regions, and a softmax over classes.

They differ in what the fully connected layers see: SPP-net pools a pyramid from the map of the whole image, R-CNN
runs the conv layers on each warped region by itself. Boxes are the regressors' business (altopt/training/ridge.py), and
after the fine-tuning SVMs take the softmax's place (altopt/training/svm.py).

Letters: R regions, K classes without background, D features of the last hidden layer, E features that fc6 sees.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling
from altopt.config import NetworkConfig
from altopt.models import backbones
from altopt.models.backbones import STRIDE
from altopt.models.dropout import seed_dropout
from altopt.models.network_parts import NetworkOfParts
from altopt.ops.pyramid import bins, pyramid_pool
from altopt.ops.roi_pool import roi_pool
from altopt.ops.targets import RoISample
from altopt.ops.warped_crops import warp


class RegionClassifier(NetworkOfParts):
    """``conv``, ``fc`` and ``head``, on the meta device until ``fill`` gives them weights.

    With ``levels`` fc6 takes the bins of that pyramid, and without the RoI grid of the network.
    """

    def __init__(self, network: NetworkConfig, classes: int, levels: Sequence[int] = ()) -> None:
        super().__init__()
        with torch.device("meta"):
            backbone = backbones.build(network.name)
            self.roi_size = backbone.roi_size
            self.features = backbone.features
            self.pooled_features = backbone.channels * (bins(levels) if levels else backbone.roi_size**2)
            self.conv = backbone.conv
            self.fc = backbones.fully_connected(self.pooled_features, backbone.features)
            self.head = nn.Sequential(OrderedDict([("cls_score", nn.Linear(backbone.features, classes + 1))]))

    def fill(self, tensors: Mapping[str, Tensor], random: torch.Generator, fresh: Sequence[str] = ()) -> list[str]:
        """Take each layer's weights from the tensors; return the layers that are re-initialised.

        Those are the layers of parts in ``fresh``, layers that are missing, and layers of another shape: fc6, when a
        pyramid takes the place of the RoI grid that it was trained on. A missing layer of ``conv`` is a ``KeyError``.
        """
        drawn = []
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            part = name.split(".")[0]
            held = tensors.get(f"{name}.weight")
            if part == "conv" or (held is not None and held.shape == layer.weight.shape and part not in fresh):
                own = {key: tensors[f"{name}.{key}"] for key in layer.state_dict()}
                layer.load_state_dict(own, assign=True)
                layer.requires_grad_(True)
            else:
                layer.to_empty(device="cpu")
                _draw(name, layer, random)
                drawn.append(name)
        return drawn

    def pool_pyramids(self, features: Tensor, boxes: Sequence[Tensor], levels: Sequence[int]) -> Tensor:
        """Return what fc6 sees of regions on whole images' maps ``Tensor[B, C, H, W]``: ``Tensor[R, E]``."""
        return pyramid_pool(features, boxes, levels, 1 / STRIDE)

    def pool_crops(self, crops: Tensor) -> Tensor:
        """Return what fc6 sees of warped crops ``Tensor[R, 3, S, S]``, each whole map one RoI: ``Tensor[R, E]``."""
        whole = crops.new_tensor([[0, 0, crops.shape[3], crops.shape[2]]])
        return roi_pool(self.conv(crops), [whole] * len(crops), self.roi_size, 1 / STRIDE).flatten(1)


class PyramidTraining(nn.Module):
    """SPP-net's fine-tuning: fc6, fc7 and the softmax on stored maps. The conv layers are not even there."""

    def __init__(self, network: RegionClassifier, levels: Sequence[int], regions: RoISampling,
                 key: tuple[object, ...]) -> None:
        super().__init__()
        self.fc, self.head, self.levels = network.fc, network.head, tuple(levels)
        self.regions, self.key = regions, key

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Return ``cls``, the mean softmax loss over the sampled regions."""
        assert batch.maps is not None
        chosen = self.regions.of_batch(batch, *self.key, iteration)
        losses = []
        for group in batch.groups():
            regions = [chosen[b] for b in group]
            features = torch.stack([batch.maps[b] for b in group]).float()
            pooled = pyramid_pool(features, [each.rois for each in regions], self.levels, 1 / STRIDE)
            seed_dropout(self.fc, regions, [batch.samples[b] for b in group], *self.key, iteration)
            losses.append(_softmax_loss(self.head(self.fc(pooled)), regions))
        return batch.parts(losses, sum(len(each.labels) for each in chosen))

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the regions to train on in an iteration; may be called from any thread."""
        return self.regions.prepared(sample, *self.key, iteration)


class WarpedTraining(nn.Module):
    """Slow R-CNN's fine-tuning: the whole network on warped regions of images in their original frame."""

    def __init__(self, network: RegionClassifier, side: int, regions: RoISampling, key: tuple[object, ...]) -> None:
        super().__init__()
        self.network, self.side, self.regions, self.key = network, side, regions, key

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Return ``cls``, the mean softmax loss over the sampled regions."""
        chosen = self.regions.of_batch(batch, *self.key, iteration)
        losses = []
        for group in batch.halves():
            regions, samples = [chosen[b] for b in group], [batch.samples[b] for b in group]
            crops = torch.cat([
                warp(batch.images[b, :, : sample.size[1], : sample.size[0]], each.rois, self.side)
                for b, sample, each in zip(group, samples, regions, strict=True)
            ])
            pooled = self.network.pool_crops(crops)
            seed_dropout(self.network.fc, regions, samples, *self.key, iteration)
            losses.append(_softmax_loss(self.network.head(self.network.fc(pooled)), regions))
        return batch.parts(losses, sum(len(each.labels) for each in chosen))

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the regions to train on in an iteration; may be called from any thread."""
        return self.regions.prepared(sample, *self.key, iteration)


def _softmax_loss(logits: Tensor, regions: Sequence[RoISample]) -> dict[str, Tensor]:
    labels = torch.cat([each.labels for each in regions])
    return {"cls": F.cross_entropy(logits.float(), labels, reduction="sum")}


@torch.no_grad()
def _draw(name: str, layer: nn.Conv2d | nn.Linear, random: torch.Generator) -> None:
    """Draw a layer: standard deviation 0.01 for class scores, He et al. for hidden layers; biases 0."""
    if name == "head.cls_score":
        nn.init.normal_(layer.weight, std=0.01, generator=random)
    else:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
