"""Every stage's own step.

A step is what the stage does for one batch, from reading the images on, by the functions that the stage itself calls:
the modules that it trains, the training loop's step, the store, what makes proposals and detections. Weights are drawn
at random and the learning rate is 0, so that all contenders keep equal weights; the arithmetic is that of any rate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altopt.batches.samples import Sample, make_batch
from altopt.config import Pixels, TrainingConfig
from altopt.machine.distributed import SingleProcess
from altopt.models.detector import FasterRCNN
from altopt.models.joint import CoordinatePath, JointTraining
from altopt.models.losses import LossModule
from altopt.training.loop import make_optimizer, state_of, train_step
from benchmarks.bench.compiled_trunk import CompiledTrunk
from benchmarks.bench.contender import Contender, Identity, Precision
from benchmarks.bench.workplace import Workplace
from cache.checkpoints import save_checkpoint
from cache.snapshots import save_snapshot
from stages.shared.detection import Detect, detected
from stages.shared.training import describe_network
from stages.steps.assemble import Assemble, add_rpn_layers
from stages.steps.fast_rcnn import TrainFastRCNN, TrainFastRCNNFrozenConv, fast_rcnn_training
from stages.steps.joint import TrainApproximateJoint, TrainExactJoint, joint_training
from stages.steps.proposals import GenerateProposals, proposed
from stages.steps.rpn import TrainRPN, TrainRPNFrozenConv, rpn_training

STAGE_OF: dict[type, str] = {
    TrainRPN: "train_rpn", TrainFastRCNN: "train_fast_rcnn", TrainRPNFrozenConv: "train_rpn_frozen_conv",
    TrainFastRCNNFrozenConv: "train_fast_rcnn_frozen_conv", TrainApproximateJoint: "train_approximate_joint",
    TrainExactJoint: "train_exact_joint",
}
NAMES = (*STAGE_OF.values(), "generate_proposals", "feature_store", "detect", "add_rpn_layers")
FROZEN = (TrainRPNFrozenConv, TrainFastRCNNFrozenConv)


@dataclass(kw_only=True)
class Trained(Contender):
    """A stage that trains, by the training loop's own step."""

    read: Callable[[int], list[Sample]]
    config: TrainingConfig
    device: torch.device
    snapshot: Path

    def step(self, iteration: int) -> None:
        """Read the images, make a batch of them, take a step."""
        assert isinstance(self.optimizer, torch.optim.SGD)
        assert isinstance(self.module, LossModule)
        with self.watch.part("decode"):
            samples = self.read(iteration)
        samples = [self.module.prepare(sample, iteration) for sample in samples]
        if self.device.type == "cuda":
            samples = [sample.pinned() for sample in samples]
        with self.watch.part("decode"):
            batch = make_batch(samples, self.device, iteration)
        train_step(self.module, self.optimizer, batch, self.config, SingleProcess())

    def write_snapshot(self) -> None:
        """Write a snapshot, as the training loop does from time to time, and remove it."""
        assert isinstance(self.optimizer, torch.optim.SGD)
        save_snapshot(self.snapshot, key="bench", iteration=0, tensors=state_of(self.module, self.optimizer), seconds=0)
        self.snapshot.unlink()


@dataclass(kw_only=True)
class Computed(Contender):
    """A stage that computes something for each image and learns nothing."""

    read: Callable[[int], list[Sample]]
    compute: Callable[[Any, int], None]
    device: torch.device

    def step(self, iteration: int) -> None:
        """Read the image, make a batch of it, compute."""
        with self.watch.part("decode"):
            batch = make_batch(self.read(iteration), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.identity.precision == "bfloat16"):
            self.compute(batch, iteration)


@dataclass(kw_only=True)
class Called(Contender):
    """A whole function as one step."""

    function: Callable[[], object]

    def step(self, iteration: int) -> None:
        """Call it."""
        self.function()


def stage_contenders(place: Workplace, names: set[str], precisions: tuple[Precision, ...],
                     compiled: bool) -> Iterator[Contender]:
    """Yield the stages of those names in each precision, without and with stored maps of the frozen layers."""
    trainings = _Trainings(place)
    for precision in precisions:
        yield from trainings.contenders(precision, names, compiled)
        yield from _computed(place, precision, names)
    if "add_rpn_layers" in names:
        yield _assembling(place)


class _Trainings:
    """The stages that train. Precisions, and maps stored or not, share a module and its optimizer."""

    def __init__(self, workplace: Workplace) -> None:
        self.place = workplace
        self.made: dict[str, tuple[nn.Module, torch.optim.SGD]] = {}

    def contenders(self, precision: Precision, names: set[str], compiled: bool) -> Iterator[Contender]:
        """Yield those of the names, without and with a store of what their frozen layers make."""
        for kind, make in ((TrainRPN, rpn_training), (TrainFastRCNN, fast_rcnn_training),
                           (TrainRPNFrozenConv, rpn_training), (TrainFastRCNNFrozenConv, fast_rcnn_training),
                           (TrainApproximateJoint, _approximate), (TrainExactJoint, _exact)):
            name = STAGE_OF[kind]
            if name in names:
                for store in (False, True)[: 1 + (kind in FROZEN)]:
                    yield self._trained(Identity(name, precision, store), kind, make)
        if compiled:
            identity = Identity("train_approximate_joint", precision, compiled=True)
            yield self._trained(identity, TrainApproximateJoint, self._compiled)

    def _trained(self, identity: Identity, kind: type, make: Callable[..., nn.Module]) -> Contender:
        place = self.place
        config = place.config(kind, identity.precision)
        key = f"{identity.name} {identity.compiled}"
        network = place.frozen if kind in FROZEN else place.learning
        if key not in self.made:
            module = make(network, config, (0, identity.name))
            optimizer = make_optimizer(module, config)
            place.watch.watch_training(module, optimizer)
            self.made[key] = module, optimizer
        module, optimizer = self.made[key]
        read = place.reader(config.images_per_batch, proposals="fast_rcnn" in identity.name,
                            store=place.store(identity.precision) if identity.store else None)
        return Trained(identity=identity, images=config.images_per_batch, watch=place.watch, module=module,
                       optimizer=optimizer, read=read, config=config, device=place.device,
                       snapshot=place.folder / "snapshot.safetensors")

    def _compiled(self, network: FasterRCNN, config: TrainApproximateJoint, key: tuple[object, ...]) -> nn.Module:
        module = _approximate(network, config, key)
        trunk = CompiledTrunk(network.conv)
        module.trunk.conv = trunk
        self.place.watch.watch_module(trunk, "trunk")
        return module


def _approximate(network: FasterRCNN, config: Any, key: tuple[object, ...]) -> JointTraining:
    network.samples_per_bin = 0
    return joint_training(network, config, None, key)


def _exact(network: FasterRCNN, config: Any, key: tuple[object, ...]) -> nn.Module:
    """Return exact joint training with the coordinates' path open, as it is after the warm-up."""
    network.samples_per_bin = config.samples_per_bin
    module = joint_training(network, config, CoordinatePath(0, config.coordinate_clip), key)
    network.samples_per_bin = 0
    return module


def _computed(place: Workplace, precision: Precision, names: set[str]) -> Iterator[Contender]:
    """Yield what learns nothing: proposals from images and from stored maps, the store, detection."""
    network = place.frozen
    shared: dict[str, Any] = {"watch": place.watch, "module": network}
    rule, detection = place.config(GenerateProposals, precision), place.config(Detect, precision)

    def propose(batch: Any, iteration: int) -> None:
        for id, boxes, scores in proposed(network, batch, place.dataset, rule):
            with place.watch.part("write"):
                place.writer.append(f"{id} {next(place.numbers)}", boxes, scores)

    detector = place.rounded() if precision == "bfloat16" and "detect" in names else network

    @torch.inference_mode()
    def detect(batch: Any, iteration: int) -> None:
        detected(detector, detector, batch, [place.dataset.size(each.id) for each in batch.samples], detection)

    if "generate_proposals" in names:
        for store in (False, True):
            read = place.reader(1, store=place.store(precision) if store else None)
            yield Computed(identity=Identity("generate_proposals", precision, store), images=1, read=read,
                           compute=propose, device=place.device, **shared)
    if "feature_store" in names:
        yield Called(identity=Identity("feature_store", precision), images=len(place.dataset.ids),
                     function=partial(place.build_store, precision), **shared)
    if "detect" in names:
        yield Computed(identity=Identity("detect", precision), images=1, read=place.reader(1), compute=detect,
                       device=place.device, **(shared | {"module": detector}))


def _assembling(place: Workplace) -> Contender:
    """Return stage 7, on checkpoints of the network written for it."""
    network, paths = place.frozen, [place.folder / f"{name}.safetensors" for name in ("M4", "M3", "M5")]

    def assemble() -> None:
        add_rpn_layers(*paths[:2], out=paths[2], config=Assemble(), runtime=place.runtime)

    description = describe_network(place.network, place.dataset.classes, Pixels())
    for path, parts in zip(paths, (("conv", "fc", "head"), ("conv", "rpn")), strict=False):
        save_checkpoint(path, network.tensors(parts), description)
    return Called(identity=Identity("add_rpn_layers", "float32"), images=0, watch=place.watch, module=network,
                  function=assemble, steps=1)
