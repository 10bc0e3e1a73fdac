"""Fast R-CNN: the head on pooled regions, its training losses, and what makes detections of its output.

Letters: B images, R RoIs, K classes without background, P the RoI-pool grid.
Source: Fast R-CNN, section 2; numbers from py-faster-rcnn.
"""

from collections.abc import Iterator, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling
from altopt.config import DetectionSettings
from altopt.models.backbones import STRIDE
from altopt.models.dropout import seed_dropout
from altopt.models.frozen import conv_features
from altopt.models.rpn import at_least_float, smooth_l1
from altopt.ops import boxes as bx
from altopt.ops.roi_pool import roi_pool
from altopt.ops.targets import RoISample


class FastRCNNHead(nn.Module):
    """Class scores (background first) and, for every class, box deltas in units of that class's spread.

    ``bbox_means`` and ``bbox_stds``, ``Tensor[K + 1, 4]``, belong to the weights of ``bbox_pred`` and travel with them,
    so nobody can read one without the other (py-faster-rcnn folds them into its snapshots, but not into what it
    trains, and a warm start from such a file is wrong by a factor of five to ten).
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, classes + 1)
        self.bbox_pred = nn.Linear(features, 4 * (classes + 1))
        self.register_buffer("bbox_means", torch.zeros(classes + 1, 4))
        self.register_buffer("bbox_stds", torch.ones(classes + 1, 4))
        self.bbox_means: Tensor
        self.bbox_stds: Tensor

    def initialise(self, random: torch.Generator) -> None:
        """Draw the weights anew: standard deviation 0.01 for scores and 0.001 for boxes, biases 0."""
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std, generator=random)
            nn.init.zeros_(layer.bias)

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


class FastRCNNTraining(nn.Module):
    """Convolutional layers, fully connected layers and head, from a batch with proposals to the two losses."""

    def __init__(self, conv: nn.Sequential, fc: nn.Sequential, head: FastRCNNHead, *, roi_size: int, rois: RoISampling,
                 box_weight: float, key: tuple[object, ...], cls_weight: float = 1.0) -> None:
        super().__init__()
        self.conv, self.fc, self.head = conv, fc, head
        self.roi_size, self.rois = roi_size, rois
        self.cls_weight, self.box_weight, self.key = cls_weight, box_weight, key

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Return ``cls``, softmax loss over the sampled RoIs, and ``box``, smooth L1 of foreground RoIs.

        Both are divided by the number of RoIs of the batch, and multiplied by their weights.
        """
        chosen = self.rois.of_batch(batch, *self.key, iteration)
        losses = []
        for group, features in conv_features(self.conv, batch):
            rois = [chosen[b] for b in group]
            pooled = roi_pool(features, [each.rois for each in rois], self.roi_size, 1 / STRIDE)
            seed_dropout(self.fc, rois, [batch.samples[b] for b in group], *self.key, iteration)
            for found in fast_rcnn_losses(self.head, self.fc(pooled.flatten(1)), rois):
                losses.append({"cls": self.cls_weight * found["cls"], "box": self.box_weight * found["box"]})
        return batch.parts(losses, sum(len(each.labels) for each in chosen))

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the RoIs to train on in an iteration; may be called from any thread."""
        return self.rois.prepared(sample, *self.key, iteration)


def fast_rcnn_losses(head: FastRCNNHead, hidden: Tensor, chosen: Sequence[RoISample]) -> Iterator[dict[str, Tensor]]:
    """Yield ``roi_losses`` of each image, from fc7's output for the RoIs of all, ``Tensor[R, D]``."""
    counts = [len(each.labels) for each in chosen]
    outputs = (each.split(counts) for each in head(hidden))
    for rois, logits, normalised in zip(chosen, *outputs, strict=True):
        yield roi_losses(head, logits, normalised, rois)


def roi_losses(head: FastRCNNHead, logits: Tensor, normalised: Tensor, chosen: RoISample) -> dict[str, Tensor]:
    """Return the two losses of one image's RoIs, each summed over them.

    ``logits`` is ``Tensor[R, K + 1]``, ``normalised`` the deltas as the head has them, ``Tensor[R, K + 1, 4]``.
    """
    fg = chosen.foreground
    labels = chosen.labels[:fg]
    targets = (chosen.deltas[:fg] - head.bbox_means[labels]) / head.bbox_stds[labels]
    own = normalised[torch.arange(fg, device=labels.device), labels]
    return {"cls": F.cross_entropy(logits, chosen.labels, reduction="sum"), "box": smooth_l1(own, targets, sigma=1.0)}


def postprocess_detections(logits: Tensor, deltas: Tensor, rois: Tensor, size: tuple[int, int],
                  rule: DetectionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image's detections, best first: boxes ``Tensor[D, 4]``, scores ``Tensor[D]``, classes ``Tensor[D]``.

    ``logits`` is ``Tensor[R, K + 1]``, ``deltas`` ``Tensor[R, K + 1, 4]`` in plain units, ``rois`` ``Tensor[R, 4]`` and
    the result in the input frame, whose ``size`` is (width, height). Classes count from 0. Suppression is class by
    class; the cut to ``rule.per_image`` is over all classes.
    """
    scores = logits.softmax(dim=1)[:, 1:]  # (R, K)
    deltas = deltas[:, 1:] if rule.regress_boxes else torch.zeros_like(deltas[:, 1:])
    boxes = bx.clip(bx.decode(deltas, rois), size)  # (R, K, 4)
    roi, label = torch.nonzero(scores > rule.score, as_tuple=True)
    boxes, scores = boxes[roi, label], scores[roi, label]
    kept = torchvision.ops.batched_nms(boxes, scores, label, rule.nms)[: rule.per_image]
    return boxes[kept], scores[kept], label[kept]
