"""Networks with random weights that find much and everywhere, for tests that run them in other programs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from altopt.batches.samples import Batch, Sample, make_batch, resized, to_original
from altopt.config import NETWORKS, DetectionSettings, NetworkConfig
from altopt.datasets.dataset import Objects
from altopt.evaluation.detections import Detections
from altopt.evaluation.voc import score_voc
from altopt.extents import scale_of
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN, detect_on, own_proposals, propose
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import FastRCNNHead
from altopt.models.network_parts import initialise
from altopt.models.resnet import FrozenBatchNorm, Res5
from altopt.models.trunk import image_maps

CLASSES = ("cat", "dog", "hen")
SIZES = ((128, 128), (171, 128), (128, 192))  # width, height: as the networks see them
SETTINGS = DetectionSettings(pre_nms=300, proposals=40, min_side=10.0)
SHORT = "resnet50, shortened"  # to a block or two of each size: it has every kind of layer, and is quick
LARGE = ("vgg16", "resnet50", "resnet101")
EACH_NETWORK = pytest.mark.parametrize("name", [
    *(pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NETWORKS), SHORT])



@dataclass(frozen=True, eq=False)
class Found:
    """What altopt makes of an image, step by step: features, RPN outputs, proposals, head outputs, detections."""

    batch: Batch
    features: Tensor
    rpn: tuple[Tensor, Tensor]
    proposals: Tensor
    pooled: Tensor
    head: tuple[Tensor, Tensor]
    detections: Detections


def config_of(name: Any) -> NetworkConfig:
    return NetworkConfig(name=name.removesuffix(", shortened"), short_side=128, max_side=192, anchor_scales=(2.0, 4.0),
                         rpn_channels=16)


def sizes_for(name: str) -> tuple[tuple[int, int], ...]:
    """All sizes, or one for ResNet, which takes its time."""
    return SIZES[:1] if name.startswith("resnet") else SIZES


def settings_of(name: str) -> DetectionSettings:
    """Few proposals for ResNet, whose last block sees each of them."""
    return replace(SETTINGS, proposals=12) if name.startswith("resnet") else SETTINGS


@cache
@torch.inference_mode(False)
def random_network(name: str) -> FasterRCNN:
    """A network whose scores and boxes vary with the image; fc6 and fc7 are small."""
    network = FasterRCNN(config_of(name), len(CLASSES))
    if name == SHORT:
        assert isinstance(network.fc, Res5)
        network.fc.layer4 = network.fc.layer4[:1]
        network.conv.conv3 = nn.Sequential(*(network.conv.get_submodule(f"conv3.{n}") for n in (0, 1)))
        network.conv.conv4 = nn.Sequential(*(network.conv.get_submodule(f"conv4.{n}") for n in (0, 6)))
    if isinstance(network.fc, FullyConnected):
        with torch.device("meta"):
            network.fc = FullyConnected(network.rpn.conv.in_channels * network.roi_size**2, 32)
            network.head = FastRCNNHead(32, len(CLASSES))
    random = generator("exported", name)
    network.conv.to_empty(device="cpu")
    for layer_name, layer in network.conv.named_modules():
        initialise(layer_name, layer, random)
    network.fill({f"conv.{key}": tensor for key, tensor in network.conv.state_dict().items()}, random)
    for layer in network.modules():
        if isinstance(layer, FrozenBatchNorm):
            for buffer, middle in ((layer.weight, 0.4), (layer.bias, 0.0), (layer.running_mean, 0.0),
                                   (layer.running_var, 1.0)):
                buffer.copy_(middle + 0.2 * torch.rand(buffer.shape, generator=random))
    network.eval()
    with torch.no_grad():
        network.head.bbox_stds.copy_(0.05 + 0.2 * torch.rand(4 * (len(CLASSES) + 1), generator=random).view(-1, 4))
        network.head.bbox_means.copy_(0.1 * torch.rand(4 * (len(CLASSES) + 1), generator=random).view(-1, 4))
        image = drawn(0, SIZES[0])
        features = image_maps(network.conv, batch_of(network, image))[0]
        spread(network.rpn.cls_score, network.rpn(features[None])[0], 2.0)
        spread(network.rpn.bbox_pred, network.rpn(features[None])[1], 0.2)
        found = found_by(network, image, settings_of(name))
        means, stds = found.head[0].mean(dim=0), found.head[0].std(dim=0)  # of each class, so that none is always best
        network.head.cls_score.bias.sub_(means).mul_(1.5 / stds)
        network.head.cls_score.weight.mul_(1.5 / stds[:, None])
        spread(network.head.bbox_pred, found.head[1], 1.0)
    return network


def spread(layer: nn.Conv2d | nn.Linear, outputs: Tensor, wanted: float) -> None:
    """Change a layer so that its outputs differ by so much, from place to place and from channel to channel."""
    layer.weight.mul_(wanted / outputs.std())
    layer.bias.uniform_(-wanted / 2, wanted / 2, generator=generator("bias"))


def drawn(number: int, size: tuple[int, int]) -> np.ndarray:
    """An image of random colours that change slowly, uint8 [H, W, 3]."""
    width, height = size
    coarse = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def batch_of(network: FasterRCNN, image: np.ndarray) -> Batch:
    height, width = image.shape[:2]
    config = network.rpn.network
    scale = scale_of((width, height), config.short_side, config.max_side)
    pixels = torch.from_numpy(np.ascontiguousarray(resized(image, scale).transpose(2, 0, 1)))
    sample = Sample("image", False, pixels, scale, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return make_batch([sample], torch.device("cpu"), pixels=network.pixels)


@torch.inference_mode()
def found_by(network: FasterRCNN, image: np.ndarray, settings: DetectionSettings = SETTINGS) -> Found:
    batch = batch_of(network, image)
    maps = image_maps(network.conv, batch)
    rpn = network.rpn.of_images(maps)[0]
    rois = [boxes for boxes, _ in propose(network, maps, batch, own_proposals(settings))]
    pooled = network.pool(maps, rois)
    logits, deltas = network.head(network.fc(pooled.flatten(1)))
    boxes, scores, labels = detect_on(network, maps, batch, rois, settings)[0]
    boxes = to_original(boxes, batch.samples[0], (image.shape[1], image.shape[0]))
    return Found(batch, maps[0], rpn, rois[0], pooled, (logits, network.head.deltas(deltas)),
                 Detections(boxes.numpy(), scores.numpy(), labels.numpy()))


def share_found(ours: Detections, theirs: Detections, pixels: float = 1e-3, score: float = 1e-4) -> float:
    """Which share of all is in both, one for one: class, box to so many pixels, and score."""
    left = list(range(len(theirs)))
    found = 0
    for box, own_score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
        same = next((k for k in left if theirs.labels[k] == label and abs(theirs.scores[k] - own_score) < score
                     and np.abs(theirs.boxes[k] - box).max() < pixels), None)
        if same is not None:
            left.remove(same)
            found += 1
    return found / max(len(ours), len(theirs), 1)


def mean_ap(found: Sequence[Detections], ours: Sequence[Detections]) -> float:
    """mAP where every third of our own detections, moved by up to 4 px, is an object, and the others are none."""
    random = np.random.default_rng(0)
    truth = {}
    for number, each in enumerate(ours):
        boxes = each.boxes[::3] + random.uniform(-4, 4, each.boxes[::3].shape)
        truth[str(number)] = Objects.of(boxes.tolist(), each.labels[::3].tolist())
    return score_voc(truth, {str(n): each for n, each in enumerate(found)}, CLASSES).map
