"""The region proposal network: two modules, one that computes and one that scores, and what makes proposals of it.

Letters: B images, H and W of the feature map, A anchors at a position, N = H * W * A anchors in all.
Source: Faster R-CNN, section 3.1; numbers from py-faster-rcnn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import label_anchors, subsample_labels
from altopt.config import NetworkConfig, ProposalSettings
from altopt.extents import shape_behind
from altopt.machine.randomness import generator
from altopt.models.backbones import STRIDE
from altopt.models.losses import Loss, LossModule, at_least_float, rpn_losses
from altopt.models.trunk import Trunk, of_one_size
from altopt.ops import boxes as bx
from altopt.ops.anchors import reference_anchors, shifted_anchors
from altopt.ops.nms import nms_keeping_best
from altopt.ops.targets import AnchorSample


class RPNHead(nn.Module):
    """A 3 x 3 convolution and two sibling 1 x 1 convolutions: scores (background, object) and box deltas."""

    def __init__(self, channels: int, network: NetworkConfig) -> None:
        super().__init__()
        self.network = network
        count = len(network.anchor_ratios) * len(network.anchor_scales)
        self.conv = nn.Conv2d(channels, network.rpn_channels, 3, padding=1)
        self.cls_score = nn.Conv2d(network.rpn_channels, 2 * count, 1)
        self.bbox_pred = nn.Conv2d(network.rpn_channels, 4 * count, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits ``Tensor[B, N, 2]`` and deltas ``Tensor[B, N, 4]``, in the anchors' order.

        As in py-faster-rcnn the first A score channels are background and the next A object.
        """
        hidden = F.relu(self.conv(features))  # (B, rpn_channels, H, W)
        logits = self.cls_score(hidden).unflatten(1, (2, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)  # (B, N, 2)
        deltas = self.bbox_pred(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, N, 4)
        return at_least_float(logits), at_least_float(deltas)

    def of_images(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return logits ``Tensor[N, 2]`` and deltas ``Tensor[N, 4]`` of each image's map ``Tensor[C, h, w]``."""
        return [output for features in of_one_size(maps) for output in zip(*self(features), strict=True)]

    def anchors_on(self, features: Tensor) -> Tensor:
        """Return all anchors of a feature map ``Tensor[C, h, w]``: ``Tensor[N, 4]`` in the input frame."""
        return all_anchors(self.network, features.shape[-2], features.shape[-1], features.device)


@lru_cache(maxsize=64)
def all_anchors(network: NetworkConfig, height: int, width: int, device: torch.device) -> Tensor:
    """Return all anchors of a map of that size, ``Tensor[N, 4]`` in the input frame, which nobody may change.

    Those of the last sizes are kept: to make them on a GPU, it would have to wait for numbers from the processor.
    """
    with torch.inference_mode(False):  # they are kept, and training may be the next to ask for them
        reference = reference_anchors(network.anchor_base, network.anchor_ratios, network.anchor_scales)
        return shifted_anchors(reference.to(device), height, width, STRIDE)


@dataclass(frozen=True)
class AnchorSampling:
    """How anchors are labelled, by IoU, and sampled (Faster R-CNN, sections 3.1.2 and 3.1.3)."""

    positive: float
    negative: float
    per_image: int
    positive_fraction: float

    def prepare(self, sample: Sample, network: NetworkConfig, *seed: object) -> Sample:
        """Return the sample with the anchors to train on, as seed and image decide.

        They are drawn where the sample lies, before any network has seen it: the size of the map is known from the
        image's. May be called from any thread.
        """
        _, height, width = shape_behind(network.name, sample.size)
        anchors = all_anchors(network, height, width, sample.gt_boxes.device)
        return replace(sample, anchors=sample_anchors(sample, anchors, self, *seed))


class RPNTraining(LossModule):
    """Convolutional layers and RPN head, from a batch to the RPN's two losses (Faster R-CNN, section 3.1.2)."""

    def __init__(self, conv: nn.Sequential, rpn: RPNHead, *, anchors: AnchorSampling, sigma: float, box_weight: float,
                 seed: tuple[object, ...]) -> None:
        super().__init__()
        self.trunk, self.rpn = Trunk(conv), rpn
        self.anchors, self.sigma, self.box_weight, self.seed = anchors, sigma, box_weight, seed

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return ``rpn_cls`` and ``rpn_box`` of prepared samples."""
        maps = self.trunk(batch)  # of each image: (C, h, w)
        outputs = self.rpn.of_images(maps)  # of each image: (N, 2) and (N, 4)
        return rpn_losses(outputs, anchor_samples(batch), self.sigma, self.box_weight)

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the anchors to train on in an iteration; may be called from any thread."""
        return self.anchors.prepare(sample, self.rpn.network, *self.seed, iteration)


def anchor_samples(batch: Batch) -> list[AnchorSample]:
    """Return the anchors to train on of each image of a batch of prepared samples."""
    return [sample.anchors for sample in batch.samples if sample.anchors is not None]


def sample_anchors(sample: Sample, anchors: Tensor, sampling: AnchorSampling, *seed: object) -> AnchorSample:
    """Return which of ``anchors``, ``Tensor[N, 4]``, an image trains on, and the deltas to their objects."""
    labels, matched = label_anchors(anchors, sample.gt_boxes, sample.size, sampling.positive, sampling.negative)
    labels = subsample_labels(labels, sampling.per_image, sampling.positive_fraction,
                              generator(*seed, sample.id, sample.flipped))
    used = torch.nonzero(labels >= 0)[:, 0]  # (M,)
    positive = torch.nonzero(labels == 1)[:, 0]  # (F,)
    deltas = bx.encode(sample.gt_boxes[matched[positive]], anchors[positive])
    return AnchorSample(used, labels[used], positive, deltas)


def make_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample,
                 settings: ProposalSettings) -> tuple[Tensor, Tensor]:
    """Return an image's proposals, ``Tensor[K, 4]`` in the input frame, and scores ``Tensor[K]``, best first.

    ``logits`` is ``Tensor[N, 2]``, ``deltas`` ``Tensor[N, 4]``. Order of work as in py-faster-rcnn: decode, clip, drop
    small, sort, cut, suppress, cut. Border-crossing anchors take part. Boxes that do not stay finite are dropped.
    """
    boxes, scores = decode_proposals(logits, deltas, anchors, sample)
    kept = filter_proposals(boxes, scores, sample, settings)
    return boxes[kept], scores[kept]


def decode_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return what becomes of all anchors of an image: clipped boxes ``Tensor[N, 4]``, and scores ``Tensor[N]``."""
    return bx.clip(bx.decode(deltas, anchors), sample.size), logits.softmax(dim=1)[:, 1]


def filter_proposals(boxes: Tensor, scores: Tensor, sample: Sample, settings: ProposalSettings) -> Tensor:
    """Return which of an image's boxes, ``Tensor[N, 4]``, become proposals: int64 ``Tensor[K]``, best first."""
    # Sides are compared in pixels of the original image. A delta may overflow early in training: no box comes of it.
    usable = bx.large_enough(boxes, settings.min_side * sample.scale) & scores.isfinite()  # (N,)
    candidates = torch.nonzero(usable)[:, 0]
    order = scores[candidates].argsort(descending=True, stable=True)  # equal scores: the same order everywhere
    if settings.pre_nms:
        order = order[: settings.pre_nms]
    candidates = candidates[order]
    return candidates[nms_keeping_best(boxes[candidates], scores[candidates], settings.nms, settings.post_nms)]
