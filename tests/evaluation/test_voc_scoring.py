"""VOC scoring: each rule by a small example, then everything against a loop that reads like the devkit."""

import json
import math

import numpy as np
import pytest
from evaluation_samples import detections, objects, random_samples, slow_iou

from altopt.errors import DataError
from altopt.evaluation.detections import Detections
from altopt.evaluation.voc import VocRules, VocScore, area_under_envelope, eleven_points, score_voc

SQUARE = [0, 0, 10, 10]
HALF = [0, 0, 10, 5]  # IoU with SQUARE is exactly 0.5
FAR = [50, 50, 60, 60]


def score_one(truth, found, **rules):
    return score_voc({"a": truth}, {"a": found}, ["thing"], VocRules(**rules)).classes["thing"]


def outcome(score):
    return score.true_positives, score.false_positives, score.ignored


def test_a_hit_and_a_miss():
    score = score_one(objects([SQUARE, FAR]), detections([[20, 20, 30, 30], SQUARE], [0.9, 0.8]))
    assert (score.positives, *outcome(score)) == (2, 1, 1, 0)
    assert score.scores.tolist() == pytest.approx([0.9, 0.8])
    assert score.precision.tolist() == [0, 0.5]
    assert score.recall.tolist() == [0, 0.5]
    assert score.ap == pytest.approx(6 * 0.5 / 11)
    assert score_one(objects([SQUARE, FAR]), detections([SQUARE], [1]), protocol="voc10").ap == 0.5


def test_iou_must_exceed_the_threshold_unless_told():
    assert outcome(score_one(objects([SQUARE]), detections([HALF], [1]))) == (0, 1, 0)
    assert outcome(score_one(objects([SQUARE]), detections([HALF], [1]), strict=False)) == (1, 0, 0)
    assert outcome(score_one(objects([SQUARE]), detections([HALF], [1]), iou=0.499)) == (1, 0, 0)


def test_second_detection_of_an_object_is_false_even_if_it_overlaps_another():
    neighbours = objects([[0, 0, 10, 10], [1, 0, 11, 10]])
    both = detections([[0, 0, 10, 10], [0.25, 0, 10.25, 10]], [0.9, 0.8])  # the second also overlaps the free one
    assert slow_iou([0.25, 0, 10.25, 10], [1, 0, 11, 10]) > 0.5
    assert outcome(score_one(neighbours, both)) == (1, 1, 0)


def test_the_higher_score_takes_the_object():
    score = score_one(objects([SQUARE]), detections([[0, 0, 10, 9], SQUARE], [0.9, 0.8]))
    assert score.precision.tolist() == [1, 0.5]


def test_difficult_objects_are_neither_asked_for_nor_punished():
    truth = objects([SQUARE, FAR], difficult=[0])
    score = score_one(truth, detections([SQUARE, SQUARE, FAR], [0.9, 0.8, 0.7]))
    assert (score.positives, *outcome(score)) == (1, 1, 0, 2)
    assert score.ap == pytest.approx(1)
    assert np.isnan(score.precision[:2]).all()
    assert score.precision[2] == 1


def test_a_detection_closest_to_a_difficult_object_is_ignored_though_another_is_free():
    truth = objects([[0, 0, 10, 10], [1, 0, 11, 10]], difficult=[0])
    assert outcome(score_one(truth, detections([SQUARE], [1]))) == (0, 0, 1)


def test_crowds_count_as_difficult():
    score = score_one(objects([SQUARE, FAR], crowd=[0]), detections([SQUARE], [1]))
    assert (score.positives, *outcome(score)) == (1, 0, 0, 1)


def test_classes_do_not_mix():
    truth, found = objects([SQUARE, FAR], labels=[0, 1]), detections([SQUARE, FAR], [1, 1], labels=[1, 1])
    score = score_voc({"a": truth}, {"a": found}, ["cat", "dog"])
    assert [outcome(one) for one in score.classes.values()] == [(0, 0, 0), (1, 1, 0)]


def test_a_class_without_objects_has_no_ap_and_leaves_the_mean_alone():
    truth, found = objects([SQUARE, FAR], labels=[0, 2], difficult=[1]), detections([SQUARE, FAR], [1, 1], [0, 2])
    score = score_voc({"a": truth}, {"a": found}, ["cat", "dog", "only difficult"])
    assert score.ap["cat"] == pytest.approx(1)
    assert math.isnan(score.ap["dog"])
    assert math.isnan(score.ap["only difficult"])
    assert score.map == score.ap["cat"]
    assert score.as_dict()["classes"]["dog"]["ap"] is None


def test_objects_without_detections_score_nought():
    score = score_one(objects([SQUARE]), detections([], []))
    assert (score.ap, score.positives, len(score.precision)) == (0, 1, 0)
    assert score_voc({"a": objects([SQUARE])}, {}, ["thing"]).map == 0


def test_images_without_objects_still_hold_false_positives():
    truth = {"a": objects([SQUARE]), "empty": objects([])}
    found = {"empty": detections([SQUARE], [0.9]), "a": detections([SQUARE], [0.8])}
    assert score_voc(truth, found, ["thing"]).classes["thing"].precision.tolist() == [0, 0.5]


@pytest.mark.parametrize("truth", [{}, {"a": objects([])}])
def test_no_objects_at_all(truth):
    score = score_voc(truth, {}, ["cat", "dog"])
    assert math.isnan(score.map)
    assert json.loads(json.dumps(score.as_dict(), allow_nan=False))["map"] is None


def test_detections_of_an_unknown_image():
    with pytest.raises(DataError, match="image b has detections but no ground truth"):
        score_voc({"a": objects([])}, {"b": detections([], [])}, ["thing"])


def test_equal_scores_keep_the_order_of_images_and_detections():
    truth = {name: objects([SQUARE]) for name in "ab"}
    found = {"b": detections([SQUARE], [0.5]), "a": detections([FAR, SQUARE], [0.5, 0.5])}
    assert score_voc(truth, found, ["thing"]).classes["thing"].recall.tolist() == [0, 0.5, 1]


def test_inclusive_pixels():
    one_pixel = [7, 7, 7, 7]
    truth, found = objects([one_pixel]), detections([one_pixel], [1])
    assert outcome(score_one(truth, found)) == (0, 1, 0)
    assert outcome(score_one(truth, found, plus_one=True)) == (1, 0, 0)
    assert outcome(score_one(truth, found, plus_one=True, devkit_rounding=True)) == (1, 0, 0)


def test_a_voc_pixel_is_found_in_continuous_coordinates():
    truth, found = objects([[6, 6, 7, 7]]), detections([[6, 6, 7, 7]], [1])  # xmin = xmax = 7 in the annotation
    for rules in ({}, {"devkit_rounding": True}):
        assert outcome(score_one(truth, found, **rules)) == (1, 0, 0)


def test_rounding_ties_scores_and_so_reorders():
    found = detections([FAR, SQUARE], [0.80012, 0.80034])
    assert score_one(objects([SQUARE]), found).precision.tolist() == [1, 0.5]
    rounded = score_one(objects([SQUARE]), found, devkit_rounding=True)
    assert rounded.scores.tolist() == [0.8, 0.8]
    assert rounded.precision.tolist() == [0, 0.5]


def test_rounding_moves_boxes_over_the_threshold():
    found = detections([[0, 0, 10, 5.04]], [1])  # IoU 0.504 before, 0.5 after
    assert outcome(score_one(objects([SQUARE]), found)) == (1, 0, 0)
    assert outcome(score_one(objects([SQUARE]), found, devkit_rounding=True)) == (0, 1, 0)
    assert outcome(score_one(objects([[0, 0, 9, 9]]), detections([[0, 0, 9, 4.04]], [1]), plus_one=True)) == (1, 0, 0)
    both = {"plus_one": True, "devkit_rounding": True}
    assert outcome(score_one(objects([[0, 0, 9, 9]]), detections([[0, 0, 9, 4.04]], [1]), **both)) == (0, 1, 0)


@pytest.mark.parametrize("score", [0.0005, 0.0015, 0.1235, 0.4565, 0.9995])
def test_rounding_is_that_of_a_printed_number(score):
    found = Detections(np.array([SQUARE], np.float64), np.array([score]), np.array([0]))
    assert score_one(objects([SQUARE]), found, devkit_rounding=True).scores.tolist() == [float(f"{score:.3f}")]


def test_result_states_its_convention():
    assert VocScore(VocRules(), {}).convention == "11-point, IoU > 0.5, difficult ignored"
    rules = VocRules("voc10", 0.7, strict=False, plus_one=True, devkit_rounding=True)
    assert VocScore(rules, {}).convention == (
        "area under the envelope, IoU >= 0.7, difficult ignored, inclusive pixels (+1), "
        "scores rounded to 3 decimals and coordinates to 1")


def test_result_as_json():
    score = score_voc({"a": objects([SQUARE])}, {"a": detections([SQUARE], [0.5])}, ["cat", "dog"])
    assert json.loads(json.dumps(score.as_dict(), allow_nan=False)) == {
        "protocol": "voc07",
        "convention": "11-point, IoU > 0.5, difficult ignored",
        "map": 1,
        "classes": {
            "cat": {"ap": 1, "positives": 1, "true_positives": 1, "false_positives": 0, "ignored": 0},
            "dog": {"ap": None, "positives": 0, "true_positives": 0, "false_positives": 0, "ignored": 0},
        },
    }
    cat = score.classes["cat"]
    assert (cat.scores.tolist(), cat.precision.tolist(), cat.recall.tolist()) == ([0.5], [1], [1])


def test_images_and_classes_together():
    """Cat: hit at rank 2 of 3. Dog: nothing anywhere. Bird: one miss, one hit. Fish: only difficult, found twice."""
    truth = {
        "a": objects([SQUARE, FAR], labels=[0, 0]),
        "b": objects([SQUARE, FAR], labels=[2, 3], difficult=[1]),
    }
    found = {
        "a": detections([[20, 20, 30, 30], SQUARE], [1, 0.9]),
        "b": detections([HALF, FAR, SQUARE, FAR, FAR], [0.7, 0.8, 0.6, 0.5, 0.4], labels=[0, 2, 2, 3, 3]),
    }
    score = score_voc(truth, found, ["cat", "dog", "bird", "fish"], VocRules("voc10"))
    assert score.map == pytest.approx((1 / 4 + 1 / 2) / 2)
    classes = score.as_dict()["classes"]
    assert [classes[name]["ap"] for name in classes] == [0.25, None, 0.5, None]
    nothing = [math.nan, math.nan]
    for each, precision in zip(score.classes.values(), ([0, 1 / 2, 1 / 3], [], [0, 1 / 2], nothing), strict=True):
        assert each.precision == pytest.approx(precision, nan_ok=True)
    for each, recall in zip(score.classes.values(), ([0, 1 / 2, 1 / 2], [], [0, 1], nothing), strict=True):
        assert each.recall == pytest.approx(recall, nan_ok=True)


def devkit(truth, found, label, rules):
    """One class by the letter of the devkit: AP, and hits in order (None where ignored)."""
    ranked = [
        (score, image, box)
        for image in truth
        for score, own, box in zip(
            found[image].scores.tolist(), found[image].labels.tolist(), found[image].boxes.tolist(), strict=True
        )
        if own == label
    ]
    ranked.sort(key=lambda entry: -entry[0])
    taken, hits = set(), []
    for _, image, box in ranked:
        own = np.flatnonzero(truth[image].labels == label)
        ious = [slow_iou(truth[image].boxes[index], box, float(rules.plus_one)) for index in own]
        best = int(np.argmax(ious)) if ious else None
        if best is None or not (ious[best] > rules.iou if rules.strict else ious[best] >= rules.iou):
            hits.append(0)
        elif truth[image].difficult[own[best]]:
            hits.append(None)
        else:
            hits.append(int((image, best) not in taken))
            taken.add((image, best))
    positives = sum(int(((one.labels == label) & ~one.difficult).sum()) for one in truth.values())
    return hits, positives


def slow_ap(hits, positives, protocol):
    trues = falses = 0
    points = []
    for hit in hits:
        trues, falses = trues + (hit == 1), falses + (hit == 0)
        points.append((trues, trues / max(trues + falses, 1)))
    def best(at_least):
        return max((precision for count, precision in points if count >= at_least), default=0.0)
    if protocol == "voc07":
        return sum(best(level * positives / 10 - 1e-9) for level in range(11)) / 11
    return sum(best(count) for count in range(1, positives + 1)) / positives


@pytest.mark.parametrize("rules", [
    VocRules(), VocRules("voc10"), VocRules("voc10", 0.4, strict=False), VocRules(iou=0.3, plus_one=True),
])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_devkit_in_loops(rules, seed):
    truth, found = random_samples(seed, images=25, classes=2)
    score = score_voc(truth, found, ["cat", "dog"], rules)
    for label, one in enumerate(score.classes.values()):
        hits, positives = devkit(truth, found, label, rules)
        assert positives > 3
        assert (one.positives, *outcome(one)) == (positives, hits.count(1), hits.count(0), hits.count(None))
        assert hits.count(1) > 1
        assert one.ap == pytest.approx(slow_ap(hits, positives, rules.protocol), abs=1e-12)


def test_a_class_scores_the_same_alone():
    truth, found = random_samples(9, images=20, classes=3)
    together = score_voc(truth, found, ["a", "b", "c"]).ap
    assert score_voc(truth, found, ["a"]).ap["a"] == together["a"]


def test_only_the_order_of_scores_matters():
    truth, found = random_samples(3, images=20, classes=1)
    squared = {name: detections(one.boxes, one.scores.astype(float) ** 3) for name, one in found.items()}
    assert score_voc(truth, squared, ["a"]).map == score_voc(truth, found, ["a"]).map


def curves(hits, positives):
    trues = np.cumsum(hits)
    return trues / np.arange(1, len(hits) + 1), trues, trues / positives


def test_eleven_points_by_hand():
    precision, trues, _ = curves([0, 1, 0], 2)  # recall 0.5 at precision 1/2: levels 0 to 0.5 have it
    assert eleven_points(precision, trues, 2) == pytest.approx(6 * 0.5 / 11)


def test_area_by_hand():
    precision, _, recall = curves([0, 1, 0], 2)
    assert area_under_envelope(precision, recall) == 0.25


def test_envelope_looks_ahead():
    precision, trues, recall = curves([1, 0, 0, 1, 1, 1], 4)  # 1, 1/2, 1/3, 2/4, 3/5, 4/6
    assert area_under_envelope(precision, recall) == pytest.approx(1 / 4 + 3 / 4 * 4 / 6)
    assert eleven_points(precision, trues, 4) == pytest.approx((3 * 1 + 8 * 4 / 6) / 11)  # levels 0, 0.1, 0.2 | 0.3 on


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_recall_that_equals_a_level_reaches_it(tenths):
    precision, trues, _ = curves([1] * tenths, 10)
    assert eleven_points(precision, trues, 10) == pytest.approx((tenths + 1) / 11)


def test_levels_written_with_arange_would_miss_three_tenths():
    assert (np.arange(0, 1.1, 0.1) <= 3 / 10).sum() == 3
    precision, trues, _ = curves([1, 1, 1], 10)
    assert eleven_points(precision, trues, 10) == pytest.approx(4 / 11)


def test_undefined_precision_counts_as_none():
    precision, trues, recall = np.array([math.nan, 1.0]), np.array([0, 1]), np.array([0.0, 1.0])
    assert area_under_envelope(precision, recall) == 1
    assert eleven_points(precision, trues, 1) == 1


def test_no_detections():
    nothing = np.empty(0)
    assert area_under_envelope(nothing, nothing) == 0
    assert eleven_points(nothing, np.empty(0, np.int64), 5) == 0


def test_a_perfect_ranking_scores_one():
    precision, trues, recall = curves([1] * 7 + [0] * 5, 7)
    assert eleven_points(precision, trues, 7) == pytest.approx(1)
    assert area_under_envelope(precision, recall) == pytest.approx(1)
