"""Joint training: RPN and Fast R-CNN in one network and one stage, approximately or exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from altopt.config import AnchorTargets, ProposalSettings, RoITraining, setting
from stages.shared.stage_config import PARTS, TrainsOnImages, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.models.detector import FasterRCNN
    from altopt.models.joint import CoordinatePath, JointTraining

SOLVER = "py-faster-rcnn models/pascal_voc/VGG16/faster_rcnn_end2end/solver.prototxt"
LOSSES = "py-faster-rcnn faster_rcnn_end2end/train.prototxt: all four losses count the same"


@dataclass(frozen=True, kw_only=True)
class JointConfig(AnchorTargets, RoITraining, ProposalSettings, TrainsOnImages):
    """How one network is trained with four losses on proposals that it makes as it learns."""
    # Box targets have py-faster-rcnn's fixed deviations: before training there are no proposals to measure any on.

    version: ClassVar[int] = 4  # a batch goes through fc6 and fc7 once
    iterations: int = setting(70_000, SOLVER)
    images_per_batch: int = setting(
        1, "py-faster-rcnn end2end (Caffe's iter_size 2 sums the gradients of two such batches)")
    lr_steps: tuple[int, ...] = setting((50_000,), SOLVER)
    pre_nms: int = setting(12_000, "py-faster-rcnn TRAIN.RPN_PRE_NMS_TOP_N")
    post_nms: int = setting(2000, "py-faster-rcnn TRAIN.RPN_POST_NMS_TOP_N")
    rpn_cls_weight: float = setting(1.0, LOSSES, at_least=0)
    rpn_box_weight: float = setting(1.0, LOSSES, at_least=0)
    cls_weight: float = setting(1.0, LOSSES, at_least=0)
    box_weight: float = setting(1.0, LOSSES, at_least=0)
    freeze: tuple[str, ...] = setting(
        ("conv1", "conv2"), "py-faster-rcnn train.prototxt: conv1_1 to conv2_2 at rate 0", distinct=True)

    @property
    def work(self) -> Work:
        """A batch of images and its RoIs through all."""
        return Work(PARTS, self.images_per_batch, self.rois_per_batch)


@dataclass(frozen=True, kw_only=True)
class TrainApproximateJoint(JointConfig):
    """Approximate: the proposals are constants in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class TrainExactJoint(JointConfig):
    """Exact: the detector's losses reach the RPN through the proposals' coordinates."""

    samples_per_bin: int = setting(
        2, "chosen: points to a side of a bin, of which it takes the maximum (Chen and Gupta, 2017: crops of 14 x 14, "
           "then the maximum of 2 x 2)", at_least=1)
    coordinate_warmup: int = setting(
        5000, "chosen: iterations without the coordinate path, and as many in which it rises in a straight line to its "
              "full share: an untrained RPN's boxes only carry noise; 0 is full from the start", at_least=0)
    coordinate_clip: float = setting(
        0.002, "chosen: bound on the norm, for each image, of the loss's gradient per pixel of its proposals' "
               "coordinates. A quarter of what it is on shapes, where 150 steps in batches of four lost 40 % of the "
               "proposals' recall without a bound, and nothing with one of a quarter; 0 is none", at_least=0)


def train_approximate_joint(init: Path, *, out: Path, config: TrainApproximateJoint, runtime: Runtime) -> Facts:
    """Train RPN and Fast R-CNN together with four losses, proposals being constants in the backward pass."""
    return _train("train_approximate_joint", init, out, config, runtime, None, samples_per_bin=0)


def train_exact_joint(init: Path, *, out: Path, config: TrainExactJoint, runtime: Runtime) -> Facts:
    """Train RPN and Fast R-CNN together with four losses, proposals having a gradient as all else has."""
    from altopt.models.joint import CoordinatePath

    path = CoordinatePath(config.coordinate_warmup, config.coordinate_clip)
    return _train("train_exact_joint", init, out, config, runtime, path, config.samples_per_bin)


def _train(name: str, init: Path, out: Path, config: JointConfig, runtime: Runtime, path: "CoordinatePath | None",
           samples_per_bin: int) -> Facts:
    from altopt.training.box_statistics import fixed_statistics
    from stages.shared.training import Training

    training = Training(name, init, out, config, runtime)
    network = training.network(PARTS)
    training.freeze(network)
    network.use_box_statistics(*fixed_statistics(len(training.dataset.classes)))
    network.set_dropout(config.dropout)
    network.samples_per_bin = samples_per_bin
    module = joint_training(network, config, path, training.seed)
    with training.stored_maps(network.conv):
        facts = training.run(module, training.entries(), lambda entry, _: training.sample(entry))
    pooling = {"samples_per_bin": samples_per_bin} if samples_per_bin else {}
    training.save(network, PARTS, **pooling)
    return facts


def joint_training(network: "FasterRCNN", config: JointConfig, path: "CoordinatePath | None",
                   seed: tuple[object, ...]) -> "JointTraining":
    """Return what the training loop trains: the network, from a batch to the four losses that the config asks for."""
    from altopt.models.joint import JointTraining
    from altopt.models.rpn import AnchorSampling
    from stages.shared.training import roi_sampling

    anchors = AnchorSampling(config.positive_iou, config.negative_iou, config.anchors_per_image,
                             config.positive_fraction)
    return JointTraining(
        network, anchors=anchors, sigma=config.sigma, proposals=config, rois=roi_sampling(config), seed=seed, path=path,
        weights={"rpn_cls": config.rpn_cls_weight, "rpn_box": config.rpn_box_weight, "cls": config.cls_weight,
                 "box": config.box_weight},
    )
