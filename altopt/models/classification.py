"""Pre-training a small network on crops of objects, as the slides pre-train on ImageNet ("stage 0").

The convolutions learn with batch normalisation between them, which makes a network of nine layers train in a minute;
afterwards each normalisation is folded into its convolution, so the stages see plain layers.
"""

from collections import OrderedDict
from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from altopt.batches.samples import Batch, Sample
from altopt.datasets.dataset import Dataset
from altopt.machine.randomness import generator
from altopt.models.backbones import Backbone
from altopt.models.losses import Loss, LossModule


class CropClassifier(LossModule):
    """Convolutions, the mean over the crop, and a class score; background is class 0.

    Fully connected layers on the RoI grid would learn where things lie before what they are: on 16,000
    crops each, at the best of a few learning rates, they brought 0.55 right and the mean 0.87.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(OrderedDict(
            (name, with_batch_norm(block)) for name, block in backbone.conv.named_children()))
        self.score = nn.Linear(backbone.channels, num_classes + 1)

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return the softmax loss ``cls`` over the crops; each sample's one class is its crop's label."""
        features = self.conv(batch.images)  # (B, C, h, w)
        logits = self.score(features.mean(dim=(2, 3))).float()  # (B, K + 1)
        labels = torch.cat([sample.gt_labels for sample in batch.samples])
        return {"cls": Loss(F.cross_entropy(logits, labels, reduction="sum"), len(labels))}

    def tensors(self) -> dict[str, Tensor]:
        """Return plain convolutions under the names that checkpoints use, the normalisations folded in."""
        conv = nn.Sequential(OrderedDict((name, folded(block)) for name, block in self.conv.named_children()))
        return {f"conv.{name}": tensor.detach().to("cpu", memory_format=torch.contiguous_format)
                for name, tensor in conv.state_dict().items()}


def with_batch_norm(block: nn.Module) -> nn.Sequential:
    """Return the block's layers with a batch normalisation after every convolution."""
    layers: list[tuple[str, nn.Module]] = []
    for name, layer in block.named_children():
        layers.append((name, layer))
        if isinstance(layer, nn.Conv2d):
            layers.append((f"{name}_norm", nn.BatchNorm2d(layer.out_channels)))
    return nn.Sequential(OrderedDict(layers))


def folded(block: nn.Module) -> nn.Sequential:
    """Return plain layers that compute what the normalised ones compute in evaluation mode."""
    plain: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in deepcopy(block).eval().named_children():
        if isinstance(layer, nn.BatchNorm2d):
            name, convolution = plain.popitem()
            assert isinstance(convolution, nn.Conv2d)
            layer = fuse_conv_bn_eval(convolution, layer)
        plain[name] = layer
    return nn.Sequential(plain)


def draw_crop(dataset: Dataset, id: str, side: int, background: float, *key: object) -> Sample:
    """Return a square crop of ``side`` pixels around a random object of the image, mirrored half of the time.

    Its longer side fills between a third and all of the crop, off-centre. With probability ``background``, or when the
    image has no usable object, the crop is a random square that no object's centre lies in (label 0).
    """
    # All that may be drawn is drawn at once, so that a choice does not shift what the others get.
    draw = torch.rand(8, generator=generator(*key, id)).tolist()
    image, objects = dataset.image(id), dataset.objects(id).usable()
    height, width = image.shape[:2]
    label, square = 0, _background_square(objects.boxes, width, height, draw)
    if len(objects.boxes) and (square is None or draw[0] >= background):
        chosen = int(draw[1] * len(objects.boxes))
        square = _square_around(objects.boxes[chosen], draw)
        label = int(objects.labels[chosen]) + 1
    left, top, size = square if square is not None else (0.0, 0.0, float(min(width, height)))
    crop = Image.fromarray(image).resize(
        (side, side), Image.Resampling.BILINEAR, box=_within(left, top, size, width, height))
    pixels = np.asarray(crop)[:, ::-1] if draw[7] < 0.5 else np.asarray(crop)
    return Sample(id, False, torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), side / size,
                  torch.zeros(0, 4), torch.tensor([label]))


def _square_around(box: np.ndarray, draw: list[float]) -> tuple[float, float, float]:
    x1, y1, x2, y2 = (float(v) for v in box)
    longer = max(x2 - x1, y2 - y1)
    size = longer / (1 / 3 + 2 / 3 * draw[2])
    room = (size - longer) / 2 + 0.1 * longer
    return ((x1 + x2 - size) / 2 + (2 * draw[3] - 1) * room, (y1 + y2 - size) / 2 + (2 * draw[4] - 1) * room, size)


def _background_square(boxes: np.ndarray, width: int, height: int,
                       draw: list[float]) -> tuple[float, float, float] | None:
    size = min(width, height) * (0.15 + 0.45 * draw[5])
    left, top = draw[6] * (width - size), draw[2] * (height - size)
    if len(boxes) == 0:
        return left, top, size
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - (left, top)
    return None if bool(((centres >= 0) & (centres <= size)).all(axis=1).any()) else (left, top, size)


def _within(left: float, top: float, size: float, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the square moved, and if need be shrunk, to lie within the image."""
    size = min(size, width, height)
    left, top = min(max(left, 0), width - size), min(max(top, 0), height - size)
    return left, top, left + size, top + size
