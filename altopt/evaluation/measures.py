"""What every scorer here measures with: IoU in double precision, and scores that may be undefined.

A score that is not defined (AP of a class without objects) is NaN in memory, left out of means, null in JSON.
Letters: N, M numbers of boxes.
"""

import math
from collections.abc import Iterable
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]


def box_areas(boxes: Boxes, *, plus_one: bool = False) -> Floats:
    """Areas float64 [N] of boxes [N, 4] xyxy; see ``box_iou`` for ``plus_one``."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    width, height = (np.maximum(corners[:, 2:] - corners[:, :2] + plus_one, 0.0)).T  # (N,) each
    return np.asarray(width * height)


def box_iou(first: Boxes, second: Boxes, *, plus_one: bool = False) -> Floats:
    """IoU float64 [N, M] of boxes [N, 4] and [M, 4] xyxy in one common frame.

    Coordinates are continuous, width = x2 - x1. With ``plus_one`` x2 and y2 name the last pixel of the box, so that
    width = x2 - x1 + 1, as the VOC devkit counts. Two boxes without any area have IoU 0.
    """
    first, second = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    upper_left = np.maximum(first[:, None, :2], second[None, :, :2])  # (N, M, 2)
    lower_right = np.minimum(first[:, None, 2:], second[None, :, 2:])  # (N, M, 2)
    sides = np.maximum(lower_right - upper_left + plus_one, 0.0)  # (N, M, 2)
    common = sides[..., 0] * sides[..., 1]
    union = box_areas(first, plus_one=plus_one)[:, None] + box_areas(second, plus_one=plus_one)[None, :] - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


class ClassDict(TypedDict):
    """A class's score in JSON; the counts are the VOC challenge's."""

    ap: float | None
    positives: NotRequired[int]
    true_positives: NotRequired[int]
    false_positives: NotRequired[int]
    ignored: NotRequired[int]


class ScoreDict(TypedDict):
    """A score in JSON, with its convention in words; ``numbers`` are COCO's twelve."""

    protocol: str
    convention: str
    map: float | None
    numbers: NotRequired[dict[str, float | None]]
    classes: dict[str, ClassDict]


def mean_of_defined(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN when there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def or_none(value: float) -> float | None:
    """The value as JSON can hold it: None in place of NaN."""
    return None if math.isnan(value) else float(value)


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    """Elementwise part / whole, NaN where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, math.nan), where=whole > 0))
