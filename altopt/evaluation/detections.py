"""Detections of images, and the COCO results json that carries them between programs.

Letters: N detections of one image.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from altopt.errors import ArtifactError, DataError
from altopt.evaluation.coco_json import JsonFile, JsonId, json_id


class Result(TypedDict):
    """An entry of COCO results json; ``bbox`` is x, y, width, height."""

    image_id: JsonId
    category_id: JsonId
    bbox: list[float]
    score: float


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image, in any order.

    ``boxes`` [N, 4] are continuous xyxy in pixels of the original image, ``scores`` [N], ``labels`` int64 [N] index
    the classes. A detector gives float32; a file gives float64, so that no tie or threshold moves by rounding.
    """

    boxes: npt.NDArray[np.floating]
    scores: npt.NDArray[np.floating]
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.scores.shape != (count,) or self.labels.shape != (count,):
            raise ValueError(f"{self.boxes.shape} boxes, {self.scores.shape} scores and {self.labels.shape} labels")

    def __len__(self) -> int:
        return len(self.scores)


def read_detections(path: Path, image_ids: Iterable[str], category_ids: Sequence[JsonId]) -> dict[str, Detections]:
    """Detections of every image in ``image_ids``, in their order, from COCO results json.

    The file is a list of {image_id, category_id, bbox: [x, y, width, height], score}; within an image its order is
    kept. ``category_ids`` holds the category id of each class, in the order of the classes. Raises ArtifactError for
    a malformed file, an id that neither list has, a number that is not finite and a negative size.
    """
    file = JsonFile(path, ArtifactError)
    rows: dict[str, list[tuple[float, ...]]] = {image_id: [] for image_id in image_ids}
    images = {image_id: index for index, image_id in enumerate(rows)}
    labels = {str(category_id): label for label, category_id in enumerate(category_ids)}
    for place, entry in file.entries(file.load(), "detections"):
        image_id = file.known(place, entry, "image_id", images)
        label = labels[file.known(place, entry, "category_id", labels)]
        rows[image_id].append((*file.box(place, entry), file.number(place, entry, "score"), label))
    tables = {image_id: np.array(found, np.float64).reshape(-1, 6) for image_id, found in rows.items()}  # (N, 6) each
    return {image_id: Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))
            for image_id, table in tables.items()}


def to_coco_results(detections: Mapping[str, Detections], category_ids: Sequence[JsonId],
                    image_id_of: Callable[[str], JsonId] = json_id) -> list[Result]:
    """The list that a COCO results json holds; ``category_ids`` gives the category id of each class.

    Nothing is rounded: reading it back gives the same float32 boxes and scores. COCO's own tools compare ids with
    their type; ``image_id_of`` gives the image's id as its ground truth has it (a data set's ``coco_image_id``).
    Without it an id that reads as a whole number is written as one.
    """
    return [
        {"image_id": image_id_of(image_id), "category_id": category_ids[label], "bbox": box, "score": score}
        for image_id, found in detections.items()
        for box, score, label in zip(to_xywh(found.boxes).tolist(), found.scores.tolist(), found.labels, strict=True)
    ]


def to_xywh(boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Boxes [N, 4] xyxy as COCO's x, y, width, height, in double precision."""
    corners = boxes.astype(np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)  # (N, 4)


def check_images(ground_truth: Iterable[str], detections: Iterable[str]) -> None:
    """Raise DataError when an image with detections is not one of the ground truth's.

    An image of the ground truth without an entry among the detections has none.
    """
    foreign = sorted(set(detections) - set(ground_truth))
    if foreign:
        raise DataError(f"image {foreign[0]} has detections but no ground truth ({len(foreign)} such images): "
                        "score with the ground truth of the images that were detected on")
