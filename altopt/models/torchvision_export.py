"""A trained network as torchvision has detectors: made of layers of torch alone, everything else folded into weights.

What is written for others to load is ``altopt/models/exported_detector.py``; a ``Detector`` of it is also what
``altopt.models.onnx_export`` makes its graph of, so both files say the same.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire
from torchvision.ops import FrozenBatchNorm2d

from altopt.batches.samples import PIXEL_MEAN, PIXEL_STD
from altopt.config import DetectionSettings, NetworkConfig
from altopt.errors import UsageError
from altopt.models.backbones import Divide
from altopt.models.detector import FasterRCNN
from altopt.models.exported_detector import Concat, Detector, Sum
from altopt.ops.anchors import reference_anchors

# What layers are made with; a bias is told by itself.
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "divisor_override"),
    nn.Flatten: ("start_dim",),
    nn.ReLU: (),
}


def as_torchvision(network: FasterRCNN, config: NetworkConfig, classes: Sequence[str],
                   settings: DetectionSettings) -> tuple[Detector, dict[str, Any]]:
    """Return the network as a ``Detector`` on the CPU, and the settings that it is made of, JSON-able.

    ``config`` is the frame that the network was trained in, ``settings`` its thresholds. Raises ``UsageError`` for a
    network whose RoIs are sampled and not pooled.
    """
    if network.samples_per_bin:
        raise UsageError("the network samples RoIs bilinearly (exact-joint), for which neither torchvision nor ONNX has "
                         "an op: export one of another scheme")
    backbone = plain(network.conv)
    box_head = nn.Sequential(OrderedDict([("flatten", nn.Flatten()), *plain(network.fc).named_children()]))
    described = {
        "classes": ["__background__", *classes],
        "order": [0, 1, 2],  # of the channels, from RGB
        "anchors": reference_anchors(config.anchor_base, config.anchor_ratios, config.anchor_scales).tolist(),
        "channels": network.rpn.conv.in_channels, "rpn_channels": config.rpn_channels,
        "roi_size": network.roi_size, "hidden_size": network.head.cls_score.in_features,
        "min_side": settings.min_side,
        "torchvision": {  # its own names
            "min_size": config.short_side, "max_size": config.max_side,
            "image_mean": PIXEL_MEAN, "image_std": PIXEL_STD,
            "rpn_pre_nms_top_n_test": settings.pre_nms, "rpn_post_nms_top_n_test": settings.proposals,
            "rpn_nms_thresh": settings.rpn_nms,
            "box_score_thresh": settings.score, "box_nms_thresh": settings.nms,
            "box_detections_per_img": settings.per_image, "bbox_reg_weights": [1.0, 1.0, 1.0, 1.0],
        },
        "backbone": plan(backbone), "box_head": plan(box_head),
    }
    detector = Detector(described)
    detector.load_state_dict({
        **_named("backbone", backbone), **_named("roi_heads.box_head", box_head), **_rpn_weights(network),
        **_predictor_weights(network, settings.regress_boxes)})
    return detector.eval(), described


def plain(layer: nn.Module) -> nn.Module:
    """Return the same layer made of those that ``plan`` can describe, with the same weights; dropout is left out."""
    match layer:
        case nn.Sequential():
            return nn.Sequential(OrderedDict((name, plain(child)) for name, child in layer.named_children()
                                             if not isinstance(child, nn.Dropout)))
        case Fire():
            return _sequence(
                squeeze=layer.squeeze, squeeze_activation=layer.squeeze_activation,
                expand=Concat(OrderedDict(
                    expand1x1=_sequence(conv=layer.expand1x1, activation=layer.expand1x1_activation),
                    expand3x3=_sequence(conv=layer.expand3x3, activation=layer.expand3x3_activation))))
        case Divide():
            return nn.AvgPool2d(1, divisor_override=round(layer.by))  # of one cell, divided by more than its one
    if type(layer) not in ARGUMENTS:
        raise TypeError(f"{type(layer).__name__} has no counterpart in an export: give it one here")
    return layer


def plan(layers: nn.Module) -> dict[str, Any]:
    """Return what ``exported_detector.layers`` makes the layers of again: {name: [class, arguments]}."""
    described = {}
    for name, layer in layers.named_children():
        arguments = (plan(layer) if isinstance(layer, nn.Sequential)
                     else {each: getattr(layer, each) for each in ARGUMENTS[type(layer)]})
        if isinstance(layer, nn.Conv2d | nn.Linear):
            arguments["bias"] = layer.bias is not None
        described[name] = [type(layer).__name__, arguments]
    return described


def _sequence(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _named(part: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}


def _rpn_weights(network: FasterRCNN) -> dict[str, Tensor]:
    """Return the RPN's weights, the two scores of an anchor as one: its sigmoid is their softmax."""
    scores = network.rpn.cls_score.state_dict()
    objectness = {name: torch.subtract(*reversed(tensor.chunk(2))) for name, tensor in scores.items()}
    layers = {"conv.0": network.rpn.conv.state_dict(), "cls_logits": objectness,
              "bbox_pred": network.rpn.bbox_pred.state_dict()}
    return {f"rpn.head.{layer}.{name}": tensor for layer, own in layers.items() for name, tensor in own.items()}


def _predictor_weights(network: FasterRCNN, regress_boxes: bool) -> dict[str, Tensor]:
    """Return the head's weights, its boxes in plain units; they stay where they are if they are not regressed."""
    head = network.head
    stds, means = head.bbox_stds.flatten() * regress_boxes, head.bbox_means.flatten() * regress_boxes  # (4 * (K + 1),)
    tensors = {"cls_score.weight": head.cls_score.weight, "cls_score.bias": head.cls_score.bias,
               "bbox_pred.weight": head.bbox_pred.weight * stds[:, None],
               "bbox_pred.bias": head.bbox_pred.bias * stds + means}
    return {f"roi_heads.box_predictor.{name}": tensor.detach() for name, tensor in tensors.items()}
