"""What every reader of proposals gives: image by image, in altopt's box format, best first.

Files count boxes by several conventions; this is the one place that leads from them to altopt's own and back.
Letters: K boxes of one image.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from altopt.errors import ArtifactError

Boxes = NDArray[np.float32]
Scores = NDArray[np.float32]
RawProposals = tuple[str, object, object]  # image id, boxes in the file's format, scores or None
BoxFormat = Literal["xyxy", "inclusive-0", "inclusive-1", "yxyx-inclusive-1", "xywh"]

BOX_FORMATS: dict[BoxFormat, str] = {
    "xyxy": "x1 y1 x2 y2, continuous: width is x2 - x1 (altopt, detectron2, torchvision)",
    "inclusive-0": "x1 y1 x2 y2 of the first and the last pixel, counted from 0 (py-faster-rcnn)",
    "inclusive-1": "x1 y1 x2 y2 of the first and the last pixel, counted from 1 (VOC, MATLAB)",
    "yxyx-inclusive-1": "y1 x1 y2 x2 of the first and the last pixel, counted from 1 (selective search's MATLAB code)",
    "xywh": "x y width height, continuous (COCO)",
}


class ProposalFileReader:
    """Proposals of a file: iterating gives (image id, boxes float32 [K, 4] continuous xyxy, scores float32 [K]).

    ``box_format`` is how the file counts its boxes. Images without scores get ranks, from 1 down to 1 / K, and are
    counted in ``unscored``. The images are read as they are asked for, once; ArtifactError for what is no box.
    """

    def __init__(self, path: Path, form: str, box_format: BoxFormat, images: Iterable[RawProposals]) -> None:
        self.path, self.form, self.box_format = path, form, box_format
        self.unscored = 0
        self._images = images

    def __iter__(self) -> Iterator[tuple[str, Boxes, Scores]]:
        """Give the images in the file's order."""
        for image_id, raw_boxes, raw_scores in self._images:
            boxes = to_continuous(self._numbers(image_id, raw_boxes, (4,)), self.box_format)
            if raw_scores is None:
                self.unscored += 1
                yield image_id, boxes, rank_scores(len(boxes))
                continue
            scores = self._numbers(image_id, raw_scores, ()).astype(np.float32)  # (K,)
            if len(scores) != len(boxes):
                raise self._error(f"image {image_id} has {len(boxes)} boxes and {len(scores)} scores")
            # A stable sort gives ties their place in the file; what is sorted already is not copied.
            order = np.argsort(-scores, kind="stable") if (np.diff(scores) > 0).any() else slice(None)
            yield image_id, boxes[order], scores[order]

    def _numbers(self, image_id: str, values: object, row: tuple[int, ...]) -> NDArray[np.number]:
        """Return an array of rows of this shape; an empty one may have any."""
        try:
            array = np.asarray(values)
        except ValueError:  # rows of different lengths
            array = np.empty(1, object)
        if array.size == 0:
            return np.empty((0, *row))
        array = array if row else array.reshape(-1)
        if array.dtype.kind not in "iuf" or array.shape[1:] != row:
            what = "boxes of four numbers" if row else "scores"
            raise self._error(f"image {image_id} has an array {list(array.shape)} of {array.dtype} for its {what}")
        return array

    def _error(self, cause: str) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be imported as {self.form}: {cause}: export it again")


def rank_scores(count: int) -> Scores:
    """Return scores float32 [count] that only say the order: from 1 down to 1 / count."""
    return (np.arange(count, 0, -1) / max(count, 1)).astype(np.float32)


def in_order(path: Path, found: int, ids: tuple[str, ...]) -> tuple[str, ...]:
    """Return the image ids that a file without ids goes by; ArtifactError unless it has as many images."""
    if found == len(ids):
        return ids
    mirrored = ", twice as many: leave the mirrored images out" if found == 2 * len(ids) else ""
    raise ArtifactError(f"{path} has no image ids, so it goes by the order of the split, but it holds {found} "
                        f"images and the split {len(ids)}{mirrored}: bring the file of this split, or one with ids")


def to_continuous(boxes: NDArray[np.number], box_format: BoxFormat) -> NDArray[np.float32]:
    """Return boxes [K, 4] of any number type as continuous x1, y1, x2, y2 in float32."""
    corners = boxes.astype(np.float64)  # (K, 4); in uint16, as the files of R-CNN have it, 0 - 1 would be 65535
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
