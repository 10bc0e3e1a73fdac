"""COCO scoring through pycocotools: examples by hand, its traps, and a loop as the oracle of AP."""

import json
import math
from functools import partial

import numpy as np
import pytest
from evaluation_samples import detections, objects, random_samples, slow_iou

from altopt.errors import DataError
from altopt.evaluation.coco import NUMBERS, score_coco

SQUARE = [0, 0, 10, 10]
FAR = [50, 50, 60, 60]
BIG = [0, 0, 100, 100]


def score_one(truth, found):
    return score_coco({"a": truth}, {"a": found}, ["thing"])


def test_a_perfect_image():
    score = score_one(objects([SQUARE]), detections([SQUARE], [0.9]))
    assert tuple(score.numbers) == NUMBERS
    assert len(NUMBERS) == 12
    assert score.map == pytest.approx(1)
    assert score.ap == {"thing": pytest.approx(1)}
    assert [score.numbers[name] for name in ("AR1", "APsmall", "ARsmall")] == pytest.approx([1, 1, 1])
    assert math.isnan(score.numbers["APlarge"])


def test_the_first_object_can_be_matched():
    """COCOeval takes an annotation with id 0 for none."""
    assert score_one(objects([SQUARE, FAR]), detections([SQUARE], [1])).numbers["AR100"] == pytest.approx(0.5)


def test_thresholds_may_be_met_exactly():
    score = score_one(objects([SQUARE]), detections([[0, 0, 10, 7]], [1]))  # IoU 0.7 meets 0.5, 0.55, ..., 0.7
    assert score.map == pytest.approx(0.5)
    assert score.numbers["AP50"] == pytest.approx(1)
    assert score.numbers["AP75"] == 0


def test_no_detections():
    score = score_coco({"a": objects([SQUARE])}, {}, ["thing"])
    assert (score.map, score.numbers["AR100"]) == (0, 0)
    assert score_one(objects([SQUARE]), detections([], [])).map == 0


@pytest.mark.parametrize("truth", [{}, {"a": objects([])}, {"a": objects([SQUARE], difficult=[0])}])
def test_nothing_to_find(truth):
    score = score_coco(truth, {name: detections([SQUARE], [1]) for name in truth}, ["thing"])
    assert all(math.isnan(value) for value in score.numbers.values())
    assert math.isnan(score.ap["thing"])
    assert json.loads(json.dumps(score.as_dict(), allow_nan=False))["map"] is None


def test_no_classes():
    assert math.isnan(score_coco({"a": objects([])}, {}, []).map)


def test_a_class_without_objects_is_left_out():
    score = score_coco({"a": objects([SQUARE])}, {"a": detections([SQUARE, FAR], [1, 1], [0, 1])}, ["cat", "dog"])
    assert score.ap["cat"] == score.map == pytest.approx(1)
    assert math.isnan(score.ap["dog"])


def test_difficult_objects_are_ignored():
    truth = objects([SQUARE, FAR], difficult=[0])
    assert score_one(truth, detections([SQUARE, FAR], [0.9, 0.8])).map == pytest.approx(1)
    plain = objects([FAR])
    assert score_one(plain, detections([SQUARE, FAR], [0.9, 0.8])).map == pytest.approx(0.5)


def test_a_difficult_object_excuses_one_detection_and_is_no_crowd():
    truth = objects([SQUARE, FAR], difficult=[0])
    inside = [2, 2, 5, 5]  # would count as found in a crowd
    assert score_one(truth, detections([inside, FAR], [0.9, 0.8])).map == pytest.approx(0.5)
    assert score_one(truth, detections([SQUARE, SQUARE, FAR], [0.9, 0.9, 0.8])).map == pytest.approx(0.5)


def test_a_crowd_excuses_every_detection_inside_it():
    truth = objects([BIG, [200, 200, 210, 210]], crowd=[0])
    found = detections([[2, 2, 5, 5], [50, 50, 70, 70], [200, 200, 210, 210]], [0.9, 0.9, 0.8])
    assert score_one(truth, found).map == pytest.approx(1)


def test_annotated_areas_decide_the_size():
    found = detections([BIG], [1])
    assert math.isnan(score_one(objects([BIG]), found).numbers["APsmall"])
    assert score_one(objects([BIG]), found).numbers["APlarge"] == pytest.approx(1)
    assert score_one(objects([BIG], areas=[500]), found).numbers["APsmall"] == pytest.approx(1)


def test_a_false_detection_counts_for_its_own_size():
    score = score_one(objects([SQUARE, BIG]), detections([[200, 200, 300, 300], SQUARE, BIG], [0.9, 0.8, 0.7]))
    assert score.numbers["APsmall"] == pytest.approx(1)
    assert score.numbers["APlarge"] == pytest.approx(0.5)


def test_ap_of_a_class_takes_all_its_detections():
    score = score_one(objects([SQUARE, FAR]), detections([SQUARE, FAR], [0.9, 0.8]))
    assert score.numbers["AR1"] == pytest.approx(0.5)
    assert score.ap["thing"] == score.map == pytest.approx(1)


def test_equal_scores_stand_in_the_order_of_numeric_ids():
    truth = {"10": objects([SQUARE]), "9": objects([FAR])}
    found = {"10": detections([FAR], [0.5]), "9": detections([FAR], [0.5])}  # image 9 first: a hit, then a miss
    assert score_coco(truth, found, ["thing"]).map == pytest.approx(51 / 101)


def test_at_most_a_hundred_detections_a_image():
    boxes = [FAR] * 100 + [SQUARE]
    assert score_one(objects([SQUARE]), detections(boxes, np.linspace(1, 0.5, 101))).map == 0
    assert score_one(objects([SQUARE]), detections(boxes[1:], np.linspace(1, 0.5, 100))).map == pytest.approx(0.01)


def test_it_prints_nothing(capsys):
    score_one(objects([SQUARE]), detections([SQUARE], [1]))
    assert capsys.readouterr() == ("", "")


def test_detections_of_an_unknown_image():
    with pytest.raises(DataError, match="image b has detections but no ground truth"):
        score_coco({"a": objects([])}, {"b": detections([], [])}, ["thing"])


def test_result_as_json():
    score = score_one(objects([SQUARE]), detections([SQUARE], [1]))
    plain = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert plain["protocol"] == "coco"
    assert plain["classes"] == {"thing": {"ap": pytest.approx(1)}}
    assert plain["numbers"]["APlarge"] is None
    assert plain["convention"].startswith("101-point, IoU >= 0.50:0.05:0.95, at most 100")


def slow_coco_ap(truth, found, threshold):
    """AP of label 0 at one threshold without ignored objects: each detection takes the best object that is left."""
    ranked = sorted(
        ((-score, int(image), box)
         for image, one in found.items() for score, box in zip(one.scores.tolist(), one.boxes, strict=True)),
        key=lambda entry: entry[:2],
    )
    free = {int(image): one.boxes.tolist() for image, one in truth.items()}
    positives = sum(map(len, free.values()))
    trues, points = 0, []
    for rank, (_, image, box) in enumerate(ranked, start=1):
        best = max(free[image], key=partial(slow_iou, box), default=None)
        if best is not None and slow_iou(best, box) >= threshold - 1e-10:
            free[image].remove(best)
            trues += 1
        points.append((trues / positives, trues / rank))
    levels = np.linspace(0, 1, 101)
    return np.mean([max((p for r, p in points if r >= level), default=0.0) for level in levels])


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(seed):
    truth, found = random_samples(seed, images=20, classes=1)
    truth = {name: objects(one.boxes) for name, one in truth.items()}
    distinct = iter(np.random.default_rng(seed).permutation(1000) / 1000)
    found = {name: detections(one.boxes, [next(distinct) for _ in one.scores]) for name, one in found.items()}
    score = score_coco(truth, found, ["thing"])
    expected = [slow_coco_ap(truth, found, threshold) for threshold in np.linspace(0.5, 0.95, 10)]
    assert expected[0] > 0.1
    assert score.numbers["AP50"] == pytest.approx(expected[0], abs=1e-9)
    assert score.map == pytest.approx(np.mean(expected), abs=1e-9)
