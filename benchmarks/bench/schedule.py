"""What follows from the figures: ratios between contenders, and the cost of the paper's whole schedule."""

from collections.abc import Sequence
from typing import Any

from stages.steps.fast_rcnn import TrainFastRCNN
from stages.steps.joint import TrainApproximateJoint
from stages.steps.rpn import TrainRPN

IMAGES = 5011  # VOC 2007 trainval; proposals are made of upright images only
ENTRIES = 2 * IMAGES  # with mirror images
RPN_STEPS, FAST_RCNN_STEPS = TrainRPN.iterations, TrainFastRCNN.iterations  # py-faster-rcnn: 80,000 and 40,000
JOINT_STEPS = TrainApproximateJoint.iterations  # py-faster-rcnn: 70,000
ITER_SIZE = 2  # images whose gradients py-faster-rcnn's end2end solver for VGG16 adds up before a step

Rows = Sequence[dict[str, Any]]


class Figures:
    """Seconds of a step by contender, from the rows of one network, size and device."""

    def __init__(self, rows: Rows, clock: str) -> None:
        self.rows, self.clock = rows, clock

    def of(self, name: str, precision: str, *, store: bool = False, compiled: bool = False) -> float | None:
        """Return the seconds of a step; None if it was not measured."""
        row = self._row(name, precision, store, compiled)
        return None if row is None else row[self.clock]

    def of_several(self, images: int, name: str, precision: str) -> float | None:
        """Return the seconds of a step that adds up the gradients of so many images, and updates weights once."""
        row = self._row(name, precision, store=False, compiled=False)
        return None if row is None else images * row[self.clock] - (images - 1) * row["parts"]["optimizer"]

    def _row(self, name: str, precision: str, store: bool, compiled: bool) -> dict[str, Any] | None:
        for row in self.rows:
            if (row["name"], row["precision"], row["store"], row["compiled"]) == (name, precision, store, compiled):
                return row
        return None

    def map_seconds(self, precision: str) -> float | None:
        """Return the seconds that one map of the store costs."""
        row = self._row("feature_store", precision, store=False, compiled=False)
        return None if row is None else row[self.clock] / row["images"]


def ratios(figures: Figures, precision: str) -> dict[str, float | None]:
    """Return how many times as fast altopt is: with the store as without, and as torchvision in either form."""
    rpn, stored_rpn = _pair(figures, "train_rpn_frozen_conv", precision)
    detector, stored_detector = _pair(figures, "train_fast_rcnn_frozen_conv", precision)
    building = _times(ENTRIES, figures.map_seconds(precision))
    joint = figures.of("train_approximate_joint", precision)
    detect = figures.of("detect", precision)
    plain = _sum(_times(RPN_STEPS, rpn), _times(FAST_RCNN_STEPS, detector))
    stored = _sum(_times(RPN_STEPS, stored_rpn), _times(FAST_RCNN_STEPS, stored_detector), building)
    found = {
        "store_rpn_step": _ratio(rpn, stored_rpn),
        "store_fast_rcnn_step": _ratio(detector, stored_detector),
        "store_rpn_stage_with_building": _ratio(_times(RPN_STEPS, rpn), _sum(_times(RPN_STEPS, stored_rpn), building)),
        "store_both_stages_with_building": _ratio(plain, stored),
        "compiled_joint_step": _ratio(joint, figures.of("train_approximate_joint", precision, compiled=True)),
    }
    for form, other in (("default", "float32"), ("autocast", "bfloat16")):
        found[f"torchvision_{form}_joint_step"] = _ratio(figures.of("torchvision_training", other), joint)
        found[f"torchvision_{form}_detection"] = _ratio(figures.of("torchvision_detection", other), detect)
    return found


def schedule(figures: Figures, precision: str) -> dict[str, Any]:
    """Return the predicted seconds of py-faster-rcnn's whole schedule: each stage, alternating, approximate joint."""
    def stage(count: int, name: str, store: bool = False) -> float | None:
        return _times(count, figures.of(name, precision, store=store))

    stages = {
        "M1": stage(RPN_STEPS, "train_rpn"), "P1": stage(IMAGES, "generate_proposals"),
        "M2": stage(FAST_RCNN_STEPS, "train_fast_rcnn"), "store": _times(ENTRIES, figures.map_seconds(precision)),
        "M3": stage(RPN_STEPS, "train_rpn_frozen_conv", True), "P2": stage(IMAGES, "generate_proposals", True),
        "M4": stage(FAST_RCNN_STEPS, "train_fast_rcnn_frozen_conv", True),
    }
    plain = _sum(stages["M1"], stages["P1"], stages["M2"],
                 stage(RPN_STEPS, "train_rpn_frozen_conv"), stages["P1"],
                 stage(FAST_RCNN_STEPS, "train_fast_rcnn_frozen_conv"))
    alternating = _sum(*stages.values())
    found = {"stages": stages, "alternating": alternating, "alternating_without_store": plain}
    name = "train_approximate_joint"
    for size, suffix in ((1, ""), (ITER_SIZE, "_iter_size_2")):
        joint = _times(JOINT_STEPS, figures.of_several(size, name, precision))
        found |= {
            f"approximate_joint{suffix}": joint, f"alternating_over_joint{suffix}": _ratio(alternating, joint),
            f"without_store_over_joint{suffix}": _ratio(plain, joint),
        }
    for form, other in (("", "float32"), ("_autocast", "bfloat16")):
        theirs = _times(JOINT_STEPS, figures.of_several(ITER_SIZE, "torchvision_training", other))
        found[f"alternating_over_torchvision{form}_iter_size_2"] = _ratio(alternating, theirs)
    return found


def _pair(figures: Figures, name: str, precision: str) -> tuple[float | None, float | None]:
    return figures.of(name, precision), figures.of(name, precision, store=True)


def _times(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count * seconds


def _sum(*seconds: float | None) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under
