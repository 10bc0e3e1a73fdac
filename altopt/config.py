"""Settings that change results: the network, the training loop, the proposals. No torch here.

Each field carries the source of its default, which ``altopt recipe`` prints, and its bounds, which are checked when a
recipe is read. Defaults are py-faster-rcnn's for VGG16 on VOC 2007, so that a recipe only states what it does
differently.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack, cast, get_args

from altopt.errors import ArtifactError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


class Bounds(TypedDict, total=False):
    """What the values of a field are held to; a limit is a number, or the name of a field of the same config.

    They hold for each element of a list, ``non_empty``, ``distinct`` and ``ascending`` for the list as a whole.
    Infinity is refused unless it is ``infinite``, and NaN always.
    """

    at_least: float | str
    above: float | str
    at_most: float | str
    below: float | str
    infinite: bool
    non_empty: bool
    distinct: bool
    ascending: bool


def setting(default: T, source: str, **bounds: Unpack[Bounds]) -> T:
    """Return a dataclass field with a default, the place that the default comes from, and its bounds.

    A field that only replaces the default of a base class keeps the bounds it has there.
    """
    return field(default=default, metadata={"source": source, "bounds": bounds})


@cache
def bounds_of(config: type, name: str) -> Bounds:
    """Return the bounds of a config's field."""
    for cls in config.__mro__:
        known = vars(cls).get("__dataclass_fields__", {}).get(name)
        if known is not None and known.metadata.get("bounds"):
            return cast(Bounds, known.metadata["bounds"])
    return {}


def out_of_bounds(config: "DataclassInstance") -> str | None:
    """Return what breaks its bounds, in words: ``iterations must be at least 0 (it is -5)``; None if nothing does."""
    values = vars(config)
    for name, value in values.items():
        if problem := _problem(value, bounds_of(type(config), name), values):
            return f"{name} must {problem}"
    return None


def _problem(value: object, bounds: Bounds, values: dict[str, object]) -> str | None:
    members = value if isinstance(value, tuple) else (value,)
    if bounds.get("non_empty") and not members:
        return "name at least one (it is empty)"
    for member in members:
        is_it = f"it holds {member}" if isinstance(value, tuple) else f"it is {member}"
        if bounds.get("distinct") and members.count(member) > 1:
            return f"name each once ({is_it} twice)"
        if isinstance(member, float) and (isnan(member) or not (isfinite(member) or bounds.get("infinite"))):
            return f"be a finite number ({is_it})"
        for word, holds in LIMITS.items():
            limit = bounds.get(word)
            other = values[limit] if isinstance(limit, str) else limit
            if isinstance(member, int | float) and isinstance(other, int | float) and not holds(member, other):
                reason = f"{is_it}, {limit} is {other}" if isinstance(limit, str) else is_it
                return f"be {word.replace('_', ' ')} {limit} ({reason})"
    if bounds.get("ascending") and list(members) != sorted(set(members)):
        return f"ascend (it is {list(members)})"
    return None


WARMUP_SHARE = 5  # of a run whose length follows from its images, a fifth
SHARE = Bounds(at_least=0, at_most=1)
SIZES = Bounds(above=0, non_empty=True, distinct=True)
SAMPLING = "Fast R-CNN, section 2.3, as R-CNN and SPP-net before it"
SOLVER = "py-faster-rcnn models/pascal_voc/VGG16/faster_rcnn_alt_opt/*solver*.pt"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network, and the frame in which it sees images and places anchors."""

    # A new one has layers in altopt/layers.py and a function in altopt/models/backbones.py.
    name: Literal["vgg16", "alexnet", "squeezenet1_1", "small", "efficientnet_lite0", "resnet50",
                  "resnet101"] = setting("vgg16", "the network of the paper")
    short_side: int = setting(600, "Faster R-CNN, section 3.3; py-faster-rcnn TRAIN.SCALES", at_least=16)
    max_side: int = setting(1000, "py-faster-rcnn TRAIN.MAX_SIZE", at_least="short_side")
    anchor_base: int = setting(16, "py-faster-rcnn generate_anchors: the stride of conv5", at_least=1)
    anchor_ratios: tuple[float, ...] = setting((0.5, 1.0, 2.0), "Faster R-CNN, section 3.3", **SIZES)
    anchor_scales: tuple[float, ...] = setting((8.0, 16.0, 32.0), "Faster R-CNN, section 3.3: 128 to 512 px", **SIZES)
    rpn_channels: int = setting(512, "Faster R-CNN, section 3.1; 256 for ZF", at_least=1)

    def at_scales(self, scales: Sequence[int], max_side: int) -> "list[NetworkConfig]":
        """Return the network with the frame of each scale, which is the length of an image's shorter side."""
        return [replace(self, short_side=scale, max_side=max_side) for scale in scales]


NETWORKS: tuple[str, ...] = get_args(NetworkConfig.__annotations__["name"])


@dataclass(frozen=True)
class Pixels:
    """How weights want an image's values, 0..255: channels in ``order``, then (value - mean * scale) / (std * scale).

    ``mean`` and ``std`` are in that order too. The convention belongs to the weights: it is chosen where they come
    from, and travels in every checkpoint made of them. The defaults are torchvision's, with which altopt's own
    pre-training works too.
    """

    order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 255.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, description: Mapping[str, object]) -> "Pixels":
        """Return what a checkpoint's description says; torchvision's convention where it is older and says nothing.

        Raises ``ArtifactError`` for what is no such convention.
        """
        held: Any = description.get("pixels", {})
        try:
            values: dict[str, Any] = {name: tuple(map(float, value)) if isinstance(value, list) else value
                                      for name, value in held.items()}
            pixels = cls(**values)
            if (pixels.order in ("RGB", "BGR") and len(pixels.mean) == len(pixels.std) == 3 and pixels.scale > 0
                    and all(map(isfinite, pixels.mean)) and all(0 < value < float("inf") for value in pixels.std)):
                return pixels
        except (AttributeError, TypeError, ValueError):
            pass
        raise ArtifactError(f"a checkpoint says that its weights want pixels as {held!r}, which cannot be: make it "
                            "again")


TORCHVISION_PIXELS = Pixels()


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a network computes in."""

    precision: Literal["float32", "bfloat16"] = setting("float32", "as Caffe computes")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Precision):
    """One run of the training loop."""

    iterations: int = setting(80_000, SOLVER, at_least=0)
    visits: float = setting(0.0, "chosen: 0, as many iterations as said; else of each image, in iterations' place",
                            at_least=0, at_most=10_000)
    images_per_batch: int = setting(1, "py-faster-rcnn TRAIN.IMS_PER_BATCH", at_least=1)
    lr: float = setting(1e-3, SOLVER, above=0)
    schedule: Literal["step", "one-cycle"] = setting("step", SOLVER)
    lr_steps: tuple[int, ...] = setting((60_000,), SOLVER, at_least=0, ascending=True)
    lr_gamma: float = setting(0.1, SOLVER, above=0, at_most=1)
    warmup: int = setting(0, "py-faster-rcnn has none", at_least=0)
    momentum: float = setting(0.9, SOLVER, at_least=0, below=1)
    weight_decay: float = setting(5e-4, SOLVER, at_least=0)
    bias_lr: float = setting(2.0, "py-faster-rcnn *.pt: biases learn at twice the rate", at_least=0)
    bias_decay: float = setting(1.0, "py-faster-rcnn *.pt: decay applies to trained biases too", at_least=0)
    conv_lr: float = setting(1.0, "py-faster-rcnn: conv layers that learn have the others' rate", at_least=0)
    clip_gradient: float = setting(0.0, "py-faster-rcnn has none (0 is none)", at_least=0)
    flips: bool = setting(True, "py-faster-rcnn TRAIN.USE_FLIPPED: mirror images are further entries, not a coin toss")
    seed: int = setting(3, "py-faster-rcnn RNG_SEED", at_least=0)

    def for_images(self, count: int) -> Self:
        """Return the config of a run over so many images: with the iterations that its ``visits`` come to, if any.

        A short run warms up in a fifth of its iterations at most.
        """
        if not self.visits:
            return self
        iterations = max(1, round(self.visits * count / self.images_per_batch))
        return replace(self, iterations=iterations, warmup=min(self.warmup, iterations // WARMUP_SHARE))


@dataclass(frozen=True, kw_only=True)
class RoITraining(TrainingConfig):
    """How RoIs are drawn from an image's proposals by IoU, for a head that learns to classify them."""

    rois_per_batch: int = setting(128, SAMPLING, at_least=1)
    fg_fraction: float = setting(0.25, SAMPLING, **SHARE)
    fg_iou: float = setting(0.5, SAMPLING, above=0, at_most=1)
    bg_iou_high: float = setting(0.5, SAMPLING, above=0, at_most="fg_iou")
    bg_iou_low: float = setting(0.0, "py-faster-rcnn *.yml, R-CNN; Fast R-CNN and MATLAB: 0.1", at_least=0,
                                below="bg_iou_high")
    dropout: float = setting(0.5, "py-faster-rcnn train.pt, after fc6 and fc7, as AlexNet has it", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class AnchorTargets:
    """How anchors are labelled by IoU, sampled and scored."""

    positive_iou: float = setting(0.7, "Faster R-CNN, section 3.1.2", above=0, at_most=1)
    negative_iou: float = setting(0.3, "Faster R-CNN, section 3.1.2", at_least=0, at_most="positive_iou")
    anchors_per_image: int = setting(256, "Faster R-CNN, section 3.1.3; py-faster-rcnn RPN_BATCHSIZE", at_least=1)
    positive_fraction: float = setting(0.5, "Faster R-CNN, section 3.1.3; py-faster-rcnn RPN_FG_FRACTION", **SHARE)
    sigma: float = setting(3.0, "py-faster-rcnn train.pt: smooth L1 of the RPN is quadratic below 1/9", above=0)


@dataclass(frozen=True, kw_only=True)
class ProposalSettings:
    """How the RPN's boxes become proposals; sides are in pixels of the original image."""

    pre_nms: int = setting(0, "py-faster-rcnn rpn_generate: no limit (0) for what stages train on", at_least=0)
    nms: float = setting(0.7, "Faster R-CNN, section 3.3", **SHARE)
    post_nms: int = setting(2000, "Faster R-CNN, section 3.3", at_least=1)
    min_side: float = setting(16.0, "py-faster-rcnn RPN_MIN_SIZE", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(Precision):
    """How scores and boxes become detections."""

    pre_nms: int = setting(6000, "py-faster-rcnn TEST.RPN_PRE_NMS_TOP_N", at_least=0)
    rpn_nms: float = setting(0.7, "Faster R-CNN, section 3.3", **SHARE)
    proposals: int = setting(300, "py-faster-rcnn TEST.RPN_POST_NMS_TOP_N", at_least=1)
    min_side: float = setting(16.0, "py-faster-rcnn RPN_MIN_SIZE", at_least=0)
    score: float = setting(0.05, "py-faster-rcnn test_net: floor on class scores", **SHARE)
    nms: float = setting(0.3, "py-faster-rcnn TEST.NMS", **SHARE)
    per_image: int = setting(100, "py-faster-rcnn test_net: detections kept for an image, over all classes", at_least=1)
    regress_boxes: bool = setting(True, "Fast R-CNN, section 2.2; false leaves proposals as they are (section 5.1)")


@dataclass(frozen=True, kw_only=True)
class SVMSettings:
    """How a class's linear SVM is trained on region features; scores are those of features brought to one norm."""

    cost: float = setting(1e-3, "R-CNN rcnn_train: C", above=0)
    bias: float = setting(10.0, "R-CNN rcnn_train: the constant feature", at_least=0)
    positive_weight: float = setting(2.0, "R-CNN rcnn_train: w1", above=0)
    negative_iou: float = setting(0.3, "R-CNN, section 2.3: background below, ignored above", **SHARE)
    hard_score: float = setting(-1.0001, "R-CNN rcnn_train: hard_thresh, remembered above", infinite=True)
    easy_score: float = setting(-1.2, "R-CNN rcnn_train: evict_thresh, forgotten below (py port: -1.1)",
                                at_most="hard_score", infinite=True)
    retrain_after: int = setting(2000, "R-CNN rcnn_train: retrain_limit, new negatives of the class", at_least=1)
    max_iterations: int = setting(1000, "liblinear's own limit", at_least=1)
    tolerance: float = setting(1e-4, "scikit-learn's own; liblinear: 0.1", above=0)


@dataclass(frozen=True, kw_only=True)
class RegionDetectionSettings(Precision):
    """How the SVMs' scores of proposals, and the regressed boxes, become detections."""

    score: float = setting(-1.5, "SPP-net's floor; R-CNN has none, and cuts the worst by 40 boxes an image and class",
                           infinite=True)
    per_class: int = setting(100, "R-CNN rcnn_test, SPP-net: boxes of a class in an image, before nms", at_least=1)
    nms: float = setting(0.3, "R-CNN, section 2.2", **SHARE)
