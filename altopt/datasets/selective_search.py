"""Selective search on one image, by OpenCV's contrib module. No torch here: it runs in processes of its own.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013. OpenCV merges regions over several colour spaces
and granularities, and orders their boxes by depth in the hierarchy times a random number. The random numbers are C's
``rand``, which OpenCV's own seed does not reach; the order therefore depends on the C library, the boxes do not.
"""

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from altopt.errors import UsageError

Mode = Literal["fast", "quality"]
SEED_BITS = 0xFFFFFFFF
LEAST_SIDE = 3  # below, OpenCV's gradients have no neighbours


def require_opencv() -> Any:
    """Return OpenCV's module with selective search in it; UsageError when it is not installed."""
    try:
        import cv2

        cv2.ximgproc.segmentation.createSelectiveSearchSegmentation  # noqa: B018 - plain OpenCV lacks it
    except (ImportError, AttributeError):
        raise UsageError("selective search needs OpenCV with its contrib modules: install it with pip install -e "
                         "'.[selective-search]', or bring boxes made elsewhere with altopt proposals import") from None
    return cv2


def selective_search(pixels: NDArray[np.uint8], mode: Mode, seed: int) -> NDArray[np.int32]:
    """Return distinct boxes int32 [K, 4], x y width height in pixels of this image, RGB uint8 [H, W, 3].

    The order is OpenCV's, the first being the ones to keep. One call at a time in a process: ``rand`` has one state.
    """
    if min(pixels.shape[:2]) < LEAST_SIDE:
        return np.array([[0, 0, pixels.shape[1], pixels.shape[0]]], np.int32)
    cv2 = require_opencv()
    cv2.setNumThreads(1)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(pixels[:, :, ::-1]))
    if mode == "fast":
        search.switchToSelectiveSearchFast()
    else:
        search.switchToSelectiveSearchQuality()
    ctypes.CDLL(None).srand(seed & SEED_BITS)
    boxes = np.asarray(search.process(), np.int32).reshape(-1, 4)
    _, first = np.unique(boxes, axis=0, return_index=True)
    return boxes[np.sort(first)]
