"""Stages 3 and 6: training Fast R-CNN on cached proposals, with its conv layers and on top of frozen ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from altopt.config import NetworkConfig, TrainingConfig, sourced
from altopt.datasets.dataset import DataConfig
from stages.step import Runtime

SOLVER = "pfr models/pascal_voc/VGG16/faster_rcnn_alt_opt/*fast_rcnn_solver*.pt"
SAMPLING = "Fast R-CNN, section 2.3"


@dataclass(frozen=True, kw_only=True)
class FastRCNNConfig(TrainingConfig):
    """How Fast R-CNN is trained: RoIs sampled by IoU, two losses (Fast R-CNN, section 2.3)."""

    version: ClassVar[int] = 2  # a head that starts anew starts small in units of its statistics
    split: ClassVar[str] = "train"
    divided: ClassVar[bool] = True
    network: NetworkConfig
    data: DataConfig
    iterations: int = sourced(40_000, SOLVER)
    images_per_batch: int = sourced(2, SAMPLING)
    lr_steps: tuple[int, ...] = sourced((30_000,), SOLVER)
    rois_per_batch: int = sourced(128, SAMPLING)
    fg_fraction: float = sourced(0.25, SAMPLING)
    fg_iou: float = sourced(0.5, SAMPLING)
    bg_iou_high: float = sourced(0.5, SAMPLING)
    bg_iou_low: float = sourced(0.0, "pfr faster_rcnn_alt_opt.yml; Fast R-CNN and MATLAB: 0.1")
    proposals: int = sourced(2000, "pfr: all that the proposal stage kept")
    box_weight: float = sourced(1.0, SAMPLING)
    box_statistics: Literal["measured", "fixed"] = sourced("measured", "pfr alt_opt: measured on the proposals")
    dropout: float = sourced(0.5, "pfr train.pt, after fc6 and fc7")
    init: str = sourced("", "the list's own")


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNN(FastRCNNConfig):
    """Stage 3, where the later conv blocks learn too."""

    freeze: tuple[str, ...] = sourced(("conv1", "conv2"), "Fast R-CNN, section 4.5; pfr: conv1_1 to conv2_2 at rate 0")


@dataclass(frozen=True, kw_only=True)
class TrainFastRCNNFrozenConv(FastRCNNConfig):
    """Stage 6, where all conv layers stay as they are."""

    version: ClassVar[int] = 2
    frozen_conv: ClassVar[bool] = True
    outputs: Literal["draw-anew", "continue"] = sourced(
        "draw-anew", "pfr Python: cls_score and bbox_pred start anew (MATLAB starts from M2, whose outputs continue)")


def train_fast_rcnn(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNN,
                    runtime: Runtime) -> dict[str, Any]:
    """Train Fast R-CNN, and the conv layers under it, from pre-trained weights on cached proposals."""
    return _train(init, proposals, out, config, runtime, config.freeze, fresh=("head",))


def train_fast_rcnn_frozen_conv(init: Path, proposals: Path, *, out: Path, config: TrainFastRCNNFrozenConv,
                                runtime: Runtime) -> dict[str, Any]:
    """Train Fast R-CNN's fully connected layers on the RPN's own conv layers, which do not change."""
    fresh = ("head",) if config.outputs == "draw-anew" else ()
    return _train(init, proposals, out, config, runtime, None, fresh)


def _train(init: Path, proposals: Path, out: Path, config: FastRCNNConfig, runtime: Runtime,
           freeze: tuple[str, ...] | None, fresh: tuple[str, ...]) -> dict[str, Any]:
    from altopt.fast_rcnn import FastRCNNTraining
    from altopt.sampling import RoIRule
    from stages.training import CachedProposals, Training, box_statistics, trainable_entries

    name = "train_fast_rcnn" if freeze is not None else "train_fast_rcnn_frozen_conv"
    training = Training(name, init, out, config, runtime)
    cached = CachedProposals(proposals, training.dataset, config.proposals)
    rule = RoIRule(config.fg_iou, config.bg_iou_high, config.bg_iou_low)
    entries, unusable = trainable_entries(training, cached, rule)
    network = training.network(("conv", "fc", "head"), fresh)
    training.freeze(network, freeze)
    network.use_box_statistics(*box_statistics(training, cached, config.box_statistics, config.fg_iou))
    network.set_dropout(config.dropout)
    module = FastRCNNTraining(
        network.conv, network.fc, network.head, roi_size=network.roi_size, rule=rule,
        rois_per_image=max(1, config.rois_per_batch // config.images_per_batch), fg_fraction=config.fg_fraction,
        box_weight=config.box_weight, key=training.key,
    )
    if freeze is None:
        facts = training.run_on_frozen(network.conv, module, entries, cached)
    else:
        facts = training.run(module, entries, cached)
    training.save(network, ["conv", "fc", "head"])
    return facts | {"pictures_without_rois": unusable}
