"""Answers that other projects published in their own tests, reproduced with their conventions.

Every VOC case gives its published answer under each matching rule, with and without the extra pixel, so none of them
tells the conventions apart; the examples of test_voc_scoring do. Where a class has met nothing but difficult objects
the published precision is undefined (0/0); the devkit writes 0, and AP is the same.
The files are found through ALTOPT_DATA; without it these tests are skipped.
"""

import json
import os
from fractions import Fraction
from math import lcm
from pathlib import Path

import numpy as np
import pytest
from evaluation_samples import detections, objects, write_json

from altopt.evaluation.scoring import score_files
from altopt.evaluation.voc import area_under_envelope, eleven_points, score_voc

pytestmark = pytest.mark.skipif("ALTOPT_DATA" not in os.environ, reason="ALTOPT_DATA is not set")
FOLDER = Path(os.environ.get("ALTOPT_DATA", ".")) / "evalcases"
CURVES, COCO, TENSORFLOW = "ap_from_precision_recall", "coco_val2014_fake100", "tf_pascal_evaluator"
CHAINERCV = ["chainercv_1", "chainercv_2_iou097", "chainercv_3_two_images", "chainercv_4_difficult",
             "chainercv_5_only_difficult"]
conventions = [
    pytest.mark.parametrize("strict", [True, False], ids=["gt", "ge"]),
    pytest.mark.parametrize("plus_one", [True, False], ids=["plus-one", "continuous"]),
]


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def score_case(case, folder, protocol, **options):
    """Convert a case to COCO json and score the two files."""
    xywh = "xywh" in case["box_format"]
    truth = {
        "images": [{"id": image["id"]} for image in case["images"]],
        "categories": [{"id": name, "name": str(name)} for name in case["classes"]],
        "annotations": rows(case, "gt", xywh, {"labels": "category_id", "difficult": "difficult",
                                               "iscrowd": "iscrowd", "area": "area"}),
    }
    found = rows(case, "det", xywh, {"labels": "category_id", "scores": "score"})
    paths = write_json(folder / "truth.json", truth), write_json(folder / "found.json", found)
    return score_files(protocol, *paths, **options)


def rows(case, part, xywh, fields):
    return [
        {"image_id": image["id"], "bbox": box if xywh else [*box[:2], box[2] - box[0], box[3] - box[1]]}
        | {field: image[part][column][index] for column, field in fields.items() if column in image[part]}
        for image in case["images"]
        for index, box in enumerate(image[part]["boxes"])
    ]


def listed(curve):
    return [None if np.isnan(value) else value for value in curve.tolist()]


def same(curve, published):
    """Whether a curve is the published one; null stands for a curve without any defined value."""
    if published is None:
        return all(value is None for value in curve)
    defined = [(one, other) for one, other in zip(curve, published, strict=True) if other is not None]
    absent = [one for one, other in zip(curve, published, strict=True) if other is None]
    return absent == [None] * len(absent) and all(abs(one - other) < 1e-12 for one, other in defined)


def test_every_case_is_here():
    assert {path.stem for path in FOLDER.glob("*.json")} == {CURVES, COCO, TENSORFLOW, *CHAINERCV}


@conventions[0]
@conventions[1]
@pytest.mark.parametrize("name", CHAINERCV)
def test_chainercv_precision_and_recall(name, strict, plus_one, tmp_path):
    case = load(name)
    (expected,) = case["expected"]
    options = {"iou": expected["iou_threshold"], "strict": strict, "plus_one": plus_one}
    score = score_case(case, tmp_path, "voc07", **options)
    for index, label in enumerate(case["classes"]):
        curves = score.classes[str(label)]
        assert same(listed(curves.precision), expected["precision"][index])
        assert same(listed(curves.recall), expected["recall"][index])


@conventions[0]
@conventions[1]
def test_tensorflow_pascal_evaluator(strict, plus_one, tmp_path):
    case = load(TENSORFLOW)
    (expected,) = case["expected"]
    score = score_case(case, tmp_path, "voc10", iou=expected["iou_threshold"], strict=strict, plus_one=plus_one)
    assert score.ap == pytest.approx(expected["ap"], abs=expected["tolerance"])
    assert score.map == pytest.approx(expected["map"], abs=expected["tolerance"])


def test_cocoapi_numbers(tmp_path):
    case = load(COCO)
    (expected,) = case["expected"]
    score = score_case(case, tmp_path, "coco")
    assert score.numbers == pytest.approx(expected["published"], abs=expected["tolerance"])
    assert score.numbers == pytest.approx(expected["pycocotools_2_0_11_here"], abs=1e-12)


def test_average_precision_from_curves():
    curves = [case for case in load(CURVES)["cases"] if "voc_area" in case]
    assert len(curves) == 2
    for case in curves:
        for index, area in enumerate(case["voc_area"]):
            if area is not None:
                precision, recall = defined(case["precision"][index]), defined(case["recall"][index])
                assert area_under_envelope(precision, recall) == pytest.approx(area, abs=1e-12)
                if "voc_11point" in case:
                    expected = case["voc_11point"][index]
                    assert eleven_points(precision, *counts(recall)) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_from_ranked_hits():
    (case,) = [case for case in load(CURVES)["cases"] if "is_tp" in case]
    places = [[100 * index, 0, 100 * index + 10, 10] for index in range(20)]
    boxes = [places[index + (0 if hit else 10)] for index, hit in enumerate(case["is_tp"])]
    truth = {"a": objects(places[: case["num_gt"]])}
    score = score_voc(truth, {"a": detections(boxes, case["scores"])}, ["thing"]).classes["thing"]
    assert score.precision.tolist() == pytest.approx(case["precision"][0])
    assert score.recall.tolist() == pytest.approx(case["recall"][0])


def defined(curve):
    return np.array([np.nan if value is None else value for value in curve], np.float64)


def counts(recall):
    """The true positives and positives of the smallest data set with this recall."""
    positives = lcm(*(Fraction(value).limit_denominator(100).denominator for value in recall))
    return np.rint(recall * positives).astype(np.int64), positives
