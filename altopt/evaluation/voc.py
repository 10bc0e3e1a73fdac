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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from altopt.evaluation.average_precision import area_under_envelope, eleven_points
from altopt.evaluation.detections import Detections, check_images
from altopt.evaluation.ground_truth import Annotated, counted
from altopt.evaluation.iou import Boxes, box_iou
from altopt.evaluation.undefined import ScoreDict, mean_of_defined, or_none, ratio

Floats = npt.NDArray[np.float64]
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

    def in_words(self) -> str:
        """The convention, to be printed beside the score."""
        words = ["11-point" if self.protocol == "voc07" else "area under the envelope"]
        words.append(f"IoU {'>' if self.strict else '>='} {self.iou:g}")
        words.append("difficult ignored")
        if self.plus_one:
            words.append("inclusive pixels (+1)")
        if self.devkit_rounding:
            words.append("scores rounded to 3 decimals and coordinates to 1")
        return ", ".join(words)


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
        """The rules in words."""
        return self.rules.in_words()

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


def score_voc(
    ground_truth: Mapping[str, Annotated],
    detections: Mapping[str, Detections],
    classes: Sequence[str],
    rules: VocRules = VocRules(),
) -> VocScore:
    """Precision, recall and AP of every class; both mappings are keyed by image id.

    An image without an entry in ``detections`` has none. Raises DataError for detections of an unknown image.
    """
    check_images(ground_truth, detections)
    found = {image_id: _prepared(one, rules) for image_id, one in detections.items()}
    table = _match(ground_truth, found, rules)
    return VocScore(rules, {name: _class_score(table, label, rules) for label, name in enumerate(classes)})


@dataclass(frozen=True, eq=False)
class _Matches:
    """A data set's objects [N] and detections [D]; ``targets`` is the object each is given to, -1 for none."""

    object_labels: npt.NDArray[np.int64]
    object_counts: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    scores: Floats
    targets: npt.NDArray[np.int64]


def _match(
    ground_truth: Mapping[str, Annotated], detections: Mapping[str, Detections], rules: VocRules
) -> _Matches:
    empty = Detections(np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
    objects = list(ground_truth.values())
    found = [detections.get(image_id, empty) for image_id in ground_truth]
    firsts = np.cumsum([0] + [len(one.labels) for one in objects])[:-1]
    targets = [_targets(*pair, rules) for pair in zip(objects, found, strict=True)]
    shifted = [np.where(one < 0, -1, one + first) for one, first in zip(targets, firsts, strict=True)]
    return _Matches(
        object_labels=_joined([one.labels for one in objects], np.int64),
        object_counts=_joined([counted(one) for one in objects], np.bool_),
        labels=_joined([one.labels for one in found], np.int64),
        scores=_joined([one.scores for one in found], np.float64),
        targets=_joined(shifted, np.int64),
    )


def _targets(objects: Annotated, detections: Detections, rules: VocRules) -> npt.NDArray[np.int64]:
    """int64 [D]: the object of its class that each detection overlaps most, -1 below the threshold."""
    if not len(objects.labels) or not len(detections):
        return np.full(len(detections), -1)
    overlaps = box_iou(detections.boxes, _in_frame(objects.boxes, rules), plus_one=_inclusive(rules))  # (D, N)
    overlaps[detections.labels[:, None] != objects.labels[None, :]] = -1.0
    best = overlaps.max(axis=1)
    passed = best > rules.iou if rules.strict else best >= rules.iou
    return np.where(passed, overlaps.argmax(axis=1), -1)


def _class_score(table: _Matches, label: int, rules: VocRules) -> ClassScore:
    own = np.flatnonzero(table.labels == label)
    order = own[np.argsort(-table.scores[own], kind="stable")]
    true, false = _outcomes(table.targets[order], table.object_counts)
    positives = int(np.sum(table.object_counts[table.object_labels == label]))
    trues, falses = np.cumsum(true, dtype=np.int64), np.cumsum(false, dtype=np.int64)
    precision, recall = ratio(trues, trues + falses), ratio(trues, positives)
    if not positives:
        ap = math.nan
    elif rules.protocol == "voc07":
        ap = eleven_points(precision, trues, positives)
    else:
        ap = area_under_envelope(precision, recall)
    ignored = len(order) - int(true.sum()) - int(false.sum())
    return ClassScore(
        ap, positives, int(true.sum()), int(false.sum()), ignored, table.scores[order], precision, recall
    )


def _outcomes(
    targets: npt.NDArray[np.int64], counts: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether each detection, by descending score, is a true and a false positive; neither when it is ignored."""
    first = np.zeros(len(targets), bool)
    first[np.unique(targets, return_index=True)[1]] = True
    given = targets >= 0
    target_counts = np.zeros(len(targets), bool)
    target_counts[given] = counts[targets[given]]
    true = target_counts & first
    return true, ~given | (target_counts & ~first)


def _prepared(detections: Detections, rules: VocRules) -> Detections:
    """The detections as they are scored: in the rules' frame and rounded if the rules round."""
    if not rules.devkit_rounding:
        return detections
    boxes = _rounded(_in_frame(detections.boxes, rules), 1)
    return Detections(boxes, _rounded(detections.scores, 3), detections.labels)


def _in_frame(boxes: Boxes, rules: VocRules) -> Boxes:
    """Boxes in the frame of the devkit's files, where x1 and y1 are one more, when the rules round in that frame."""
    if rules.devkit_rounding and not rules.plus_one:
        return np.asarray(boxes + np.array([1.0, 1.0, 0.0, 0.0]))
    return boxes


def _inclusive(rules: VocRules) -> bool:
    return rules.plus_one or rules.devkit_rounding


def _rounded(values: npt.NDArray[np.floating], decimals: int) -> Floats:
    """Rounded as printing does it: np.round scales first and so rounds 0.15 up, which prints as 0.1."""
    printed = [float(f"{value:.{decimals}f}") for value in values.ravel().tolist()]
    return np.array(printed, dtype=np.float64).reshape(values.shape)


def _joined(parts: Sequence[npt.NDArray[np.generic]], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """All parts in one array, an empty one when there are none."""
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)
