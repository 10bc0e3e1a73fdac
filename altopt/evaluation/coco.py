"""Scoring by the rules of COCO, which pycocotools implements; here only its printing and its traps are kept away."""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from altopt.evaluation.coco_json import json_id
from altopt.evaluation.detections import Detections, check_images, to_xywh
from altopt.evaluation.ground_truth import Annotated
from altopt.evaluation.iou import box_areas
from altopt.evaluation.undefined import ScoreDict, mean_of_defined, or_none

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


def score_coco(
    ground_truth: Mapping[str, Annotated],
    detections: Mapping[str, Detections],
    classes: Sequence[str],
) -> CocoScore:
    """COCO's numbers for boxes; both mappings are keyed by image id.

    Annotated areas decide which objects are small, medium and large, or the boxes' areas where none are annotated.
    Difficult objects are ignored: a detection of one is neither right nor wrong. Raises DataError for detections of
    an unknown image.
    """
    check_images(ground_truth, detections)
    order = _as_pycocotools_sorts(ground_truth)
    objects = _objects(order, ground_truth)
    results = _results(order, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(objects, order, classes), _index(results, order, classes), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = [_mean_precision(evaluation.eval["precision"][:, :, label, 0, -1]) for label in range(len(classes))]
    return CocoScore(
        numbers={name: _defined(value) for name, value in zip(NUMBERS, evaluation.stats, strict=True)},
        ap=dict(zip(classes, per_class, strict=True)),
        convention="101-point, IoU >= 0.50:0.05:0.95, at most 100 detections an image, difficult and crowd ignored, "
                   "sizes by annotated area, else by the box",
    )


def _as_pycocotools_sorts(image_ids: Iterable[str]) -> list[str]:
    """Detections of equal score stand in the order of their images, and pycocotools sorts those by id."""
    ids = {image_id: json_id(image_id) for image_id in image_ids}
    if all(isinstance(value, int) for value in ids.values()):
        return sorted(ids, key=int)
    return sorted(ids)


def _objects(order: list[str], ground_truth: Mapping[str, Annotated]) -> list[Row]:
    """COCO annotations of all objects.

    A difficult object gets an area outside every range: COCOeval overwrites ``ignore`` with ``iscrowd``, and a crowd
    would be matched by another IoU and any number of times.
    """
    rows: list[Row] = []
    for image, image_id in enumerate(order):
        one = ground_truth[image_id]
        sizes = box_areas(one.boxes) if one.areas is None else one.areas
        sizes = np.where(one.difficult, OUTSIDE_EVERY_AREA_RANGE, sizes)
        columns = zip(one.labels.tolist(), to_xywh(one.boxes).tolist(), sizes.tolist(), one.crowd.tolist(), strict=True)
        rows += [_row(image, label, box, area) | {"iscrowd": int(crowd)} for label, box, area, crowd in columns]
    return rows


def _results(order: list[str], detections: Mapping[str, Detections]) -> list[Row]:
    """COCO annotations of all detections; ``COCO.loadRes`` would do it, but not for an empty list."""
    rows: list[Row] = []
    for image, image_id in enumerate(order):
        if image_id in detections:
            one = detections[image_id]
            boxes, scores = to_xywh(one.boxes).tolist(), one.scores.tolist()
            columns = zip(one.labels.tolist(), boxes, scores, strict=True)
            rows += [_row(image, label, box, box[2] * box[3]) | {"score": score} for label, box, score in columns]
    return rows


def _row(image: int, label: int, box: list[float], area: float) -> Row:
    return {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}


def _index(annotations: list[Row], order: list[str], classes: Sequence[str]) -> COCO:
    """The COCO object of these annotations. Their ids begin at 1: COCOeval takes a match with id 0 for none."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(order))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
        "annotations": [row | {"id": number} for number, row in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _mean_precision(precision: npt.NDArray[np.float64]) -> float:
    return mean_of_defined(map(_defined, precision.ravel().tolist()))


def _defined(value: float) -> float:
    """COCOeval writes -1 where there is nothing to find."""
    return math.nan if value < 0 else float(value)
