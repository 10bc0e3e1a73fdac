"""A trained network as torchvision has detectors: made of layers of torch alone, everything else folded into weights.

What is written for others to load is ``altopt/models/exported_detector.py``; a ``Detector`` of it is also what
``altopt.models.onnx_export`` makes its graph of, so both files say the same.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.squeezenet import Fire
from torchvision.ops import FrozenBatchNorm2d

from altopt.config import DetectionSettings, NetworkConfig
from altopt.errors import UsageError
from altopt.models.backbones import Divide
from altopt.models.detector import FasterRCNN
from altopt.models.dropout import FullyConnected
from altopt.models.exported_detector import Concat, Detector, Sum
from altopt.models.lite0 import Beside, InvertedResidual, PaddedConv2d
from altopt.models.resnet import DropFirst, Res5
from altopt.ops.anchors import reference_anchors

# What layers are made with, beside a bias.
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ZeroPad2d: ("padding",),
    nn.Flatten: (),
    nn.Identity: (),
    nn.ReLU: (),
    nn.ReLU6: (),
}


def as_torchvision(network: FasterRCNN, config: NetworkConfig, classes: Sequence[str],
                   settings: DetectionSettings) -> tuple[Detector, dict[str, Any]]:
    """Return the network as a ``Detector`` on the CPU, and the settings that it is made of, JSON-able.

    ``config`` is the frame that the network was trained in, ``settings`` its thresholds. Raises ``UsageError`` for a
    network whose RoIs are sampled and not pooled.
    """
    if network.samples_per_bin:
        raise UsageError("the network samples RoIs bilinearly (exact-joint), which neither format has an op for: "
                         "export one of another scheme")
    backbone, box_head, pixels = plain(network.conv), plain(network.fc), network.pixels
    described = {
        "classes": ["__background__", *classes],
        "order": [0, 1, 2] if pixels.order == "RGB" else [2, 1, 0],  # of channels
        "anchors": reference_anchors(config.anchor_base, config.anchor_ratios, config.anchor_scales).tolist(),
        "channels": network.rpn.conv.in_channels, "rpn_channels": config.rpn_channels,
        "roi_size": network.roi_size, "hidden_size": network.head.cls_score.in_features,
        "min_side": settings.min_side,
        "torchvision": {  # by its own names; of pixels in 0..1
            "min_size": config.short_side, "max_size": config.max_side,
            "image_mean": [mean * pixels.scale / 255 for mean in pixels.mean],
            "image_std": [std * pixels.scale / 255 for std in pixels.std],
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
    """Return the same layer made of those that ``plan`` can describe, with the same weights.

    Dropout is left out, and a frozen batch normalisation becomes part of the convolution before it.
    """
    match layer:
        case Beside():
            return Concat(OrderedDict(input=nn.Identity(), layers=_sequence(_children(layer))))
        case FullyConnected():
            return _sequence({"flatten": nn.Flatten(), **_children(layer)})
        case nn.Sequential():
            return _sequence(_children(layer))
        case PaddedConv2d() if any(layer.more):
            left, right, top, bottom = layer.more
            return _sequence({"pad": nn.ZeroPad2d((left, right, top, bottom)), "conv": _convolution(layer)})
        case nn.Conv2d():
            return _convolution(layer)
        case Fire():
            ones = _sequence({"conv": layer.expand1x1, "activation": layer.expand1x1_activation})
            threes = _sequence({"conv": layer.expand3x3, "activation": layer.expand3x3_activation})
            return _sequence({"squeeze": layer.squeeze, "activation": layer.squeeze_activation,
                              "expand": Concat(OrderedDict(expand1x1=ones, expand3x3=threes))})
        case InvertedResidual():
            made: dict[str, nn.Module] = {}
            for name, child in layer.named_children():
                made |= {name: plain(child)} | ({} if name == "project" else {f"{name}_activation": nn.ReLU6()})
            return _beside(_sequence(made), nn.Identity()) if layer.residual else _sequence(made)
        case Bottleneck():
            branch = _sequence({"conv1": _normalised(layer.conv1, layer.bn1), "relu1": nn.ReLU(),
                                "conv2": _normalised(layer.conv2, layer.bn2), "relu2": nn.ReLU(),
                                "conv3": _normalised(layer.conv3, layer.bn3)})
            shortcut = plain(layer.downsample) if layer.downsample else nn.Identity()
            return _sequence({"sum": _beside(branch, shortcut), "relu": nn.ReLU()})
        case Res5():
            return _sequence({"layer4": plain(layer.layer4), "mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
        case DropFirst():
            return nn.ZeroPad2d((-1, 0, -1, 0))
        case Divide() if layer.by == int(layer.by):
            return nn.AvgPool2d(1, divisor_override=int(layer.by))  # of one cell, divided by more than one
    if type(layer) not in ARGUMENTS:
        raise TypeError(f"a {type(layer).__name__} has no counterpart in an export: give it one here")
    return layer


def plan(layers: nn.Module) -> dict[str, Any]:
    """Return what ``exported_detector.layers`` makes the layers of again: {name: [class, arguments]}."""
    described = {}
    for name, layer in layers.named_children():
        arguments = plan(layer) if isinstance(layer, nn.Sequential) else _arguments(layer)
        described[name] = [type(layer).__name__, arguments]
    return described


def _arguments(layer: nn.Module) -> dict[str, Any]:
    arguments = {name: getattr(layer, name) for name in ARGUMENTS[type(layer)]}
    return arguments | ({"bias": layer.bias is not None} if isinstance(layer, nn.Conv2d | nn.Linear) else {})


def _children(layers: nn.Sequential) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    last = ""
    for name, child in layers.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            made[last] = _normalised(layers.get_submodule(last), child)
        elif not isinstance(child, nn.Dropout):
            made[name], last = plain(child), name
    return made


def _convolution(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution as torch's own class, with the same weights."""
    with torch.device("meta"):
        made = nn.Conv2d(bias=layer.bias is not None, **{name: getattr(layer, name) for name in ARGUMENTS[nn.Conv2d]})
    made.load_state_dict(layer.state_dict(), assign=True)
    return made


def _normalised(layer: nn.Module, norm: FrozenBatchNorm2d) -> nn.Conv2d:
    """Return a convolution without bias and the frozen normalisation behind it as one convolution."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * factor
    made = _convolution(layer)
    made.weight = nn.Parameter((layer.weight.double() * factor[:, None, None, None]).float())
    made.bias = nn.Parameter(bias.float())
    return made


def _sequence(layers: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _beside(branch: nn.Module, shortcut: nn.Module) -> Sum:
    return Sum(OrderedDict(branch=branch, shortcut=shortcut))


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
