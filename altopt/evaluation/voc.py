"""Scoring by the rules of the PASCAL VOC devkit.

Each detection, by descending score, is given to the object of its class that it overlaps most. It is a true positive
when the IoU passes the threshold and the object has no detection yet, ignored when that object is difficult (or a
crowd), and a false positive otherwise, even where it also overlaps another object. Detections of equal score keep
their order: images as in the ground truth, and within an image as given.

A class without any object to find has AP NaN and is left out of the mean. The devkit leaves this open: its 11-point
sum gives 0 there, its area NaN.

Letters: N objects, D detections.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from altopt.datasets.dataset import Objects
from altopt.evaluation.detections import Detections, check_images
from altopt.evaluation.measures import Boxes, Floats, ScoreDict, box_iou, mean_of_defined, or_none, ratio

Ints = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class VocRules:
    """What differs between the programs that score VOC; the defaults are the devkit's of 2007.

    ``strict``: the IoU must exceed the threshold, else it may equal it. ``plus_one``: x2 and y2 of all boxes name the
    last pixel (``box_iou``). ``devkit_rounding``: detections pass through the text file of py-faster-rcnn, scores with
    3 decimals and 1-based inclusive coordinates with 1 decimal, which ties scores and moves IoUs.
    """

    protocol: Literal["voc07", "voc10"] = "voc07"
    iou: float = 0.5
    strict: bool = True
    plus_one: bool = False
    devkit_rounding: bool = False


@dataclass(frozen=True, eq=False)
class ClassScore:
    """One class: its AP (NaN without positives), counts, and curves float64 [D] by descending score."""

    ap: float
    positives: int
    true_positives: int
    false_positives: int
    ignored: int
    scores: Floats
    precision: Floats
    recall: Floats


@dataclass(frozen=True, eq=False)
class VocScore:
    """The score of every class under ``rules``."""

    rules: VocRules
    classes: dict[str, ClassScore]

    @property
    def convention(self) -> str:
        """The rules in words, to be printed beside the score."""
        rules = self.rules
        words = ["11-point" if rules.protocol == "voc07" else "area under the envelope",
                 f"IoU {'>' if rules.strict else '>='} {rules.iou:g}", "difficult ignored"]
        if rules.plus_one:
            words.append("inclusive pixels (+1)")
        if rules.devkit_rounding:
            words.append("scores rounded to 3 decimals and coordinates to 1")
        return ", ".join(words)

    @property
    def ap(self) -> dict[str, float]:
        """AP of each class; NaN for a class without objects to find."""
        return {name: score.ap for name, score in self.classes.items()}

    @property
    def map(self) -> float:
        """Mean AP over the classes that have one; NaN when none has."""
        return mean_of_defined(self.ap.values())

    def as_dict(self) -> ScoreDict:
        """JSON-able; NaN is None."""
        return {
            "protocol": self.rules.protocol,
            "convention": self.convention,
            "map": or_none(self.map),
            "classes": {name: {
                "ap": or_none(each.ap), "positives": each.positives, "true_positives": each.true_positives,
                "false_positives": each.false_positives, "ignored": each.ignored,
            } for name, each in self.classes.items()},
        }


def score_voc(ground_truth: Mapping[str, Objects], detections: Mapping[str, Detections], classes: Sequence[str],
              rules: VocRules = VocRules()) -> VocScore:
    """Precision, recall and AP of every class; both mappings are keyed by image id.

    An image without an entry in ``detections`` has none. Raises DataError for detections of an unknown image.
    """
    check_images(ground_truth, detections)
    nothing = Detections(np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
    objects = list(ground_truth.values())
    found = [_as_scored(detections.get(image_id, nothing), rules) for image_id in ground_truth]
    firsts = np.cumsum([0, *map(len, objects)])[:-1]  # (images,): number of each image's first object in the data set
    targets = [_targets(*each, rules) for each in zip(objects, found, firsts, strict=True)]
    counted = _joined([one.counted for one in objects], np.bool_)  # (N,)
    object_labels = _joined([one.labels for one in objects], np.int64)  # (N,)
    scores = _joined([one.scores for one in found], np.float64)  # (D,) of all classes, as the next two
    labels = _joined([one.labels for one in found], np.int64)
    target = _joined(targets, np.int64)
    return VocScore(rules, {
        name: _class_score(scores[labels == label], target[labels == label], counted,
                           int(counted[object_labels == label].sum()), rules.protocol)
        for label, name in enumerate(classes)})


def comp4_lines(detections: Mapping[str, Detections], label: int) -> Iterator[str]:
    """Yield the lines of the devkit's results file of a class: image, score, and 1-based inclusive corners, as "%f"."""
    for image_id, found in detections.items():
        for (x1, y1, x2, y2), score in zip(found.boxes[found.labels == label], found.scores[found.labels == label],
                                           strict=True):
            yield f"{image_id} {score:f} {x1 + 1:f} {y1 + 1:f} {x2:f} {y2:f}\n"


def _targets(objects: Objects, detections: Detections, first: int, rules: VocRules) -> Ints:
    """int64 [D]: the object of its class that each detection overlaps most, counted from first; -1 below threshold."""
    if not len(objects) or not len(detections):
        return np.full(len(detections), -1)
    inclusive = rules.plus_one or rules.devkit_rounding
    overlaps = box_iou(detections.boxes, _in_frame(objects.boxes, rules), plus_one=inclusive)  # (D, N)
    overlaps[detections.labels[:, None] != objects.labels[None, :]] = -1.0
    best = overlaps.max(axis=1)  # (D,)
    passed = best > rules.iou if rules.strict else best >= rules.iou
    return np.where(passed, overlaps.argmax(axis=1) + first, -1)


def _class_score(scores: Floats, targets: Ints, counted: npt.NDArray[np.bool_], positives: int,
                 protocol: str) -> ClassScore:
    order = np.argsort(-scores, kind="stable")  # (D,) of this class
    scores, targets = scores[order], targets[order]
    first = np.zeros(len(targets), bool)
    first[np.unique(targets, return_index=True)[1]] = True  # of all detections of an object, the best
    # -1 indexes the False at the end: a detection that is given to no object finds none that counts.
    hits = np.append(counted, False)[targets]  # (D,)
    true, false = hits & first, (targets < 0) | (hits & ~first)  # what is neither is ignored
    trues, falses = np.cumsum(true, dtype=np.int64), np.cumsum(false, dtype=np.int64)  # (D,)
    precision, recall = ratio(trues, trues + falses), ratio(trues, positives)
    if not positives:
        ap = math.nan
    elif protocol == "voc07":
        ap = eleven_points(precision, trues, positives)
    else:
        ap = area_under_envelope(precision, recall)
    ignored = int(np.sum(~true & ~false))
    return ClassScore(ap, positives, int(true.sum()), int(false.sum()), ignored, scores, precision, recall)


def eleven_points(precision: Floats, true_positives: npt.NDArray[np.integer], positives: int) -> float:
    """Mean over the recall levels 0, 0.1, ..., 1 of the best precision [D] at that recall or more (VOC 2007).

    A precision of NaN (nothing but ignored detections so far) counts as 0, here and in ``area_under_envelope``.
    """
    precision = np.nan_to_num(precision)
    # In whole numbers: as floats, 0.1 * 3 lies above 0.3, and a recall of exactly 0.3 would miss its level.
    reached = (precision[10 * true_positives >= level * positives] for level in range(11))
    return float(np.mean([values.max(initial=0.0) for values in reached]))


def area_under_envelope(precision: Floats, recall: Floats) -> float:
    """Area under precision [D] made non-increasing in recall [D], which never decreases (VOC 2010 and later)."""
    envelope = np.maximum.accumulate(np.nan_to_num(precision)[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _as_scored(detections: Detections, rules: VocRules) -> Detections:
    """The detections in the rules' frame, and rounded if the rules round."""
    if not rules.devkit_rounding:
        return detections
    boxes = _rounded(_in_frame(detections.boxes, rules), 1)
    return Detections(boxes, _rounded(detections.scores, 3), detections.labels)


def _in_frame(boxes: Boxes, rules: VocRules) -> Boxes:
    """Boxes in the frame of the devkit's files, where x1 and y1 are one more, when the rules round in that frame."""
    if rules.devkit_rounding and not rules.plus_one:
        return np.asarray(boxes + np.array([1.0, 1.0, 0.0, 0.0]))
    return boxes


def _rounded(values: npt.NDArray[np.floating], decimals: int) -> Floats:
    # As the devkit's files are printed: np.round scales first and so rounds 0.15 up, which prints as 0.1.
    printed = [float(f"{value:.{decimals}f}") for value in values.ravel().tolist()]
    return np.array(printed, dtype=np.float64).reshape(values.shape)


def _joined(parts: Sequence[npt.NDArray[np.generic]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)  # numpy joins at least one array
