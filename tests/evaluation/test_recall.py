"""Recall of proposals: the greedy cover against a loop over the whole matrix, ranges, limits, nothing to find."""

import json
import math
import weakref

import numpy as np
import pytest
from evaluation_samples import random_boxes, slow_iou

from altopt.evaluation.recall import AREA_RANGES, LIMITS, THRESHOLDS, cover, proposal_recall

NOTHING = np.empty((0, 4))


def slow_cover(overlaps):
    """Again and again the best pair of all; the object's row is searched first, as the reference's arg-max does."""
    overlaps = [list(row) for row in overlaps]
    covered = [0.0] * len(overlaps)
    for _ in overlaps:
        best = [max(row, default=-1) for row in overlaps]
        if max(best) <= 0:
            break
        row = best.index(max(best))
        column = overlaps[row].index(best[row])
        covered[row] = best[row]
        overlaps[row] = [-1.0] * len(overlaps[row])
        for other in overlaps:
            other[column] = -1.0
    return covered


def test_objects_with_wishes_of_their_own_get_them():
    assert cover(np.array([[0.2, 0.9, 0.1], [0.7, 0.3, 0.0]])).tolist() == [0.9, 0.7]


def test_a_wanted_proposal_goes_to_the_object_it_overlaps_more():
    assert cover(np.array([[0.6, 0.5], [0.8, 0.7]])).tolist() == [0.5, 0.8]
    assert cover(np.array([[0.6, 0.0], [0.8, 0.7]])).tolist() == [0.0, 0.8]


def test_a_displaced_object_displaces_the_next():
    overlaps = np.array([[0.9, 0.8, 0.0], [0.85, 0.83, 0.2], [0.0, 0.6, 0.1]])
    assert cover(overlaps).tolist() == [0.9, 0.83, 0.1]


def test_more_objects_than_proposals():
    assert cover(np.array([[0.5], [0.6], [0.7]])).tolist() == [0, 0, 0.7]


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 3)])
def test_cover_of_nothing(shape):
    assert cover(np.zeros(shape)).tolist() == [0] * shape[0]


@pytest.mark.parametrize("seed", range(6))
def test_cover_equals_the_loop(seed):
    random = np.random.default_rng(seed)
    shape = random.integers(1, 9, 2)
    coarse = random.integers(0, 6, (200, *shape)) / 5  # many ties
    for overlaps in [*coarse, *random.random((50, *shape))]:
        before = overlaps.copy()
        assert cover(overlaps).tolist() == slow_cover(overlaps)
        assert np.array_equal(overlaps, before)


@pytest.mark.parametrize("percent", range(50, 100, 5))
def test_every_threshold_may_be_met_exactly(percent):
    recall = proposal_recall([(np.array([[0, 0, 100, 100]]), np.array([[0, 0, 100, percent]]))])
    assert recall.at(50).tolist() == [float(percent >= threshold) for threshold in range(50, 100, 5)]
    assert recall.average(50) == pytest.approx((percent - 45) / 50)


def test_one_proposal_covers_one_object():
    twins = np.array([[0, 0, 100, 100], [0, 0, 100, 100]])
    assert proposal_recall([(twins, twins[:1])]).at(50).tolist() == [0.5] * 10
    assert proposal_recall([(twins, twins)]).at(50).tolist() == [1] * 10


def test_limits_take_the_first_proposals():
    boxes = np.array([[0, 0, 40, 40]])
    proposals = np.array([[200, 200, 240, 240]] * 60 + [[0, 0, 40, 40]])
    recall = proposal_recall([(boxes, proposals)])
    assert recall.limits == LIMITS
    assert [recall.average(limit) for limit in LIMITS] == [0, 1, 1, 1, 1]
    assert recall.proposals.tolist() == [50, 61, 61, 61, 61]
    assert proposal_recall([(boxes, proposals)], limits=(60, 61)).average(60) == 0


def test_objects_of_another_size_do_not_compete():
    boxes = np.array([[0, 0, 100, 95], [0, 0, 60, 90]])  # large and medium, both wish the one proposal
    recall = proposal_recall([(boxes, np.array([[0, 0, 90, 90]]))])
    assert recall.at(50, "all")[0] == 0.5
    assert recall.at(50, "medium")[0] == recall.at(50, "large")[0] == 1


def test_rivals_of_one_size_beside_objects_of_another():
    small, large = [500, 500, 510, 510], [0, 0, 100, 100]
    boxes = np.array([small, [0, 0, 100, 98], large])
    recall = proposal_recall([(boxes, np.array([large, [0, 0, 100, 60]]))])
    assert recall.at(50, "large").tolist() == [1, 1, 1] + [0.5] * 7  # the rival falls back to an IoU of 60 / 98


@pytest.mark.parametrize(("side", "names"), [
    (1, ["all", "small"]),
    (32, ["all", "small", "medium"]),
    (96, ["all", "medium", "large", "96-128"]),
    (128, ["all", "large", "96-128", "128-256"]),
    (200, ["all", "large", "128-256"]),
    (300, ["all", "large", "256-512"]),
    (512, ["all", "large", "256-512", "512-inf"]),
])
def test_area_ranges_include_both_ends(side, names):
    recall = proposal_recall([(np.array([[0, 0, side, side]]), NOTHING)])
    assert [name for name, count in zip(AREA_RANGES, recall.objects, strict=True) if count] == names


def test_images_without_proposals_lower_the_recall():
    box = np.array([[0, 0, 50, 50]])
    recall = proposal_recall([(box, box), (box, NOTHING), (NOTHING, box), (NOTHING, NOTHING)])
    assert recall.images == 4
    assert recall.at(300).tolist() == [0.5] * 10
    assert recall.as_dict()["limits"]["300"]["proposals_per_image"] == 0.5


@pytest.mark.parametrize("images", [[], [(NOTHING, NOTHING)]])
def test_nothing_to_find(images):
    recall = proposal_recall(images)
    assert math.isnan(recall.average(100))
    plain = json.loads(json.dumps(recall.as_dict(), allow_nan=False))
    assert plain["limits"]["100"]["areas"]["all"] == {"average_recall": None, "recall": [None] * 10}


def test_result_as_json():
    box = np.array([[0, 0, 50, 50]], np.float32)
    plain = json.loads(json.dumps(proposal_recall(iter([(box, box)])).as_dict(), allow_nan=False))
    assert plain["thresholds"] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert plain["objects"]["all"] == plain["objects"]["medium"] == 1
    assert list(plain["limits"]) == ["50", "100", "300", "1000", "2000"]
    assert plain["limits"]["50"]["areas"]["medium"] == {"average_recall": 1, "recall": [1] * 10}


def test_images_are_not_kept():
    given: list[weakref.ref] = []

    def images():
        for _ in range(5):
            boxes = np.array([[0.0, 0, 50, 50]])
            given.append(weakref.ref(boxes))
            yield boxes, boxes
            assert sum(one() is not None for one in given) <= 2

    assert proposal_recall(images()).images == len(given) == 5


def test_equals_the_loop_over_images():
    random = np.random.default_rng(5)
    images: list[tuple[np.ndarray, np.ndarray]] = [
        (np.array(random_boxes(random, int(random.integers(0, 8)), 150)).reshape(-1, 4),
         np.array(random_boxes(random, int(random.integers(0, 60)), 150)).reshape(-1, 4))
        for _ in range(30)
    ]
    recall = proposal_recall(images, limits=(5, 50))
    for limit in (5, 50):
        for name, (low, high) in AREA_RANGES.items():
            ious = []
            for boxes, proposals in images:
                own = [box for box in boxes if low <= (box[2] - box[0]) * (box[3] - box[1]) <= high]
                ious += slow_cover([[slow_iou(box, other) for other in proposals[:limit]] for box in own])
            expected = [np.mean([iou >= threshold for iou in ious]) if ious else math.nan for threshold in THRESHOLDS]
            assert np.allclose(recall.at(limit, name), expected, rtol=0, atol=1e-12, equal_nan=True)
    assert 0 < recall.average(5) < recall.average(50) < 1
