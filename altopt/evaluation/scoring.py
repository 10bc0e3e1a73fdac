"""One door to the scorers: detections and ground truth in, a score that states its convention out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, Unpack, get_args

from altopt.datasets.dataset import Objects
from altopt.errors import UsageError
from altopt.evaluation.coco import CocoScore, score_coco
from altopt.evaluation.detections import Detections, read_detections
from altopt.evaluation.ground_truth import read_ground_truth
from altopt.evaluation.voc import VocRules, VocScore, score_voc

Protocol = Literal["voc07", "voc10", "coco"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Score = VocScore | CocoScore  # both have .map, .ap by class, .convention and .as_dict()


class VocOptions(TypedDict, total=False):
    """What varies the VOC rules, as in ``VocRules``."""

    iou: float
    strict: bool
    plus_one: bool
    devkit_rounding: bool


def score(protocol: Protocol, ground_truth: Mapping[str, Objects], detections: Mapping[str, Detections],
          classes: Sequence[str], **options: Unpack[VocOptions]) -> Score:
    """Score detections, both mappings keyed by image id.

    Raises UsageError for an unknown protocol, an IoU outside (0, 1] and VOC options with COCO, DataError for
    detections of an image that the ground truth does not have.
    """
    if protocol == "coco":
        if VocRules(**options) != VocRules():
            raise UsageError("IoU threshold, matching rule, +1 and devkit rounding belong to voc07 and voc10: leave "
                             "them out for coco, which fixes its own")
        return score_coco(ground_truth, detections, classes)
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    rules = VocRules(protocol, **options)
    if not 0 < rules.iou <= 1:
        raise UsageError(f"an IoU threshold must be above 0 and at most 1 (it is {rules.iou:g})")
    return score_voc(ground_truth, detections, classes, rules)


def score_files(protocol: Protocol, ground_truth: Path, detections: Path, **options: Unpack[VocOptions]) -> Score:
    """Score a COCO results json against a COCO ground truth json, by any protocol; options as in ``score``."""
    truth = read_ground_truth(ground_truth)
    found = read_detections(detections, truth.objects, truth.category_ids)
    return score(protocol, truth.objects, found, truth.classes, **options)
