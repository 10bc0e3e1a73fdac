"""Ground truth as the scorers see it, and its COCO json form.

Letters: N objects of one image.
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from altopt.errors import DataError
from altopt.evaluation.coco_json import Entry, JsonFile, JsonId

Rows = list[tuple[float, ...]]


class Annotated(Protocol):
    """The objects of one image, as far as scoring needs them; a data set's ``Objects`` are such."""

    @property
    def boxes(self) -> npt.NDArray[np.floating]:
        """[N, 4] continuous xyxy in pixels of the original image."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """[N] index of the class."""

    @property
    def difficult(self) -> npt.NDArray[np.bool_]:
        """[N] whether finding it is neither asked for nor punished."""

    @property
    def crowd(self) -> npt.NDArray[np.bool_]:
        """[N] whether the box holds a group of objects."""

    @property
    def areas(self) -> npt.NDArray[np.floating] | None:
        """[N] annotated areas (COCO: of the masks) in square pixels, which COCO sizes objects by; None: the boxes'."""


@dataclass(frozen=True, eq=False)
class ImageObjects:
    """The objects of one image of a file: boxes float64 [N, 4] xyxy, labels int64, flags bool, areas float64 [N]."""

    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground truth file: objects by image id, and the classes with their category ids, all in the file's order."""

    objects: dict[str, ImageObjects]
    classes: tuple[str, ...]
    category_ids: tuple[JsonId, ...]


def counted(objects: Annotated) -> npt.NDArray[np.bool_]:
    """bool [N]: the objects that must be found, neither difficult nor crowd."""
    return np.asarray(~(objects.difficult | objects.crowd), dtype=bool)


def read_ground_truth(path: Path) -> GroundTruth:
    """Ground truth from COCO json: images, categories, annotations.

    An annotation has image_id, category_id and bbox [x, y, width, height], and may have area, iscrowd and difficult
    (or ignore). Raises DataError for a malformed file, an id that is doubled or not listed and an unusable box.
    """
    file = JsonFile(path, DataError)
    document = file.load()
    if not isinstance(document, dict):
        raise DataError(f"{path} is not COCO ground truth: it must be an object with images, categories, annotations")
    images = _distinct(file, document, "images", "id")
    labels = _distinct(file, document, "categories", "id")
    classes = _distinct(file, document, "categories", "name")
    rows: dict[str, Rows] = {image_id: [] for image_id in images}
    for place, entry in file.entries(document.get("annotations"), "annotations"):
        image_id = file.known(place, entry, "image_id", images)
        label = labels[file.known(place, entry, "category_id", labels)]
        rows[image_id].append((*_row(file, place, entry), label))
    return GroundTruth(
        objects={image_id: _objects(found) for image_id, found in rows.items()},
        classes=tuple(classes),
        category_ids=tuple(entry["id"] for entry in document["categories"]),
    )


def _distinct(file: JsonFile, document: Entry, name: str, field: str) -> dict[str, int]:
    """The values of one field, as texts, with their index; each may occur once."""
    indices: dict[str, int] = {}
    for place, entry in file.entries(document.get(name), name):
        key = file.key(place, entry, field)
        if key in indices:
            raise file.problem(place, f"repeats {field} {reprlib.repr(key)} of {name}[{indices[key]}]: remove one")
        indices[key] = len(indices)
    return indices


def _row(file: JsonFile, place: str, entry: Entry) -> tuple[float, ...]:
    """x1, y1, x2, y2, area, difficult, crowd."""
    box = file.box(place, entry)
    area = file.number(place, entry, "area") if "area" in entry else entry["bbox"][2] * entry["bbox"][3]
    difficult = file.flag(place, entry, "difficult") or file.flag(place, entry, "ignore")
    return (*box, area, difficult, file.flag(place, entry, "iscrowd"))


def _objects(rows: Rows) -> ImageObjects:
    """The objects of rows x1, y1, x2, y2, area, difficult, crowd, label."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    difficult, crowd = table[:, 5] > 0, table[:, 6] > 0
    return ImageObjects(table[:, :4], table[:, 7].astype(np.int64), difficult, crowd, areas=table[:, 4])
