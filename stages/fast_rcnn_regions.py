"""Fast R-CNN on regions as SPP-net sees them: each pooled at the scale that suits it, scored by the head or by SVMs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altopt.fast_rcnn import FastRCNNHead, detections_of
from altopt.region_detections import region_detections
from cache.checkpoints import load_checkpoint
from stages.detect import DetectOnProposals
from stages.region_views import FreshPyramids
from stages.regions import FAST_RCNN, RegionNetwork, detect_regions, linear_layer
from stages.step import Runtime


class SoftmaxAndBoxes:
    """The head of a Fast R-CNN."""

    def __init__(self, network: RegionNetwork) -> None:
        self.rule = network.config
        with torch.device("meta"):
            self.head = FastRCNNHead(network.classifier.features, len(network.dataset.classes))
        tensors, _ = load_checkpoint(network.path)
        self.head.load_state_dict({name: tensors[f"head.{name}"] for name in self.head.state_dict()}, assign=True)
        self.head.to(network.device).eval()

    @torch.inference_mode()
    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``Tensor[R, K + 1]`` and deltas ``Tensor[R, K + 1, 4]``, background first."""
        logits, normalised = self.head(hidden)
        return logits, self.head.deltas(normalised)

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``detections_of`` makes of them."""
        return detections_of(scores, deltas, boxes, size, self.rule)


class SVMsAndBoxes(SoftmaxAndBoxes):
    """SVMs in place of the softmax, and the network's own box layer."""

    def __init__(self, svms: Path, network: RegionNetwork) -> None:
        super().__init__(network)
        self.weights, self.biases = linear_layer(svms, network)

    @torch.inference_mode()
    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``Tensor[R, K]`` and deltas ``Tensor[R, K, 4]``."""
        _, deltas = super().__call__(pooled, hidden)
        return torch.addmm(self.biases, hidden, self.weights.T), deltas[:, 1:]

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``region_detections`` makes of them."""
        return region_detections(scores, deltas, boxes, size, self.rule)


def detect_at_scales(detector: Path, proposals: Path, out: Path, config: DetectOnProposals,
                     runtime: Runtime) -> dict[str, Any]:
    """Write detections on the test split, each region pooled at one of several scales; return facts for the record."""
    network = RegionNetwork(detector, FAST_RCNN, config, runtime, "test")
    frames = config.network.at_scales(config.scales, config.max_side)
    return detect_regions(network, FreshPyramids(network, frames), SoftmaxAndBoxes(network), proposals, out)
