"""Non-maximum suppression that looks at no more boxes than it has to.

torchvision's compiled op compares every box that it keeps with all that follow, one pair after the other on the CPU,
and goes on after enough are kept. Here boxes are taken some at a time: vector instructions compare them with those
already kept, and the op only those that are left with each other.
"""

import torch
import torchvision
from torch import Tensor

AT_A_TIME = 512  # boxes: among so many torchvision's op is quick
IN_CACHE = 256  # kept boxes that as many are compared with at once


@torch.no_grad()
def nms_keeping_best(boxes: Tensor, scores: Tensor, overlap: float, count: int) -> Tensor:
    """Return the ``count`` best of sorted boxes, ``Tensor[N, 4]``, that suppression keeps: int64 ``Tensor[<=count]``.

    A box is suppressed by better ones that are kept and overlap it by more than ``overlap`` (IoU), so these are the
    first of those that torchvision's op keeps of all boxes. On CUDA that op compares all pairs at once, and to ask how
    many are kept is what takes time; there boxes come in few, large parts.
    """
    at_a_time = AT_A_TIME if boxes.device.type == "cpu" else max(AT_A_TIME, 8 * count)
    kept = torch.arange(0, device=boxes.device)
    for start in range(0, len(boxes), at_a_time):
        following = torch.arange(start, min(start + at_a_time, len(boxes)), device=boxes.device)
        if start:
            following = following[~overlapped(boxes[following], boxes[kept], overlap)]
        following = following[torchvision.ops.nms(boxes[following], scores[following], overlap)]
        kept = torch.cat([kept, following])
        if len(kept) >= count:
            break
    return kept[:count]


def overlapped(boxes: Tensor, others: Tensor, overlap: float) -> Tensor:
    """Return which of the boxes have an IoU above ``overlap`` with any of the others: -> ``BoolTensor[N]``.

    ``Tensor[N, 4]`` and ``Tensor[M, 4]``. The order of the arithmetic is that of torchvision's op, for the same bits.
    """
    found = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    # The op compares with the double: rounded down to the boxes' type, the limit lets the same IoUs through.
    limit = torch.tensor(overlap, dtype=boxes.dtype)
    if limit.item() > overlap:
        limit = torch.nextafter(limit, -limit.abs() - 1)
    x1, y1, x2, y2 = boxes.t().contiguous()[:, None]  # (1, N) each
    areas = (x2 - x1) * (y2 - y1)
    for some in torch.split(others, IN_CACHE):
        left, top, right, bottom = some.t()[:, :, None]  # (M, 1) each
        widths = torch.minimum(right, x2).sub_(torch.maximum(left, x1)).clamp_(min=0)  # (M, N)
        heights = torch.minimum(bottom, y2).sub_(torch.maximum(top, y1)).clamp_(min=0)
        intersections = widths.mul_(heights)
        unions = torch.add((right - left) * (bottom - top), areas, out=heights).sub_(intersections)
        found |= (intersections.div_(unions) > limit.item()).any(dim=0)  # NaN, of two boxes without area, is not above
    return found
