"""Anchors: the reference boxes of the region proposal network.

Letters: A anchors at a position (9 in the paper), H and W of the feature map.
Source: Faster R-CNN, section 3.1.1; the rounding follows py-faster-rcnn's ``generate_anchors``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_anchors(base: int, ratios: Sequence[float], scales: Sequence[float]) -> Tensor:
    """Return the anchors of the feature map's first position, ``Tensor[A, 4]``, ratio by ratio, then by scale.

    A square of ``base`` pixels, centred at base / 2, is reshaped to each ratio (height / width) at equal area, with
    both sides rounded to whole pixels, and then multiplied by each scale. With 16, (0.5, 1, 2) and (8, 16, 32) the
    first one is (-84, -40, 100, 56).
    """
    centre = base / 2
    anchors = []
    for ratio in ratios:
        width = round((base * base / ratio) ** 0.5)
        height = round(width * ratio)
        for scale in scales:
            half_width, half_height = 0.5 * width * scale, 0.5 * height * scale
            anchors.append((centre - half_width, centre - half_height, centre + half_width, centre + half_height))
    return torch.tensor(anchors)


def shifted_anchors(reference: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Return the anchors of a whole feature map, ``Tensor[H * W * A, 4]`` in pixels of the network's input.

    They are enumerated row by row, column by column, anchor by anchor, as ``altopt.models.rpn`` flattens its outputs.
    """
    y = torch.arange(height, device=reference.device, dtype=reference.dtype) * stride
    x = torch.arange(width, device=reference.device, dtype=reference.dtype) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)  # (H, W, 4)
    return (shifts[:, :, None] + reference).reshape(-1, 4)  # (H*W*A, 4)
