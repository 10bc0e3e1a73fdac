"""The region proposal network: two modules, one that computes and one that scores, and what makes proposals of it.

Letters: B images, H and W of the feature map, A anchors at a position, N = H * W * A anchors in all.
Source: Faster R-CNN, section 3.1; numbers from py-faster-rcnn.
"""

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
from altopt.models.frozen import conv_features
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

    def initialise(self, random: torch.Generator) -> None:
        """Draw all weights anew: gaussian, standard deviation 0.01, biases 0 (Faster R-CNN, section 3.1.3)."""
        for layer in (self.conv, self.cls_score, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01, generator=random)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits ``Tensor[B, N, 2]`` and deltas ``Tensor[B, N, 4]``, in the anchors' order.

        As in py-faster-rcnn the first A score channels are background and the next A object.
        """
        hidden = F.relu(self.conv(features))
        logits = self.cls_score(hidden).unflatten(1, (2, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)  # (B, N, 2)
        deltas = self.bbox_pred(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, N, 4)
        return at_least_float(logits), at_least_float(deltas)

    def anchors_for(self, features: Tensor) -> Tensor:
        """Return all anchors of a feature map, ``Tensor[N, 4]`` in the input frame."""
        return all_anchors(self.network, features.shape[2], features.shape[3], features.device)

    def with_anchors(self, sample: Sample, rule: "AnchorSampling", *key: object) -> Sample:
        """Return the sample with the anchors to train on, drawn where it lies, before any network has seen it."""
        _, height, width = shape_behind(self.network.name, sample.size)
        anchors = all_anchors(self.network, height, width, sample.gt_boxes.device)
        return replace(sample, anchors=sample_anchors(sample, anchors, rule, *key))


@lru_cache(maxsize=64)
def all_anchors(network: NetworkConfig, height: int, width: int, device: torch.device) -> Tensor:
    """Return all anchors of a map of that size, ``Tensor[N, 4]`` in the input frame, which nobody may change.

    Those of the last sizes are kept: to make them on a GPU, it would have to wait for numbers from the processor.
    """
    with torch.inference_mode(False):
        reference = reference_anchors(network.anchor_base, network.anchor_ratios, network.anchor_scales)
        return shifted_anchors(reference.to(device), height, width, STRIDE)


@dataclass(frozen=True)
class AnchorSampling:
    """How anchors are labelled, sampled and scored."""

    positive: float
    negative: float
    anchors_per_image: int
    positive_fraction: float
    sigma: float
    box_weight: float


class RPNTraining(nn.Module):
    """Convolutional layers and RPN head, from a batch to the RPN's two losses."""

    def __init__(self, conv: nn.Sequential, rpn: RPNHead, rule: AnchorSampling, key: tuple[object, ...]) -> None:
        super().__init__()
        self.conv, self.rpn, self.rule, self.key = conv, rpn, rule, key

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Return ``rpn_cls``, softmax loss over the sampled anchors, and ``rpn_box``, smooth L1 over positive ones.

        Both are divided by the number of sampled anchors of an image, and averaged over the images.
        """
        losses = []
        for group, features in conv_features(self.conv, batch):
            for b, logits, deltas in zip(group, *self.rpn(features), strict=True):
                sample = batch.samples[b]
                chosen = sample.anchors or sample_anchors(sample, self.rpn.anchors_for(features), self.rule, *self.key,
                                                        iteration)
                losses.append(rpn_losses(logits, deltas, chosen, self.rule))
        return batch.parts(losses, len(batch.samples))

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the anchors to train on in an iteration; may be called from any thread."""
        return self.rpn.with_anchors(sample, self.rule, *self.key, iteration)


def sample_anchors(sample: Sample, anchors: Tensor, rule: AnchorSampling, *key: object) -> AnchorSample:
    """Return which of ``anchors``, ``Tensor[N, 4]``, an image trains on, as key and image decide."""
    labels, matched = label_anchors(anchors, sample.gt_boxes, sample.size, rule.positive, rule.negative)
    labels = subsample_labels(labels, rule.anchors_per_image, rule.positive_fraction,
                            generator(*key, sample.id, sample.flipped))
    used = torch.nonzero(labels >= 0)[:, 0]
    positive = torch.nonzero(labels == 1)[:, 0]
    deltas = bx.encode(sample.gt_boxes[matched[positive]], anchors[positive])
    return AnchorSample(used, labels[used], positive, deltas)


def rpn_losses(logits: Tensor, deltas: Tensor, chosen: AnchorSample, rule: AnchorSampling) -> dict[str, Tensor]:
    """Return the RPN's two losses of one image, ``Tensor[N, 2]`` logits and ``Tensor[N, 4]`` deltas."""
    count = max(len(chosen.used), 1)
    classification = F.cross_entropy(logits[chosen.used], chosen.labels, reduction="sum") / count
    box = smooth_l1(deltas[chosen.positive], chosen.deltas, rule.sigma) / count
    return {"rpn_cls": classification, "rpn_box": rule.box_weight * box}


def at_least_float(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, or in double if it is: losses and boxes need more than bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def smooth_l1(predicted: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Return the sum of Fast R-CNN's robust loss; quadratic where the difference is below 1 / sigma^2."""
    return F.smooth_l1_loss(predicted, target, beta=1 / sigma**2, reduction="sum")


def make_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample,
                 rule: ProposalSettings) -> tuple[Tensor, Tensor]:
    """Return an image's proposals, ``Tensor[K, 4]`` in the input frame, and scores ``Tensor[K]``, best first.

    ``logits`` is ``Tensor[N, 2]``, ``deltas`` ``Tensor[N, 4]``. Order of work as in py-faster-rcnn: decode, clip, drop
    small, sort, cut, suppress, cut. Border-crossing anchors take part. Boxes that do not stay finite are dropped.
    """
    boxes, scores = decode_proposals(logits, deltas, anchors, sample)
    kept = filter_proposals(boxes, scores, sample, rule)
    return boxes[kept], scores[kept]


def decode_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return what becomes of all anchors of an image: clipped boxes ``Tensor[N, 4]``, and scores ``Tensor[N]``."""
    return bx.clip(bx.decode(deltas, anchors), sample.size), logits.softmax(dim=1)[:, 1]


def filter_proposals(boxes: Tensor, scores: Tensor, sample: Sample, rule: ProposalSettings) -> Tensor:
    """Return which of an image's boxes, ``Tensor[N, 4]``, become proposals: int64 ``Tensor[K]``, best first."""
    usable = bx.large_enough(boxes, rule.min_side * sample.scale) & scores.isfinite()
    candidates = torch.nonzero(usable)[:, 0]
    order = scores[candidates].argsort(descending=True, stable=True)
    if rule.pre_nms:
        order = order[: rule.pre_nms]
    candidates = candidates[order]
    return candidates[nms_keeping_best(boxes[candidates], scores[candidates], rule.nms, rule.post_nms)]
