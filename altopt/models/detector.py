"""Faster R-CNN put together: its four parts, and running them on images.

The parts are named as in every checkpoint: ``conv`` (shared layers), ``rpn``, ``fc`` (fc6, fc7) and ``head`` (class
scores and box deltas). A network may lack parts: an RPN of stage 1 has no head, a Fast R-CNN no rpn.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from altopt.batches.samples import Batch
from altopt.config import DetectionSettings, NetworkConfig, ProposalSettings
from altopt.models import backbones
from altopt.models.backbones import STRIDE
from altopt.models.fast_rcnn import FastRCNNHead, postprocess_detections
from altopt.models.network_parts import NetworkOfParts
from altopt.models.rpn import RPNHead, make_proposals
from altopt.ops.roi_sample import pool_rois


class FasterRCNN(NetworkOfParts):
    """The whole network: conv layers, RPN, fully connected layers and head."""

    def __init__(self, network: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        with torch.device("meta"):  # 500 MB of VGG-16 are not drawn only to be replaced
            backbone = backbones.build(network.name)
            self.conv = backbone.conv
            self.rpn = RPNHead(backbone.channels, network)
            self.fc = backbone.fc
            self.head = FastRCNNHead(backbone.hidden_size, num_classes)
        self.roi_size = backbone.roi_size
        self.new_head = False
        self.samples_per_bin = 0  # the op that fc and head were trained with: 0 is RoI pooling

    def fill(self, tensors: Mapping[str, Tensor], random: torch.Generator, fresh: Sequence[str] = ()) -> list[str]:
        """Take the weights from the tensors; return the *parts* that are re-initialised, in whole or in part."""
        layers = super().fill(tensors, random, fresh)
        parts = list(dict.fromkeys(layer.split(".")[0] for layer in layers))
        self.new_head = "head" in parts
        return parts

    def use_box_statistics(self, means: Tensor, stds: Tensor) -> None:
        """Let ``bbox_pred`` speak in units of these statistics, ``Tensor[K + 1, 4]`` each.

        What it has learnt keeps its meaning; new random weights are small in the new units (py-faster-rcnn: 0.001).
        """
        # Re-scaled, new weights would begin ten times too large or too small.
        if self.new_head:
            self.head.bbox_means.copy_(means)
            self.head.bbox_stds.copy_(stds)
        else:
            self.head.renormalise(means, stds)

    def pool(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return ``Tensor[R, C, P, P]`` for the boxes of each image, by the op that the network was trained with."""
        return pool_rois(maps, boxes, self.roi_size, 1 / STRIDE, self.samples_per_bin)


@torch.inference_mode()
def propose(network: FasterRCNN, maps: Sequence[Tensor], batch: Batch,
            settings: ProposalSettings) -> list[tuple[Tensor, Tensor]]:
    """Return each image's proposals ``Tensor[K, 4]`` in the input frame, and scores ``Tensor[K]``, best first.

    ``maps`` are what the network's conv layers make of the images, ``Tensor[C, h, w]`` each.
    """
    outputs = network.rpn.of_images(maps)
    return [make_proposals(logits, deltas, network.rpn.anchors_on(features), sample, settings)
            for (logits, deltas), features, sample in zip(outputs, maps, batch.samples, strict=True)]


@torch.inference_mode()
def detect_on(network: FasterRCNN, maps: Sequence[Tensor], batch: Batch, proposals: Sequence[Tensor],
              settings: DetectionSettings) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each image's boxes, scores and classes as ``postprocess_detections`` gives them, for ``proposals``.

    ``maps`` are the network's own, ``Tensor[C, h, w]`` for each image, ``proposals`` ``Tensor[K, 4]`` for each in the
    input frame.
    """
    pooled = network.pool(maps, proposals)  # (R, C, P, P)
    logits, normalised = network.head(network.fc(pooled.flatten(1)))  # (R, K + 1), (R, K + 1, 4)
    counts = [len(each) for each in proposals]
    scored = zip(torch.split(logits, counts), torch.split(network.head.deltas(normalised), counts), strict=True)
    return [postprocess_detections(*of_image, rois, sample.size, settings)
            for of_image, rois, sample in zip(scored, proposals, batch.samples, strict=True)]


def own_proposals(settings: DetectionSettings) -> ProposalSettings:
    """Return how a detector makes its own proposals at test time."""
    return ProposalSettings(pre_nms=settings.pre_nms, nms=settings.rpn_nms, post_nms=settings.proposals,
                            min_side=settings.min_side)
