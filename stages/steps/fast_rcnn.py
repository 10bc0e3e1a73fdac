"""Training Fast R-CNN on cached proposals: with its conv layers, on top of frozen ones, or its box layer alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from altopt.config import SAMPLING, NetworkConfig, RoITraining, setting
from stages.shared.stage_config import Freeze, TrainsOnImages, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.batches.reading import Entry
    from altopt.batches.samples import Sample
    from altopt.models.detector import FasterRCNN
    from altopt.models.fast_rcnn import FastRCNNTraining

SOLVER = "py-faster-rcnn models/pascal_voc/VGG16/faster_rcnn_alt_opt/*fast_rcnn_solver*.pt"
SCALES = ("the network's short_side alone; Fast R-CNN, section 5.2, draws one of five at each visit: 480, 576, 688, "
          "864, 1200")


@dataclass(frozen=True, kw_only=True)
class FastRCNNConfig(RoITraining, TrainsOnImages):
    """How Fast R-CNN is trained: RoIs sampled by IoU, two losses (Fast R-CNN, section 2.3)."""

    version: ClassVar[int] = 5  # a batch goes through fc6 and fc7 once
    iterations: int = setting(40_000, SOLVER)
    images_per_batch: int = setting(2, SAMPLING)
    lr_steps: tuple[int, ...] = setting((30_000,), SOLVER)
    proposals: int = setting(2000, "py-faster-rcnn: all that the proposal stage kept", at_least=1)
    cls_weight: float = setting(1.0, SAMPLING, at_least=0)
    box_weight: float = setting(1.0, SAMPLING, at_least=0)
    box_regression: Literal["multi-task", "none"] = setting(
        "multi-task", "Fast R-CNN, section 2.3; none trains classification only, and boxes stay as they are (5.1)")
    box_statistics: Literal["measured", "fixed"] = setting(
        "measured", "py-faster-rcnn alt_opt: measured on the proposals")

    @property
    def work(self) -> Work:
        """A batch of images through conv layers, and its RoIs through the others."""
        return Work(("conv", "fc", "head"), self.images_per_batch, self.rois_per_batch)


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNN(FastRCNNConfig):
    """Stage 3, where the later conv blocks learn too."""

    freeze: tuple[str, ...] = setting(
        ("conv1", "conv2"), "Fast R-CNN, section 4.5; py-faster-rcnn: conv1_1 to conv2_2 at rate 0", distinct=True)
    scales: tuple[int, ...] = setting((), SCALES, at_least=16, at_most="max_side", distinct=True)
    max_side: int = setting(2000, "Fast R-CNN's config for five scales; one scale has the network's", at_least=16)


@dataclass(frozen=True, kw_only=True)
class TrainClassification(TrainFastRCNN):
    """The same without a box loss, for a box layer that is trained afterwards."""

    table: ClassVar[str] = "train_fast_rcnn"
    box_regression: Literal["multi-task", "none"] = setting("none", "Fast R-CNN, section 5.1: the first of two steps")


@dataclass(frozen=True, kw_only=True)
class TrainBoxLayer(FastRCNNConfig):
    """The second step, in which all other layers stay as they are."""

    version: ClassVar[int] = 4  # a batch goes through fc6 and fc7 once
    freeze: ClassVar[Freeze] = "all"


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNNFrozenConv(FastRCNNConfig):
    """Stage 6, where all conv layers stay as they are."""

    freeze: ClassVar[Freeze] = "all"
    outputs: Literal["re-initialise", "continue"] = setting(
        "re-initialise", "py-faster-rcnn in Python: cls_score and bbox_pred are re-initialised (MATLAB starts from M2, "
                         "whose outputs continue)")


def train_fast_rcnn(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNN, runtime: Runtime) -> Facts:
    """Train Fast R-CNN, and the conv layers under it, from pre-trained weights on cached proposals."""
    return _train("train_fast_rcnn", (init, proposals, out), config, runtime, fresh=("head",),
                  scales=config.network.at_scales(config.scales, config.max_side))


def train_classification(init: Path, proposals: Path, *, out: Path, config: TrainClassification,
                         runtime: Runtime) -> Facts:
    """Train Fast R-CNN as a classifier of RoIs, without its box layer."""
    return train_fast_rcnn(init, proposals, out=out, config=config, runtime=runtime)


def train_box_layer(init: Path, proposals: Path, *, out: Path, config: TrainBoxLayer, runtime: Runtime) -> Facts:
    """Train the box layer of a Fast R-CNN that was trained without; nothing else changes."""
    from altopt.errors import ArtifactError
    from cache.checkpoints import load_checkpoint

    box_layer = load_checkpoint(init)[0].get("head.bbox_pred.weight")
    if box_layer is None or box_layer.any():
        raise ArtifactError(f"{init.name} is not a Fast R-CNN trained without its box layer: make one with "
                            f"box_regression = none (altopt stage {init.stem})")
    return _train("train_box_layer", (init, proposals, out), config, runtime, others=("fc", "head.cls_score"))


def train_fast_rcnn_frozen_conv(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNNFrozenConv,
                                runtime: Runtime) -> Facts:
    """Train Fast R-CNN's fully connected layers on the RPN's own conv layers, which do not change."""
    fresh = ("head",) if config.outputs == "re-initialise" else ()
    return _train("train_fast_rcnn_frozen_conv", (init, proposals, out), config, runtime, fresh=fresh)


def _train(name: str, paths: tuple[Path, Path, Path], config: FastRCNNConfig, runtime: Runtime, *,
           fresh: tuple[str, ...] = (), others: tuple[str, ...] = (),
           scales: Sequence[NetworkConfig] = ()) -> Facts:
    """Train Fast R-CNN on the files of ``paths``: initial weights, proposals, output.

    ``fresh`` parts begin with new random weights, ``others`` are frozen beside the conv layers of the config, and
    images are drawn at one of the ``scales`` at each visit, or at the network's own.
    """
    from altopt.batches.samples import read_sample
    from stages.shared.training import CachedProposals, Training, box_statistics, roi_sampling, trainable_entries

    init, proposals, out = paths
    training = Training(name, init, out, config, runtime)
    cached = CachedProposals(proposals, training.dataset, config.proposals)
    entries, unusable = trainable_entries(training, cached, roi_sampling(config).thresholds)
    network = training.network(("conv", "fc", "head"), fresh)
    training.freeze(network, others)
    if config.box_regression == "none":
        network.head.leave_boxes()
    else:
        network.use_box_statistics(*box_statistics(training, cached, config.box_statistics, config.fg_iou))
    network.set_dropout(config.dropout)
    module = fast_rcnn_training(network, config, training.seed)
    with training.stored_maps(network.conv):
        def read(entry: "Entry", iteration: int) -> "Sample":
            boxes = cached.get(entry.id)
            if not scales:
                return training.sample(entry, boxes)
            scale = scales[training.scale(len(scales), entry, iteration)]
            return read_sample(training.dataset, entry.id, scale, flipped=entry.flipped, proposals=boxes)

        facts = training.run(module, entries, read)
    training.save(network, ["conv", "fc", "head"])
    return {**facts, "images_without_rois": unusable}


def fast_rcnn_training(network: "FasterRCNN", config: FastRCNNConfig, seed: tuple[object, ...]) -> "FastRCNNTraining":
    """Return what the training loop trains: the network without RPN, from a batch to the two losses of the config."""
    from altopt.models.fast_rcnn import FastRCNNTraining
    from stages.shared.training import roi_sampling

    box_weight = config.box_weight if config.box_regression == "multi-task" else 0.0
    return FastRCNNTraining(network, rois=roi_sampling(config), cls_weight=config.cls_weight, box_weight=box_weight,
                            seed=seed)
