"""A trained network as one ONNX graph, from the pixels of an image to its detections; ONNX Runtime runs it.

The graph is built by hand, since torch's exporter cannot follow a detector: layers one by one, then what
``altopt.models.rpn`` and ``altopt.models.fast_rcnn`` do with their outputs, joined by ONNX's own TopK,
NonMaxSuppression and MaxRoiPool, which rounds as ``altopt.ops.roi_pool`` does.

Letters: C channels, h and w of the feature map, A anchors at a position, N = h * w * A anchors in all, R proposals,
K classes without background, M boxes that suppression keeps, D detections.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from altopt.models.backbones import STRIDE
from altopt.models.exported_detector import Concat, Detector, Sum
from altopt.ops.boxes import MAX_LOG_SCALE

OPSET = 18  # the first whose Resize smooths where it shrinks
IR_VERSION = 8  # of the same time
Value = str | NDArray[Any] | np.generic  # what a node takes: the name of another's output, or a constant
TO_THE_END = 2**31
DESCRIPTION = """A Faster R-CNN that altopt trained. Input: image, uint8 [H, W, 3], RGB, of any size; the graph \
resizes and normalises it. Outputs, best first: boxes, float32 [D, 4], continuous x1, y1, x2, y2 in pixels of the \
image; scores, float32 [D]; labels, int64 [D], places in the list that the metadata has under "classes"."""


class Graph:
    """Nodes and constants, in the order in which they were added, which is the one they run in."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: Value, out: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name."""
        return self.add_several(op, *inputs, out=[out or f"{op}_{len(self.nodes)}"], **attributes)[0]

    def add_several(self, op: str, *inputs: Value, out: list[str], **attributes: Any) -> list[str]:
        """Add a node with these outputs and return their names."""
        taken = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(op, taken, out, **attributes))
        return out

    def constant(self, values: NDArray[Any] | np.generic, name: str = "") -> str:
        """Add a constant and return its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(values), name or f"constant_{len(self.constants)}"))
        return self.constants[-1].name


def onnx_model(detector: Detector, settings: Mapping[str, Any], *, notes: Mapping[str, str]) -> onnx.ModelProto:
    """Return the graph of a detector that ``as_torchvision`` made; its inputs and outputs are in ``DESCRIPTION``.

    ``settings`` are those that the detector was made of; they and ``notes`` become the model's metadata.
    """
    graph, thresholds = Graph(), settings["torchvision"]
    pixels, scale, size, original = resized(graph, thresholds["min_size"], thresholds["max_size"])
    features = add_layers(graph, detector.backbone, normalised(graph, pixels, settings), "backbone")
    features = graph.add("Identity", features, out="features")  # (1, C, h, w)
    min_side = graph.add("Mul", scale, np.float32(settings["min_side"]))
    rois = add_rpn(graph, detector.rpn.head, features, settings, size, min_side)  # (R, 4)
    inclusive = graph.add("Sub", rois, np.array([0, 0, 1, 1], np.float32))  # as altopt.ops.roi_pool says
    indexed = graph.add("Pad", inclusive, np.array([0, 1, 0, 0]))  # (R, 5), behind the image's number
    pooled = graph.add("MaxRoiPool", features, indexed, out="pooled", pooled_shape=[settings["roi_size"]] * 2,
                       spatial_scale=1 / STRIDE)  # (R, C, P, P)
    hidden = add_layers(graph, detector.roi_heads.box_head, pooled, "box_head")
    logits, deltas = (graph.add("Identity", add_layers(graph, layer, hidden, name), out=name)
                      for name, layer in detector.roi_heads.box_predictor.named_children())
    boxes = add_detections(graph, logits, deltas, rois, size, settings)  # (D, 4)
    graph.add("Min", graph.add("Div", boxes, scale), original, out="boxes")
    return _model(graph, {"classes": json.dumps(settings["classes"][1:]), "settings": json.dumps(settings), **notes})


def resized(graph: Graph, short_side: int, max_side: int) -> tuple[str, str, str, str]:
    """Add the way to the input frame, as ``altopt.extents`` and ``altopt.batches.samples.resized`` go it.

    Return the pixels uint8 (1, 3, height, width); the scale; and, each as width, height, width, height, the size in the
    input frame and that of the image.
    """
    shape = _slice(graph, graph.add("Shape", "image"), 0, 0, 2)
    sides = graph.add("Cast", shape, to=TensorProto.DOUBLE)  # height, width
    scale = graph.add("Min", graph.add("Div", np.float64(short_side), graph.add("ReduceMin", sides)),
                      graph.add("Div", np.float64(max_side), graph.add("ReduceMax", sides)))
    rounded = graph.add("Max", graph.add("Round", graph.add("Mul", sides, scale)), np.float64(1))
    target = graph.add("Cast", rounded, to=TensorProto.INT64)
    planes = graph.add("Unsqueeze", graph.add("Transpose", "image", perm=[2, 0, 1]), np.array([0]))
    # Without "exclude_outside" what is beyond the edge would count as black, which it does not with Pillow.
    pixels = graph.add("Resize", planes, "", "", graph.add("Concat", np.array([1, 3]), target, axis=0), mode="linear",
                       antialias=1, exclude_outside=1)
    size, original = (graph.add("Gather", graph.add("Cast", each, to=TensorProto.FLOAT), np.array([1, 0, 1, 0]))
                      for each in (target, shape))
    return pixels, graph.add("Cast", scale, to=TensorProto.FLOAT), size, original


def normalised(graph: Graph, pixels: str, settings: Mapping[str, Any]) -> str:
    """Add what the weights expect of pixels: their order of channels, mean and deviation."""
    mean, std = (np.array(settings["torchvision"][name], np.float32)[:, None, None]
                 for name in ("image_mean", "image_std"))
    ordered = graph.add("Gather", pixels, np.array(settings["order"]), axis=1)
    shares = graph.add("Div", graph.add("Cast", ordered, to=TensorProto.FLOAT), np.float32(255))
    return graph.add("Div", graph.add("Sub", shares, mean), std)


def add_layers(graph: Graph, layer: nn.Module, value: str, name: str) -> str:
    """Add a layer of those that ``altopt.models.torchvision_export.plan`` describes; return its output."""
    if isinstance(layer, Sum | Concat):
        outputs = [add_layers(graph, child, value, f"{name}.{each}") for each, child in layer.named_children()]
        return graph.add("Sum", *outputs) if isinstance(layer, Sum) else graph.add("Concat", *outputs, axis=1)
    if isinstance(layer, nn.Sequential):
        for each, child in layer.named_children():
            value = add_layers(graph, child, value, f"{name}.{each}")
        return value
    tensors = [graph.constant(tensor.numpy(), f"{name}.{key}") for key, tensor in layer.state_dict().items()]
    match layer:
        case nn.Conv2d():
            return graph.add("Conv", value, *tensors, strides=layer.stride, dilations=layer.dilation,
                             pads=[*layer.padding, *layer.padding], group=layer.groups)
        case nn.Linear():
            return graph.add("Gemm", value, *tensors, transB=1)
        case nn.MaxPool2d():
            return graph.add("MaxPool", value, kernel_shape=_pair(layer.kernel_size), strides=_pair(layer.stride),
                             pads=_pair(layer.padding) * 2, ceil_mode=int(layer.ceil_mode))
        case nn.AvgPool2d():  # of one cell: a division
            return graph.add("Div", value, np.float32(layer.divisor_override))
        case nn.AdaptiveAvgPool2d():  # to one cell
            return graph.add("GlobalAveragePool", value)
        case nn.ZeroPad2d():
            left, right, top, bottom = layer.padding
            return graph.add("Pad", value, np.array([0, 0, top, left, 0, 0, bottom, right]))
        case nn.ReLU6():
            return graph.add("Clip", value, np.float32(0), np.float32(6))
        case nn.ReLU():
            return graph.add("Relu", value)
        case nn.Identity():
            return value
        case nn.Flatten():
            return graph.add("Flatten", value)
    raise TypeError(f"{name} is a {type(layer).__name__}, of which no node is made: give it one here")


def add_rpn(graph: Graph, head: nn.Module, features: str, settings: Mapping[str, Any], size: str,
            min_side: str) -> str:
    """Add the RPN and what ``altopt.models.rpn.make_proposals`` does; return the proposals (R, 4), best first."""
    thresholds, layers = settings["torchvision"], dict(head.named_children())
    hidden = add_layers(graph, layers["conv"], features, "rpn.conv")
    outputs = []  # in the anchors' order: row by row, column by column, anchor by anchor
    for name, shape in (("cls_logits", [-1]), ("bbox_pred", [-1, 4])):
        values = graph.add("Transpose", add_layers(graph, layers[name], hidden, f"rpn.{name}"), perm=[0, 2, 3, 1])
        outputs.append(graph.add("Reshape", values, np.array(shape), out=f"rpn_{name}"))
    logits, deltas = outputs  # (N,), (N, 4)
    boxes = clipped(graph, decoded(graph, deltas, anchors(graph, features, settings["anchors"])), size)
    sides = graph.add("Sub", _slice(graph, boxes, 1, 2), _slice(graph, boxes, 1, 0, 2))
    shorter = graph.add("ReduceMin", sides, np.array([1]), keepdims=0)
    # A score below all others takes the place of leaving a box out, so that no size depends on values.
    scores = graph.add("Where", graph.add("GreaterOrEqual", shorter, min_side), graph.add("Sigmoid", logits),
                       np.float32(-1))
    scores, best = _top(graph, scores, thresholds["rpn_pre_nms_top_n_test"], ["rpn_scores", "rpn_best"])
    boxes = graph.add("Gather", boxes, best)
    kept = graph.add("NonMaxSuppression", graph.add("Unsqueeze", boxes, np.array([0])),
                     graph.add("Unsqueeze", scores, np.array([0, 1])), *_limits(
                         thresholds["rpn_post_nms_top_n_test"], thresholds["rpn_nms_thresh"], -0.5))  # (R, 3)
    return graph.add("Gather", boxes, graph.add("Gather", kept, np.array(2), axis=1), out="proposals")


def anchors(graph: Graph, features: str, reference: Sequence[Sequence[float]]) -> str:
    """Add all anchors of the feature map, (N, 4), as ``altopt.ops.anchors.shifted_anchors`` orders them."""
    every: Value = np.array(reference, np.float32)  # (A, 4)
    for axis, coordinates in ((3, [1, 0, 1, 0]), (2, [0, 1, 0, 1])):  # w, which shifts x, and h, which shifts y
        count = graph.add("Squeeze", _slice(graph, graph.add("Shape", features), 0, axis, axis + 1))
        steps = graph.add("Cast", graph.add("Range", np.array(0), count, np.array(1)), to=TensorProto.FLOAT)
        column = graph.add("Reshape", steps, np.array([-1, 1, 1] if axis == 3 else [-1, 1, 1, 1]))
        every = graph.add("Add", graph.add("Mul", column, STRIDE * np.array(coordinates, np.float32)), every)
    return graph.add("Reshape", every, np.array([-1, 4]))  # of (h, w, A, 4)


def decoded(graph: Graph, deltas: str, boxes: str) -> str:
    """Add ``altopt.ops.boxes.decode``; both end in 4 and are broadcast."""
    shifts, growth = _halves(graph, deltas)
    top_left, bottom_right = _halves(graph, boxes)
    sizes = graph.add("Sub", bottom_right, top_left)
    centres = graph.add("Add", top_left, graph.add("Mul", sizes, np.float32(0.5)))
    centres = graph.add("Add", centres, graph.add("Mul", shifts, sizes))
    sizes = graph.add("Mul", sizes, graph.add("Exp", graph.add("Min", growth, np.float32(MAX_LOG_SCALE))))
    half = graph.add("Mul", sizes, np.float32(0.5))
    return graph.add("Concat", graph.add("Sub", centres, half), graph.add("Add", centres, half), axis=-1)


def clipped(graph: Graph, boxes: str, size: str) -> str:
    """Add ``altopt.ops.boxes.clip``; ``size`` is width, height, width, height."""
    return graph.add("Min", graph.add("Max", boxes, np.float32(0)), size)


def add_detections(graph: Graph, logits: str, deltas: str, rois: str, size: str,
                   settings: Mapping[str, Any]) -> str:
    """Add what ``altopt.models.fast_rcnn.postprocess_detections`` does; ``deltas`` are in plain units.

    The outputs ``scores`` and ``labels`` are then complete; return the boxes in the input frame.
    """
    thresholds = settings["torchvision"]
    scores = graph.add("Transpose", _slice(graph, graph.add("Softmax", logits, axis=1), 1, 1), perm=[1, 0])  # (K, R)
    of_classes = graph.add("Reshape", deltas, np.array([0, len(settings["classes"]), 4]))  # (R, K + 1, 4)
    boxes = decoded(graph, _slice(graph, of_classes, 1, 1), graph.add("Unsqueeze", rois, np.array([1])))  # (R, K, 4)
    # Each class is to the op an image of its own, with one class.
    boxes = graph.add("Transpose", clipped(graph, boxes, size), perm=[1, 0, 2])  # (K, R, 4)
    kept = graph.add("NonMaxSuppression", boxes, graph.add("Unsqueeze", scores, np.array([1])), *_limits(
        thresholds["box_detections_per_img"], thresholds["box_nms_thresh"], thresholds["box_score_thresh"]))  # (M, 3)
    places = graph.add("Gather", kept, np.array([0, 2]), axis=1)  # (M, 2): class and RoI
    _, best = _top(graph, graph.add("GatherND", scores, places), thresholds["box_detections_per_img"],
                   ["scores", "detections"])
    graph.add("Gather", graph.add("Gather", kept, np.array(0), axis=1), best, out="labels")
    return graph.add("Gather", graph.add("GatherND", boxes, places), best)


def _limits(count: int, overlap: float, score: float) -> list[Value]:
    """Return what NonMaxSuppression takes beside boxes and scores."""
    return [np.array([count]), np.array([overlap], np.float32), np.array([score], np.float32)]


def _top(graph: Graph, scores: str, count: int, out: list[str]) -> list[str]:
    """Add the choice of the ``count`` best scores, or of all if there are fewer or it is 0: sorted, and places."""
    there = graph.add("Shape", scores)
    return graph.add_several("TopK", scores, graph.add("Min", there, np.array([count])) if count else there, out=out)


def _halves(graph: Graph, values: str) -> list[str]:
    """Add the first two and the last two of four values in the last dimension."""
    return [_slice(graph, values, -1, 0, 2), _slice(graph, values, -1, 2)]


def _slice(graph: Graph, values: str, axis: int, start: int, end: int = TO_THE_END) -> str:
    return graph.add("Slice", values, np.array([start]), np.array([end]), np.array([axis]))


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _model(graph: Graph, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Return the checked model of a graph, with its inputs, its outputs and what it says of itself."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])
    outputs = [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["detections", 4]),
               helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["detections"]),
               helper.make_tensor_value_info("labels", TensorProto.INT64, ["detections"])]
    body = helper.make_graph(graph.nodes, "detector", [image], outputs, graph.constants)
    model = helper.make_model(body, producer_name="altopt", opset_imports=[helper.make_opsetid("", OPSET)],
                              ir_version=IR_VERSION, doc_string=DESCRIPTION)
    helper.set_model_props(model, dict(metadata))
    return model
