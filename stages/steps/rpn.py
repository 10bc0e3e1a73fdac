"""Stages 1 and 4: training a region proposal network, with its conv layers and on top of frozen ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from altopt.config import TrainingConfig, sourced
from stages.shared.split_config import OnTrainSplit
from stages.shared.step import Runtime

if TYPE_CHECKING:
    from altopt.models.detector import FasterRCNN
    from altopt.models.rpn import RPNTraining

TARGETS = "Faster R-CNN, section 3.1.2"


@dataclass(frozen=True, kw_only=True)
class RPNConfig(TrainingConfig, OnTrainSplit):
    """How an RPN is trained: anchors labelled by IoU, sampled, scored (Faster R-CNN, section 3.1)."""

    version: ClassVar[int] = 1
    stores_maps: ClassVar[bool] = True
    positive_iou: float = sourced(0.7, TARGETS)
    negative_iou: float = sourced(0.3, TARGETS)
    anchors_per_image: int = sourced(256, "Faster R-CNN, section 3.1.3; pfr RPN_BATCHSIZE")
    positive_fraction: float = sourced(0.5, "Faster R-CNN, section 3.1.3; pfr RPN_FG_FRACTION")
    sigma: float = sourced(3.0, "pfr train.pt: smooth L1 of the RPN is quadratic below 1/9")
    box_weight: float = sourced(1.0, "pfr train.pt loss_weight")
    init: str = sourced("", "the list's own")


@dataclass(frozen=True, kw_only=True)
class TrainRPN(RPNConfig):
    """Stage 1, where the later conv blocks learn too."""

    version: ClassVar[int] = 4  # the loss of a batch is one sum
    freeze: tuple[str, ...] = sourced(("conv1", "conv2"), "pfr stage1_rpn_train.pt: conv1_1 to conv2_2 at rate 0")


@dataclass(frozen=True, kw_only=True)
class TrainRPNFrozenConv(RPNConfig):
    """Stage 4, where all conv layers stay as they are."""

    version: ClassVar[int] = 4  # the loss of a batch is one sum


def train_rpn(init: Path, *, out: Path, config: TrainRPN, runtime: Runtime) -> dict[str, Any]:
    """Train an RPN, and the conv layers under it, from pre-trained weights."""
    return _train("train_rpn", init, out, config, runtime, config.freeze)


def train_rpn_frozen_conv(init: Path, *, out: Path, config: TrainRPNFrozenConv, runtime: Runtime) -> dict[str, Any]:
    """Train an RPN on top of a detector's conv layers, which do not change."""
    return _train("train_rpn_frozen_conv", init, out, config, runtime, "all")


def _train(name: str, init: Path, out: Path, config: RPNConfig, runtime: Runtime,
           freeze: tuple[str, ...] | Literal["all"]) -> dict[str, Any]:
    from stages.shared.training import Training

    training = Training(name, init, out, config, runtime)
    network = training.network(("conv", "rpn"))
    training.freeze(network, freeze)
    module = rpn_training(network, config, training.seed)
    facts = training.run(network.conv, module, training.entries(), None)
    kept = [part for part in ("fc", "head") if part in training.parts]
    training.save(network, ["conv", "rpn", *kept])
    return facts


def rpn_training(network: "FasterRCNN", config: RPNConfig, seed: tuple[object, ...]) -> "RPNTraining":
    """Return what the training loop trains: conv layers and RPN, from a batch to the two losses of the config."""
    from altopt.models.rpn import AnchorSampling, RPNTraining

    anchors = AnchorSampling(config.positive_iou, config.negative_iou, config.anchors_per_image,
                             config.positive_fraction)
    return RPNTraining(network.conv, network.rpn, anchors=anchors, sigma=config.sigma, box_weight=config.box_weight,
                       seed=seed)
