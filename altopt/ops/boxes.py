"""Boxes: one frame, one code, and the conversions between them.

Coordinates are continuous everywhere in altopt: a box (x1, y1, x2, y2) covers the points between its edges, so its
width is x2 - x1. A VOC object xmin..xmax (1-based, inclusive pixels) covers [xmin - 1, xmax], which makes width and
IoU equal to the devkit's "+1" forms. The "+1" therefore exists in two places only: where files are read and written,
and in ``altopt.ops.roi_pool``, whose compiled op rounds to inclusive pixels.

Letters: N boxes, M other boxes, (dx, dy, dw, dh) the deltas of R-CNN, appendix C.
"""

import math

import torch
from torch import Tensor

# The largest growth that decoding allows in one step, so that exp() stays finite: 1000 px from a 16 px anchor.
MAX_LOG_SCALE = math.log(1000 / 16)


def area(boxes: Tensor) -> Tensor:
    """Return the area of each box: ``Tensor[N, 4]`` -> ``Tensor[N]``."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of every pair: ``Tensor[N, 4]``, ``Tensor[M, 4]`` -> ``Tensor[N, M]``.

    Two boxes without area have IoU 0, not NaN.
    """
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])  # (N, M, 2)
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])  # (N, M, 2)
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=2)  # (N, M)
    union = area(boxes)[:, None] + area(others)[None, :] - intersection
    return torch.where(intersection > 0, intersection / union, torch.zeros_like(union))


def to_cxcywh(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres and the sizes of the boxes, each ``Tensor[N, 2]`` in (x, y) order."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * sizes, sizes


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the deltas that turn each anchor into its box: two ``Tensor[N, 4]`` -> ``Tensor[N, 4]``.

    The inverse of ``decode``, exactly: py-faster-rcnn's pair loses a pixel at the right and lower edge.
    """
    centres, sizes = to_cxcywh(boxes)
    anchor_centres, anchor_sizes = to_cxcywh(anchors)
    return torch.cat([(centres - anchor_centres) / anchor_sizes, torch.log(sizes / anchor_sizes)], dim=1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes that the deltas make of the anchors, in the anchors' frame.

    ``deltas`` is ``Tensor[N, 4]`` or, with one set of deltas for each class, ``Tensor[N, K, 4]``; the result has its
    shape. Growth is limited to a factor of 62.5 at a time (Detectron's guard; the original has none and overflows).
    """
    centres, sizes = to_cxcywh(anchors)
    if deltas.dim() == 3:
        centres, sizes = centres[:, None], sizes[:, None]
    new_centres = centres + deltas[..., :2] * sizes
    new_sizes = sizes * torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE))
    return torch.cat([new_centres - 0.5 * new_sizes, new_centres + 0.5 * new_sizes], dim=-1)


def clip(boxes: Tensor, size: tuple[float, float]) -> Tensor:
    """Return the boxes cut off at the image's edges; ``boxes`` is ``Tensor[..., 4]``, ``size`` (width, height)."""
    width, height = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def flip(boxes: Tensor, width: float) -> Tensor:
    """Return the boxes of the image mirrored left to right; ``Tensor[N, 4]``, ``width`` in the boxes' frame."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def large_enough(boxes: Tensor, side: float) -> Tensor:
    """Return which boxes are at least ``side`` wide and high: ``Tensor[N, 4]`` -> ``BoolTensor[N]``."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(dim=1)


def inside(boxes: Tensor, size: tuple[float, float]) -> Tensor:
    """Return which boxes lie wholly within an image of ``size`` (width, height): -> ``BoolTensor[N]``."""
    width, height = size
    return (boxes[:, 0] >= 0) & (boxes[:, 1] >= 0) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
