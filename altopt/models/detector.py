"""Faster R-CNN put together: its four parts, how they are filled from tensors, and running them on images.

The parts are named as in every checkpoint: ``conv`` (shared layers), ``rpn``, ``fc`` (fc6, fc7) and ``head`` (class
scores and box deltas). A network may lack parts: an RPN of stage 1 has no head, a Fast R-CNN no rpn.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from altopt.batches.samples import Batch
from altopt.config import DetectionSettings, NetworkConfig, ProposalSettings
from altopt.models import backbones
from altopt.models.backbones import STRIDE
from altopt.models.fast_rcnn import FastRCNNHead, postprocess_detections
from altopt.models.network_parts import NetworkOfParts
from altopt.models.rpn import RPNHead, make_proposals
from altopt.ops.roi_sample import pool_rois

PARTS = ("conv", "rpn", "fc", "head")


class FasterRCNN(NetworkOfParts):
    """The whole network, on the meta device until ``fill`` gives it weights."""

    def __init__(self, network: NetworkConfig, classes: int) -> None:
        super().__init__()
        with torch.device("meta"):
            backbone = backbones.build(network.name)
            self.conv = backbone.conv
            self.rpn = RPNHead(backbone.channels, network)
            self.fc = backbone.fc
            self.head = FastRCNNHead(backbone.features, classes)
        self.roi_size = backbone.roi_size
        self.drawn: list[str] = []  # the parts that are not from a checkpoint
        self.samples_per_bin = 0  # the op that fc and head were trained with: 0 is RoI pooling

    def fill(self, tensors: Mapping[str, Tensor], random: torch.Generator, fresh: Sequence[str] = ()) -> list[str]:
        """Take each part's weights from the tensors, or draw them anew where they are missing or in ``fresh``.

        Returns the names of the parts re-initialised. ``conv`` is never drawn: a missing layer is a ``KeyError``.
        """
        drawn = []
        for name in PARTS:
            part: nn.Module = getattr(self, name)
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            if own and name not in fresh:
                part.load_state_dict(own, assign=True)
                part.requires_grad_(True)
            else:
                if name == "conv":
                    raise KeyError("conv")
                part.to_empty(device="cpu")
                initialise(part, random)
                drawn.append(name)
        self.drawn = drawn
        return drawn

    def use_box_statistics(self, means: Tensor, stds: Tensor) -> None:
        """Let ``bbox_pred`` speak in units of these statistics, ``Tensor[K + 1, 4]`` each.

        What it has learnt keeps its meaning; weights just drawn are small in the new units (py-faster-rcnn: 0.001).
        """
        if "head" in self.drawn:
            self.head.bbox_means.copy_(means)
            self.head.bbox_stds.copy_(stds)
        else:
            self.head.renormalise(means, stds)

    def pool(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Return ``Tensor[R, C, P, P]`` for the boxes of each image, by the op that the network was trained with."""
        return pool_rois(features, boxes, self.roi_size, 1 / STRIDE, self.samples_per_bin)


@torch.no_grad()
def initialise(part: nn.Module, random: torch.Generator) -> None:
    """Draw a part's weights anew: the heads as they say, other layers by He et al. with zero biases."""
    if isinstance(part, RPNHead | FastRCNNHead):
        part.initialise(random)
        if isinstance(part, FastRCNNHead):
            part.bbox_means.zero_()
            part.bbox_stds.fill_(1)
        return
    for layer in part.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.inference_mode()
def propose(network: FasterRCNN, batch: Batch, rule: ProposalSettings) -> list[tuple[Tensor, Tensor]]:
    """Return each image's proposals ``Tensor[K, 4]`` in the input frame, and scores ``Tensor[K]``, best first."""
    return propose_on(network, network.conv(batch.images), batch, rule)


@torch.inference_mode()
def propose_on(network: FasterRCNN, features: Tensor, batch: Batch,
               rule: ProposalSettings) -> list[tuple[Tensor, Tensor]]:
    """Do what ``propose`` does, on features already computed."""
    logits, deltas = network.rpn(features)
    anchors = network.rpn.anchors_for(features)
    return [make_proposals(logits[b], deltas[b], anchors, s, rule) for b, s in enumerate(batch.samples)]


@torch.inference_mode()
def detect_on(network: FasterRCNN, features: Tensor, batch: Batch, proposals: Sequence[Tensor],
              rule: DetectionSettings) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each image's boxes, scores and classes as ``postprocess_detections`` gives them, for ``proposals``.

    ``features`` is the network's own ``Tensor[B, C, H, W]``, ``proposals`` one ``Tensor[K, 4]`` for each image in the
    input frame.
    """
    pooled = network.pool(features, proposals)
    logits, normalised = network.head(network.fc(pooled.flatten(1)))
    deltas = network.head.deltas(normalised)
    counts = [len(each) for each in proposals]
    return [
        postprocess_detections(one_logits, one_deltas, rois, sample.size, rule)
        for one_logits, one_deltas, rois, sample
        in zip(torch.split(logits, counts), torch.split(deltas, counts), proposals, batch.samples, strict=True)
    ]


def own_proposals(rule: DetectionSettings) -> ProposalSettings:
    """Return how a detector makes its own proposals at test time."""
    return ProposalSettings(pre_nms=rule.pre_nms, nms=rule.rpn_nms, post_nms=rule.proposals, min_side=rule.min_side)
