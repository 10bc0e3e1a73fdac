"""Stages 1 and 4: training a region proposal network, with its conv layers and on top of frozen ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from altopt.config import AnchorTargets, setting
from stages.shared.stage_config import Freeze, TrainsOnImages, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.models.detector import FasterRCNN
    from altopt.models.rpn import RPNTraining


@dataclass(frozen=True, kw_only=True)
class RPNConfig(AnchorTargets, TrainsOnImages):
    """How an RPN is trained: anchors labelled by IoU, sampled, scored (Faster R-CNN, section 3.1)."""

    version: ClassVar[int] = 4  # the losses of a batch are one sum
    keeps_parts: ClassVar[bool] = True
    box_weight: float = setting(1.0, "py-faster-rcnn train.pt loss_weight", at_least=0)

    @property
    def work(self) -> Work:
        """A batch of images through conv layers and RPN."""
        return Work(("conv", "rpn"), self.images_per_batch)


@dataclass(frozen=True, kw_only=True)
class TrainRPN(RPNConfig):
    """Stage 1, where the later conv blocks learn too."""

    freeze: tuple[str, ...] = setting(
        ("conv1", "conv2"), "py-faster-rcnn stage1_rpn_train.pt: conv1_1 to conv2_2 at rate 0", distinct=True)


@dataclass(frozen=True, kw_only=True)
class TrainRPNFrozenConv(RPNConfig):
    """Stage 4, where all conv layers stay as they are."""

    freeze: ClassVar[Freeze] = "all"


def train_rpn(init: Path, *, out: Path, config: TrainRPN, runtime: Runtime) -> Facts:
    """Train an RPN, and the conv layers under it, from pre-trained weights."""
    return _train("train_rpn", init, out, config, runtime)


def train_rpn_frozen_conv(init: Path, *, out: Path, config: TrainRPNFrozenConv, runtime: Runtime) -> Facts:
    """Train an RPN on top of a detector's conv layers, which do not change."""
    return _train("train_rpn_frozen_conv", init, out, config, runtime)


def _train(name: str, init: Path, out: Path, config: RPNConfig, runtime: Runtime) -> Facts:
    from stages.shared.training import Training

    training = Training(name, init, out, config, runtime)
    network = training.network(("conv", "rpn"))
    training.freeze(network)
    module = rpn_training(network, config, training.seed)
    with training.stored_maps(network.conv):
        facts = training.run(module, training.entries(), lambda entry, _: training.sample(entry))
    held = {name.partition(".")[0] for name in training.tensors}
    # What the detector has learned goes along, for a later stage that continues it.
    training.save(network, ["conv", "rpn", *(part for part in ("fc", "head") if part in held)])
    return facts


def rpn_training(network: "FasterRCNN", config: RPNConfig, seed: tuple[object, ...]) -> "RPNTraining":
    """Return what the training loop trains: conv layers and RPN, from a batch to the two losses of the config."""
    from altopt.models.rpn import AnchorSampling, RPNTraining

    anchors = AnchorSampling(config.positive_iou, config.negative_iou, config.anchors_per_image,
                             config.positive_fraction)
    return RPNTraining(network.conv, network.rpn, anchors=anchors, sigma=config.sigma, box_weight=config.box_weight,
                       seed=seed)
