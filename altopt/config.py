"""Settings that change results: the network, the training loop, the proposals. No torch here.

Each field carries the source of its default, which ``altopt recipe`` prints. Defaults are py-faster-rcnn's for VGG16 on
VOC 2007 (``pfr`` in the sources), so that a recipe only states what it does differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal


def sourced(default: Any, source: str) -> Any:
    """Return a dataclass field with a default and the place that the default comes from."""
    return field(default=default, metadata={"source": source})


NETWORKS = ("vgg16", "alexnet", "squeezenet1_1", "small")
SOLVER = "pfr models/pascal_voc/VGG16/faster_rcnn_alt_opt/*solver*.pt"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network, and the frame in which it sees images and places anchors."""

    name: Literal["vgg16", "alexnet", "squeezenet1_1", "small"] = sourced("vgg16", "the network of the paper")
    short_side: int = sourced(600, "Faster R-CNN, section 3.3; pfr TRAIN.SCALES")
    max_side: int = sourced(1000, "pfr TRAIN.MAX_SIZE")
    anchor_base: int = sourced(16, "pfr generate_anchors: the stride of conv5")
    anchor_ratios: tuple[float, ...] = sourced((0.5, 1.0, 2.0), "Faster R-CNN, section 3.3")
    anchor_scales: tuple[float, ...] = sourced((8.0, 16.0, 32.0), "Faster R-CNN, section 3.3: 128, 256, 512 px")
    rpn_channels: int = sourced(512, "Faster R-CNN, section 3.1; 256 for ZF")

    def at_scales(self, scales: Sequence[int], max_side: int) -> "list[NetworkConfig]":
        """Return the network with the frame of each scale, which is the length of an image's shorter side."""
        return [replace(self, short_side=scale, max_side=max_side) for scale in scales]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run of the training loop."""

    iterations: int = sourced(80_000, SOLVER)
    images_per_batch: int = sourced(1, "pfr TRAIN.IMS_PER_BATCH")
    lr: float = sourced(1e-3, SOLVER)
    schedule: Literal["step", "one-cycle"] = sourced("step", SOLVER)
    lr_steps: tuple[int, ...] = sourced((60_000,), SOLVER)
    lr_gamma: float = sourced(0.1, SOLVER)
    warmup: int = sourced(0, "pfr has none")
    momentum: float = sourced(0.9, SOLVER)
    weight_decay: float = sourced(5e-4, SOLVER)
    bias_lr: float = sourced(2.0, "pfr *.pt: biases learn at twice the rate")
    bias_decay: float = sourced(1.0, "pfr *.pt: decay applies to trained biases too")
    conv_lr: float = sourced(1.0, "pfr: conv layers that learn do so at the rate of the others")
    clip_gradient: float = sourced(0.0, "pfr has none (0 is none)")
    flips: bool = sourced(True, "pfr TRAIN.USE_FLIPPED: mirrored copies are further entries, not a coin toss")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")
    seed: int = sourced(3, "pfr RNG_SEED")


@dataclass(frozen=True, kw_only=True)
class ProposalSettings:
    """How the RPN's boxes become proposals; sides are in pixels of the original image."""

    pre_nms: int = sourced(0, "pfr rpn_generate: no limit (0) for the proposals that stages train on")
    nms: float = sourced(0.7, "Faster R-CNN, section 3.3")
    post_nms: int = sourced(2000, "Faster R-CNN, section 3.3")
    min_side: float = sourced(16.0, "pfr RPN_MIN_SIZE")


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """How scores and boxes become detections."""

    pre_nms: int = sourced(6000, "pfr TEST.RPN_PRE_NMS_TOP_N")
    rpn_nms: float = sourced(0.7, "Faster R-CNN, section 3.3")
    proposals: int = sourced(300, "pfr TEST.RPN_POST_NMS_TOP_N")
    min_side: float = sourced(16.0, "pfr RPN_MIN_SIZE")
    score: float = sourced(0.05, "pfr test_net: floor on class scores")
    nms: float = sourced(0.3, "pfr TEST.NMS")
    per_image: int = sourced(100, "pfr test_net: detections kept for an image, over all classes")
    regress_boxes: bool = sourced(True, "Fast R-CNN, section 2.2; false leaves proposals as they are (section 5.1)")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")


@dataclass(frozen=True, kw_only=True)
class SVMSettings:
    """How a class's linear SVM is trained on region features; scores are those of features brought to one norm."""

    cost: float = sourced(1e-3, "R-CNN rcnn_train: C")
    bias: float = sourced(10.0, "R-CNN rcnn_train: the constant feature")
    positive_weight: float = sourced(2.0, "R-CNN rcnn_train: w1")
    negative_iou: float = sourced(0.3, "R-CNN, section 2.3: background below, ignored above")
    hard_score: float = sourced(-1.0001, "R-CNN rcnn_train: hard_thresh, remembered above")
    easy_score: float = sourced(-1.2, "R-CNN rcnn_train: evict_thresh, forgotten below (py port: -1.1)")
    retrain_after: int = sourced(2000, "R-CNN rcnn_train: retrain_limit, new negatives of the class")
    max_iterations: int = sourced(1000, "liblinear's own limit")
    tolerance: float = sourced(1e-4, "scikit-learn's own; liblinear: 0.1")


@dataclass(frozen=True, kw_only=True)
class RegionDetectionSettings:
    """How the SVMs' scores of proposals, and the regressed boxes, become detections."""

    proposals: int = sourced(2000, "R-CNN, section 2.1: around 2000 regions an image")
    score: float = sourced(-1.5, "SPP-net's floor; R-CNN has none, and cuts the worst by 40 boxes an image and class")
    per_class: int = sourced(100, "R-CNN rcnn_test, SPP-net: boxes of a class in an image, before suppression")
    nms: float = sourced(0.3, "R-CNN, section 2.2")
    precision: Literal["float32", "bfloat16"] = sourced("float32", "as Caffe computes")
