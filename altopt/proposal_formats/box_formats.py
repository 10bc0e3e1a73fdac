"""The conventions by which files of proposals count boxes; this is the one place that leads from them to altopt's own.

Letters: K boxes of one image.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

BoxFormat = Literal["xyxy", "inclusive-0", "inclusive-1", "yxyx-inclusive-1", "xywh"]

BOX_FORMATS: dict[BoxFormat, str] = {
    "xyxy": "x1 y1 x2 y2, continuous: width is x2 - x1 (altopt, detectron2, torchvision)",
    "inclusive-0": "x1 y1 x2 y2 of the first and the last pixel, counted from 0 (py-faster-rcnn)",
    "inclusive-1": "x1 y1 x2 y2 of the first and the last pixel, counted from 1 (VOC, MATLAB)",
    "yxyx-inclusive-1": "y1 x1 y2 x2 of the first and the last pixel, counted from 1 (selective search's MATLAB code)",
    "xywh": "x y width height, continuous (COCO)",
}


def to_continuous(boxes: NDArray[np.number], box_format: BoxFormat) -> NDArray[np.float32]:
    """Return boxes [K, 4] of any number type as continuous x1, y1, x2, y2 in float32.

    They are computed in double precision: in uint16, as the files of R-CNN have it, 0 - 1 would be 65535.
    """
    corners = boxes.astype(np.float64)
    if box_format == "yxyx-inclusive-1":
        corners = corners[:, [1, 0, 3, 2]]
    if box_format == "xywh":
        corners[:, 2:] += corners[:, :2]
    elif box_format == "inclusive-0":
        corners[:, 2:] += 1
    elif box_format != "xyxy":
        corners[:, :2] -= 1
    return corners.astype(np.float32)


def to_inclusive(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return continuous boxes [K, 4] as first and last pixels counted from 0, the format ``inclusive-0``."""
    return boxes - np.array([0, 0, 1, 1], np.float32)
