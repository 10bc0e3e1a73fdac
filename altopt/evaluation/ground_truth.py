"""Ground truth in COCO json."""

import reprlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from altopt.datasets.dataset import Json, Objects
from altopt.errors import DataError
from altopt.evaluation.coco_json import JsonFile, JsonId


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground truth file: objects by image id, and the classes with their category ids, all in the file's order."""

    objects: dict[str, Objects]
    classes: tuple[str, ...]
    category_ids: tuple[JsonId, ...]


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
    rows: dict[str, list[tuple[float, ...]]] = {image_id: [] for image_id in images}
    for place, entry in file.entries(document.get("annotations"), "annotations"):
        image_id = file.known(place, entry, "image_id", images)
        label = labels[file.known(place, entry, "category_id", labels)]
        box = file.box(place, entry)
        area = file.number(place, entry, "area") if "area" in entry else entry["bbox"][2] * entry["bbox"][3]
        difficult = file.flag(place, entry, "difficult") or file.flag(place, entry, "ignore")
        rows[image_id].append((*box, area, difficult, file.flag(place, entry, "iscrowd"), label))
    return GroundTruth(
        objects={image_id: _objects(found) for image_id, found in rows.items()},
        classes=tuple(classes),
        category_ids=tuple(entry["id"] for entry in document["categories"]),
    )


def _distinct(file: JsonFile, document: Json, name: str, field: str) -> dict[str, int]:
    """The values of one field, as texts, with their index; each may occur once."""
    indices: dict[str, int] = {}
    for place, entry in file.entries(document.get(name), name):
        key = file.key(place, entry, field)
        if key in indices:
            raise file.problem(place, f"repeats {field} {reprlib.repr(key)} of {name}[{indices[key]}]: remove one")
        indices[key] = len(indices)
    return indices


def _objects(rows: list[tuple[float, ...]]) -> Objects:
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)  # double, so that no tie or threshold moves by rounding
    boxes, areas, difficult, crowd = table[:, :4], table[:, 4], table[:, 5] > 0, table[:, 6] > 0
    return Objects(boxes, table[:, 7].astype(np.int64), difficult, crowd, areas)
