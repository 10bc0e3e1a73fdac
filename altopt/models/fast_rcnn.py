"""Fast R-CNN: the head on pooled regions, its training losses, and what makes detections of its output.

Letters: B images, R RoIs, K classes without background, P the RoI-pool grid.
Source: Fast R-CNN, section 2; numbers from py-faster-rcnn.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torchvision
from torch import Tensor, nn

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling, roi_samples
from altopt.config import DetectionSettings
from altopt.models.backbones import STRIDE
from altopt.models.dropout import FullyConnected
from altopt.models.losses import Loss, LossModule, at_least_float, box_loss, softmax_loss
from altopt.models.resnet import Res5
from altopt.models.trunk import Trunk
from altopt.ops import boxes as bx
from altopt.ops.roi_pool import roi_pool
from altopt.ops.targets import RoISample


class FastRCNNHead(nn.Module):
    """Class scores (background first) and, for every class, box deltas in units of that class's spread.

    ``bbox_means`` and ``bbox_stds``, ``Tensor[K + 1, 4]``, belong to the weights of ``bbox_pred`` and travel with them,
    so nobody can read one without the other (py-faster-rcnn folds them into its snapshots, but not into what it
    trains, and a warm start from such a file is wrong by a factor of five to ten).
    """

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden_size, num_classes + 1)
        self.bbox_pred = nn.Linear(hidden_size, 4 * (num_classes + 1))
        self.register_buffer("bbox_means", torch.zeros(num_classes + 1, 4))
        self.register_buffer("bbox_stds", torch.ones(num_classes + 1, 4))
        self.bbox_means: Tensor
        self.bbox_stds: Tensor

    def reset_parameters(self) -> None:
        """Give the buffers what suits layers with new random weights: plain units."""
        self.bbox_means.zero_()
        self.bbox_stds.fill_(1)

    @torch.no_grad()
    def renormalise(self, means: Tensor, stds: Tensor) -> None:
        """Change the units of ``bbox_pred`` to other statistics, keeping the boxes that it predicts."""
        old_means, old_stds = self.bbox_means.flatten(), self.bbox_stds.flatten()
        factor = old_stds / stds.flatten()
        self.bbox_pred.weight.mul_(factor[:, None])
        self.bbox_pred.bias.copy_(self.bbox_pred.bias * factor + (old_means - means.flatten()) / stds.flatten())
        self.bbox_means.copy_(means)
        self.bbox_stds.copy_(stds)

    @torch.no_grad()
    def leave_boxes(self) -> None:
        """Make every delta 0, so that boxes stay as they are, also after training with a box loss of weight 0."""
        for tensor in (self.bbox_pred.weight, self.bbox_pred.bias, self.bbox_means):
            tensor.zero_()
        self.bbox_stds.fill_(1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``Tensor[R, K + 1]`` and normalised deltas ``Tensor[R, K + 1, 4]``."""
        return at_least_float(self.cls_score(hidden)), at_least_float(self.bbox_pred(hidden).unflatten(1, (-1, 4)))

    def deltas(self, normalised: Tensor) -> Tensor:
        """Return the deltas in plain units; ``Tensor[R, K + 1, 4]``."""
        return normalised * self.bbox_stds + self.bbox_means


class FasterRCNNParts(Protocol):
    """A network with the parts of a Fast R-CNN, as ``FasterRCNN`` has them."""

    conv: nn.Sequential
    fc: FullyConnected | Res5
    head: FastRCNNHead
    roi_size: int


class FastRCNNTraining(LossModule):
    """Conv layers, fully connected layers and head, from a batch to the two losses (Fast R-CNN, section 2.3)."""

    def __init__(self, network: FasterRCNNParts, *, rois: RoISampling, cls_weight: float, box_weight: float,
                 seed: tuple[object, ...]) -> None:
        super().__init__()
        self.trunk, self.fc, self.head, self.roi_size = Trunk(network.conv), network.fc, network.head, network.roi_size
        self.rois, self.cls_weight, self.box_weight, self.seed = rois, cls_weight, box_weight, seed

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return ``cls`` and ``box`` of prepared samples."""
        rois = roi_samples(batch)
        maps = self.trunk(batch)  # of each image: (C, h, w)
        pooled = roi_pool(maps, [each.rois for each in rois], self.roi_size, 1 / STRIDE)  # (R, C, P, P)
        hidden = self.fc(pooled.flatten(1), rois)  # (R, D)
        logits, deltas = self.head(hidden)  # (R, K + 1), (R, K + 1, 4)
        return fast_rcnn_losses(self.head, logits, deltas, rois, (self.cls_weight, self.box_weight))

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the RoIs to train on in an iteration; may be called from any thread."""
        return self.rois.prepare(sample, *self.seed, iteration)


def fast_rcnn_losses(head: FastRCNNHead, logits: Tensor, deltas: Tensor, rois: Sequence[RoISample],
                     weights: tuple[float, float] = (1.0, 1.0)) -> dict[str, Loss]:
    """Return ``cls``, softmax loss over the RoIs, and ``box``, smooth L1 of foreground RoIs, times their weights.

    ``logits`` is ``Tensor[R, K + 1]``, ``deltas`` as the head has them, ``Tensor[R, K + 1, 4]``.
    """
    classification, box = softmax_loss(logits, rois), box_loss(deltas, rois, head.bbox_means, head.bbox_stds)
    return {"cls": Loss(weights[0] * classification.total, classification.count),
            "box": Loss(weights[1] * box.total, box.count)}


def postprocess_detections(logits: Tensor, deltas: Tensor, rois: Tensor, size: tuple[int, int],
                           settings: DetectionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image's detections, best first: boxes ``Tensor[D, 4]``, scores ``Tensor[D]``, classes ``Tensor[D]``.

    ``logits`` is ``Tensor[R, K + 1]``, ``deltas`` ``Tensor[R, K + 1, 4]`` in plain units, ``rois`` ``Tensor[R, 4]`` and
    the result in the input frame, whose ``size`` is (width, height). Classes count from 0. Suppression is class by
    class; the cut to ``settings.per_image`` is over all classes.
    """
    scores = logits.softmax(dim=1)[:, 1:]  # (R, K): background is no detection
    deltas = deltas[:, 1:] if settings.regress_boxes else torch.zeros_like(deltas[:, 1:])
    boxes = bx.clip(bx.decode(deltas, rois), size)  # (R, K, 4)
    roi, label = torch.nonzero(scores > settings.score, as_tuple=True)  # one RoI may be several classes
    boxes, scores = boxes[roi, label], scores[roi, label]
    kept = torchvision.ops.batched_nms(boxes, scores, label, settings.nms)[: settings.per_image]
    return boxes[kept], scores[kept], label[kept]
