"""Intersection over union of boxes in numpy, in double precision: what every scorer here measures with.

Letters: N, M numbers of boxes.
"""


import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.floating]


def box_areas(boxes: Boxes, *, plus_one: bool = False) -> npt.NDArray[np.float64]:
    """Areas float64 [N] of boxes [N, 4] xyxy; see ``box_iou`` for ``plus_one``."""
    boxes = _float64(boxes)
    width, height = (np.maximum(boxes[:, 2:] - boxes[:, :2] + plus_one, 0.0)).T
    return np.asarray(width * height)


def box_iou(first: Boxes, second: Boxes, *, plus_one: bool = False) -> npt.NDArray[np.float64]:
    """IoU float64 [N, M] of boxes [N, 4] and [M, 4] xyxy in one common frame.

    Coordinates are continuous, width = x2 - x1. With ``plus_one`` x2 and y2 name the last pixel of the box, so that
    width = x2 - x1 + 1, as the VOC devkit counts. Two boxes without any area have IoU 0.
    """
    first, second = _float64(first), _float64(second)
    upper_left = np.maximum(first[:, None, :2], second[None, :, :2])
    lower_right = np.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = np.maximum(lower_right - upper_left + plus_one, 0.0)  # (N, M, 2)
    common = sides[..., 0] * sides[..., 1]
    union = box_areas(first, plus_one=plus_one)[:, None] + box_areas(second, plus_one=plus_one)[None, :] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


def _float64(boxes: Boxes) -> npt.NDArray[np.float64]:
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
