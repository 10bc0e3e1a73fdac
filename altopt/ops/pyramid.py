"""Spatial pyramid pooling of regions (SPP-net, section 2.2): one vector of fixed length from a region of any size.

Letters: B images, R regions, C channels. Each level L is RoI pooling to L x L bins, by the op that every stage uses.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from altopt.ops.roi_pool import roi_pool


def bins(levels: Sequence[int]) -> int:
    """Return the number of bins of a pyramid: 50 for the levels 6, 3, 2 and 1."""
    return sum(level**2 for level in levels)


def pyramid_pool(features: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], levels: Sequence[int],
                 spatial_scale: float) -> Tensor:
    """Return ``Tensor[sum of R_b, C * bins]``: level after level, each in the order channels, rows, columns.

    ``features`` is ``Tensor[B, C, H, W]`` or one ``Tensor[C, h, w]`` for each image, ``boxes`` for each
    image ``Tensor[R_b, 4]`` in pixels of the input frame.
    """
    return torch.cat([roi_pool(features, boxes, level, spatial_scale).flatten(1) for level in levels], dim=1)


def pool_at_nearest_scale(boxes: Tensor, scales: Sequence[float], region_area: float,
                          pool: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return ``Tensor[R, ...]`` of what ``pool(scale, boxes)`` gives for boxes that are nearest to that scale.

    ``boxes`` is ``Tensor[R, 4]`` in the original frame; ``pool`` takes them in the frame of the scale, which counts
    from 0.
    """
    chosen = nearest_scale(boxes, scales, region_area)
    rows = [torch.nonzero(chosen == number)[:, 0] for number in range(len(scales))]
    parts = [pool(number, boxes[here] * scales[number]) for number, here in enumerate(rows)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def nearest_scale(boxes: Tensor, scales: Sequence[float], region_area: float) -> Tensor:
    """Return for each box the scale, counted from 0, that brings its area nearest to ``region_area``: int64 ``[R]``.

    ``boxes`` is ``Tensor[R, 4]`` in the original frame, ``scales`` are input pixels for one original pixel. The first
    of equally near scales wins. Source: SPP-net, section 4.1.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(dim=1)[:, None] * boxes.new_tensor([scale**2 for scale in scales])  # (R, scales)
    return (areas - region_area).abs().argmin(dim=1)
