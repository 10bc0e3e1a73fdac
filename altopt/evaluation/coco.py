"""Scoring by the rules of COCO, which pycocotools implements; here only its printing and its traps are kept away."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from altopt.datasets.dataset import Objects
from altopt.evaluation.coco_json import json_id
from altopt.evaluation.detections import Detections, check_images, to_xywh
from altopt.evaluation.measures import ScoreDict, box_areas, mean_of_defined, or_none

NUMBERS = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge",
           "AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge")
OUTSIDE_EVERY_AREA_RANGE = -1.0
Row = dict[str, int | float | list[float]]  # an annotation in COCO json


@dataclass(frozen=True)
class CocoScore:
    """The twelve numbers by name, and AP (IoU 0.50:0.05:0.95) of each class; NaN where there is nothing to find."""

    numbers: dict[str, float]
    ap: dict[str, float]
    convention: str

    @property
    def map(self) -> float:
        """AP over all classes and thresholds."""
        return self.numbers["AP"]

    def as_dict(self) -> ScoreDict:
        """JSON-able; NaN is None."""
        return {
            "protocol": "coco",
            "convention": self.convention,
            "map": or_none(self.map),
            "numbers": {name: or_none(value) for name, value in self.numbers.items()},
            "classes": {name: {"ap": or_none(value)} for name, value in self.ap.items()},
        }


def score_coco(ground_truth: Mapping[str, Objects], detections: Mapping[str, Detections],
               classes: Sequence[str]) -> CocoScore:
    """COCO's numbers for boxes; both mappings are keyed by image id.

    Annotated areas decide which objects are small, medium and large, or the boxes' areas where none are annotated.
    Difficult objects are ignored: a detection of one is neither right nor wrong. Raises DataError for detections of
    an unknown image.
    """
    check_images(ground_truth, detections)
    # Detections of equal score stand in the order of their images, and pycocotools sorts those by id.
    ids = {image_id: json_id(image_id) for image_id in ground_truth}
    numbers = all(isinstance(value, int) for value in ids.values())
    order = sorted(ids, key=int) if numbers else sorted(ids)
    objects: list[Row] = []
    results: list[Row] = []  # COCO.loadRes would make them, but not of an empty list
    for image, image_id in enumerate(order):
        truth = ground_truth[image_id]
        sizes = box_areas(truth.boxes) if truth.areas is None else truth.areas
        # COCOeval overwrites ``ignore`` with ``iscrowd``, and a crowd would be matched by another IoU and any number
        # of times; an area outside every range is what leaves an object to be ignored alone.
        sizes = np.where(truth.difficult, OUTSIDE_EVERY_AREA_RANGE, sizes)
        columns = zip(truth.labels.tolist(), to_xywh(truth.boxes).tolist(), sizes.tolist(), truth.crowd, strict=True)
        objects += [_row(image, label, box, area, iscrowd=int(crowd)) for label, box, area, crowd in columns]
        if found := detections.get(image_id):
            rows = zip(found.labels.tolist(), to_xywh(found.boxes).tolist(), found.scores.tolist(), strict=True)
            results += [_row(image, label, box, box[2] * box[3], score=score) for label, box, score in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(objects, order, classes), _index(results, order, classes), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precisions = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), all areas
    return CocoScore(
        numbers={name: _defined(value) for name, value in zip(NUMBERS, evaluation.stats, strict=True)},
        ap={name: mean_of_defined(map(_defined, precisions[:, :, label].ravel().tolist()))
            for label, name in enumerate(classes)},
        convention="101-point, IoU >= 0.50:0.05:0.95, at most 100 detections an image, difficult and crowd ignored, "
                   "sizes by annotated area, else by the box",
    )


def _row(image: int, label: int, box: list[float], area: float, **more: float) -> Row:
    return {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": 0, **more}


def _index(annotations: list[Row], order: list[str], classes: Sequence[str]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(order))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
        # From 1: COCOeval takes a match with id 0 for none.
        "annotations": [row | {"id": number} for number, row in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _defined(value: float) -> float:
    return math.nan if value < 0 else float(value)  # COCOeval writes -1 where there is nothing to find
