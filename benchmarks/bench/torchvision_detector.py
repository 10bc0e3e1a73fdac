"""torchvision's FasterRCNN with the layers and weights of a network of altopt: what speed is compared with.

It does the same work in torchvision's own manner: float images in 0..1 that it normalises, resizes and pads to a
multiple of 32 itself, RoIAlign in place of RoI pooling, sigmoid scores in the RPN, no dropout. Anchors, numbers of
proposals and of samples, thresholds and frozen layers are altopt's.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from altopt.batches.samples import Sample
from altopt.config import DetectionSettings, NetworkConfig, ProposalSettings
from altopt.models.detector import FasterRCNN


def torchvision_detector(network: FasterRCNN, config: NetworkConfig, training: ProposalSettings,
                         detection: DetectionSettings, rois_per_image: int) -> TorchvisionFasterRCNN:
    """Return torchvision's detector with a copy of the network's weights, frozen where those are.

    The network's RPN has as many channels as its conv layers, since torchvision knows no other number.
    """
    trunk = copy.deepcopy(network.conv)
    trunk.out_channels = network.rpn.conv.in_channels  # type: ignore[assignment]
    classes, features = network.head.cls_score.weight.shape
    anchors = AnchorGenerator((tuple(int(config.anchor_base * scale) for scale in config.anchor_scales),),
                              (config.anchor_ratios,))
    fc6 = network.fc.get_submodule("fc6")
    assert isinstance(fc6, nn.Linear)
    detector = TorchvisionFasterRCNN(
        trunk, min_size=config.short_side, max_size=config.max_side, rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=training.pre_nms, rpn_post_nms_top_n_train=training.post_nms,
        rpn_pre_nms_top_n_test=detection.pre_nms, rpn_post_nms_top_n_test=detection.proposals,
        rpn_nms_thresh=training.nms, box_roi_pool=MultiScaleRoIAlign(["0"], network.roi_size, sampling_ratio=2),
        box_head=TwoMLPHead(fc6.in_features, features), box_predictor=FastRCNNPredictor(features, classes),
        box_score_thresh=detection.score, box_nms_thresh=detection.nms,
        box_detections_per_img=detection.per_image, box_batch_size_per_image=rois_per_image,
    )
    _copy_heads(network, detector)
    return detector


@torch.no_grad()
def _copy_heads(network: FasterRCNN, detector: TorchvisionFasterRCNN) -> None:
    """Give the detector the weights above the trunk; one score for "object" is the difference of altopt's two."""
    rpn = detector.rpn.head
    _copy(network.rpn.conv, rpn.conv[0][0])
    _copy(network.rpn.bbox_pred, rpn.bbox_pred)
    for name in ("weight", "bias"):
        background, foreground = getattr(network.rpn.cls_score, name).chunk(2)
        getattr(rpn.cls_logits, name).copy_(foreground - background)
    heads = detector.roi_heads
    _copy(network.fc.get_submodule("fc6"), heads.box_head.fc6)
    _copy(network.fc.get_submodule("fc7"), heads.box_head.fc7)
    _copy(network.head.cls_score, heads.box_predictor.cls_score)
    _copy(network.head.bbox_pred, heads.box_predictor.bbox_pred)


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def torchvision_input(sample: Sample, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a sample as torchvision takes it: pixels in 0..1, ``Tensor[3, H, W]``, and boxes with labels from 1."""
    pixels = sample.pixels.to(device).float() / 255
    return pixels, {"boxes": sample.gt_boxes.to(device), "labels": sample.gt_labels.to(device) + 1}
