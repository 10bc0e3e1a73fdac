"""Training Fast R-CNN on cached proposals: with its conv layers, on top of frozen ones, or its box layer alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from altopt.config import NetworkConfig, TrainingConfig, sourced
from stages.shared.split_config import OnTrainSplit
from stages.shared.step import Runtime

if TYPE_CHECKING:
    from altopt.models.detector import FasterRCNN
    from altopt.models.fast_rcnn import FastRCNNTraining

SOLVER = "pfr models/pascal_voc/VGG16/faster_rcnn_alt_opt/*fast_rcnn_solver*.pt"
SAMPLING = "Fast R-CNN, section 2.3"
SCALES = ("the network's short_side alone; Fast R-CNN, section 5.2, draws one of five at each visit: 480, 576, 688, "
          "864, 1200")


@dataclass(frozen=True, kw_only=True)
class FastRCNNConfig(TrainingConfig, OnTrainSplit):
    """How Fast R-CNN is trained: RoIs sampled by IoU, two losses (Fast R-CNN, section 2.3)."""

    version: ClassVar[int] = 4  # a batch goes through fc6 and fc7 once
    stores_maps: ClassVar[bool] = True
    iterations: int = sourced(40_000, SOLVER)
    images_per_batch: int = sourced(2, SAMPLING)
    lr_steps: tuple[int, ...] = sourced((30_000,), SOLVER)
    rois_per_batch: int = sourced(128, SAMPLING)
    fg_fraction: float = sourced(0.25, SAMPLING)
    fg_iou: float = sourced(0.5, SAMPLING)
    bg_iou_high: float = sourced(0.5, SAMPLING)
    bg_iou_low: float = sourced(0.0, "pfr faster_rcnn_alt_opt.yml; Fast R-CNN and MATLAB: 0.1")
    proposals: int = sourced(2000, "pfr: all that the proposal stage kept")
    cls_weight: float = sourced(1.0, SAMPLING)
    box_weight: float = sourced(1.0, SAMPLING)
    box_regression: Literal["multi-task", "none"] = sourced(
        "multi-task", "Fast R-CNN, section 2.3; none trains classification only, and boxes stay as they are (5.1)")
    box_statistics: Literal["measured", "fixed"] = sourced("measured", "pfr alt_opt: measured on the proposals")
    dropout: float = sourced(0.5, "pfr train.pt, after fc6 and fc7")
    init: str = sourced("", "the list's own")


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNN(FastRCNNConfig):
    """Stage 3, where the later conv blocks learn too."""

    version: ClassVar[int] = 5  # a batch goes through fc6 and fc7 once
    freeze: tuple[str, ...] = sourced(("conv1", "conv2"), "Fast R-CNN, section 4.5; pfr: conv1_1 to conv2_2 at rate 0")
    scales: tuple[int, ...] = sourced((), SCALES)
    max_side: int = sourced(2000, "Fast R-CNN's config for five scales; one scale has the network's")


@dataclass(frozen=True, kw_only=True)
class TrainClassification(TrainFastRCNN):
    """The same without a box loss, for a box layer that is trained afterwards."""

    table: ClassVar[str] = "train_fast_rcnn"
    box_regression: Literal["multi-task", "none"] = sourced("none", "Fast R-CNN, section 5.1: the first of two steps")


@dataclass(frozen=True, kw_only=True)
class TrainBoxLayer(FastRCNNConfig):
    """The second step, in which all other layers stay as they are."""


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNNFrozenConv(FastRCNNConfig):
    """Stage 6, where all conv layers stay as they are."""

    version: ClassVar[int] = 5  # a batch goes through fc6 and fc7 once
    outputs: Literal["draw-anew", "continue"] = sourced(
        "draw-anew", "pfr Python: cls_score and bbox_pred start anew (MATLAB starts from M2, whose outputs continue)")


def train_fast_rcnn(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNN,
                    runtime: Runtime) -> dict[str, Any]:
    """Train Fast R-CNN, and the conv layers under it, from pre-trained weights on cached proposals."""
    return _train("train_fast_rcnn", init, proposals, out, config, runtime, Plan(config.freeze, fresh=("head",),
                  frames=config.network.at_scales(config.scales, config.max_side)))


def train_classification(init: Path, proposals: Path, *, out: Path, config: TrainClassification,
                         runtime: Runtime) -> dict[str, Any]:
    """Train Fast R-CNN as a classifier of RoIs, without its box layer."""
    return train_fast_rcnn(init, proposals, out=out, config=config, runtime=runtime)


def train_box_layer(init: Path, proposals: Path, *, out: Path, config: TrainBoxLayer,
                    runtime: Runtime) -> dict[str, Any]:
    """Train the box layer of a Fast R-CNN that was trained without; nothing else changes."""
    from altopt.errors import ArtifactError
    from cache.checkpoints import load_checkpoint

    box_layer = load_checkpoint(init)[0].get("head.bbox_pred.weight")
    if box_layer is None or box_layer.any():
        raise ArtifactError(f"{init.name} is not a Fast R-CNN that was trained without its box layer: make one with "
                            "box_regression = none (altopt stage train_classification)")
    return _train("train_box_layer", init, proposals, out, config, runtime,
                  Plan("all", others=("fc", "head.cls_score")))


def train_fast_rcnn_frozen_conv(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNNFrozenConv,
                                runtime: Runtime) -> dict[str, Any]:
    """Train Fast R-CNN's fully connected layers on the RPN's own conv layers, which do not change."""
    fresh = ("head",) if config.outputs == "draw-anew" else ()
    return _train("train_fast_rcnn_frozen_conv", init, proposals, out, config, runtime, Plan("all", fresh=fresh))


class Plan(NamedTuple):
    """What sets one training of Fast R-CNN apart from another."""

    freeze: tuple[str, ...] | Literal["all"]  # conv layers
    fresh: tuple[str, ...] = ()  # parts that begin with new random weights
    others: tuple[str, ...] = ()  # frozen too
    frames: Sequence[NetworkConfig] = ()  # scales that images are drawn at; none: the network's own


def _train(name: str, init: Path, proposals: Path, out: Path, config: FastRCNNConfig, runtime: Runtime,
           plan: Plan) -> dict[str, Any]:
    from stages.shared.training import CachedProposals, Training, box_statistics, roi_sampling, trainable_entries

    training = Training(name, init, out, config, runtime)
    cached = CachedProposals(proposals, training.dataset, config.proposals)
    entries, unusable = trainable_entries(training, cached, roi_sampling(config).thresholds)
    network = training.network(("conv", "fc", "head"), plan.fresh)
    training.freeze(network, plan.freeze, plan.others)
    if config.box_regression == "none":
        network.head.leave_boxes()
    else:
        network.use_box_statistics(*box_statistics(training, cached, config.box_statistics, config.fg_iou))
    network.set_dropout(config.dropout)
    module = fast_rcnn_training(network, config, training.seed)
    if plan.frames:
        facts = training.run_at_scales(module, entries, cached, plan.frames)
    else:
        facts = training.run(network.conv, module, entries, cached)
    training.save(network, ["conv", "fc", "head"])
    return facts | {"images_without_rois": unusable}


def fast_rcnn_training(network: "FasterRCNN", config: FastRCNNConfig, seed: tuple[object, ...]) -> "FastRCNNTraining":
    """Return what the training loop trains: the network without RPN, from a batch to the two losses of the config."""
    from altopt.models.fast_rcnn import FastRCNNTraining
    from stages.shared.training import roi_sampling

    box_weight = config.box_weight if config.box_regression == "multi-task" else 0.0
    return FastRCNNTraining(network, rois=roi_sampling(config), cls_weight=config.cls_weight, box_weight=box_weight,
                            seed=seed)
