"""Who is timed: every stage's own step on generated pictures, and the same work by torchvision.

A step is what the stage does for one batch, from reading the pictures on, by the functions that the stage itself calls:
the modules that it trains, the training loop's step, the store, what makes proposals and detections. Weights are drawn
at random and the learning rate is 0, so that all contenders keep equal weights; the arithmetic is that of any rate.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import altopt.detector
import altopt.fast_rcnn
import altopt.joint
import altopt.rpn
import cache.checkpoints
import stages.feature_maps
from altopt import backbones
from altopt.box_statistics import fixed_statistics
from altopt.config import NetworkConfig, TrainingConfig
from altopt.datasets.dataset import Dataset
from altopt.detector import FasterRCNN, initialise
from altopt.errors import UsageError
from altopt.joint import CoordinatePath
from altopt.pictures import Sample, make_batch, read_sample, stored_sample
from altopt.randomness import generator
from altopt.ranks import Ranks
from altopt.stopwatch import Stopwatch
from altopt.torchvision_detector import torchvision_detector, torchvision_input
from altopt.training import freeze, layers_named, make_optimizer, state_of, take_step
from cache.checkpoints import save_checkpoint
from cache.features import FeatureMapWriter
from cache.proposals import ProposalWriter
from cache.snapshots import save_snapshot
from stages.assemble import Assemble, add_rpn_layers
from stages.bench.memory import held_bytes
from stages.bench.pictures import data_config, draw_pictures, write_proposals
from stages.detect import Detect, detected
from stages.fast_rcnn import TrainFastRCNN, TrainFastRCNNFrozenConv, fast_rcnn_training
from stages.feature_store import FeatureStore
from stages.joint import TrainApproximateJoint, TrainExactJoint, joint_training
from stages.proposals import GenerateProposals, proposed
from stages.rpn import TrainRPN, TrainRPNFrozenConv, rpn_training
from stages.step import Runtime
from stages.training import CachedProposals, describe_network

Precision = Literal["float32", "bfloat16"]
CONTENDERS = ("train_rpn", "generate_proposals", "train_fast_rcnn", "feature_store", "train_rpn_frozen_conv",
              "train_fast_rcnn_frozen_conv", "add_rpn_layers", "train_approximate_joint", "train_exact_joint",
              "detect", "torchvision_training", "torchvision_detection")
STAGE_OF: dict[type, str] = {
    TrainRPN: "train_rpn", TrainFastRCNN: "train_fast_rcnn", TrainRPNFrozenConv: "train_rpn_frozen_conv",
    TrainFastRCNNFrozenConv: "train_fast_rcnn_frozen_conv", TrainApproximateJoint: "train_approximate_joint",
    TrainExactJoint: "train_exact_joint",
}
# Functions that stages call, and the part of a step that they are.
WATCHED = [
    (altopt.rpn, "label_anchors", "sampling"), (altopt.rpn, "sample_anchors", "sampling"),
    (altopt.fast_rcnn, "sample_rois", "sampling"), (altopt.joint, "sample_rois", "sampling"),
    (altopt.fast_rcnn, "roi_pool", "roi_pool"), (altopt.joint, "pool_rois", "roi_pool"),
    (altopt.detector, "pool_rois", "roi_pool"), (altopt.detector, "proposals_of", "rpn"),
    (altopt.joint, "scored_boxes", "rpn"), (altopt.joint, "kept_boxes", "rpn"),
    (altopt.detector, "detections_of", "head"), (stages.feature_maps, "read_sample", "decode"),
    (stages.feature_maps, "make_batch", "decode"), (FeatureMapWriter, "write", "write"),
    (FeatureMapWriter, "__exit__", "write"), (cache.checkpoints, "save_checkpoint", "write"),
]


@dataclass(frozen=True)
class Identity:
    """What a contender is: the stage's function, or torchvision's part, and how it is done."""

    name: str
    precision: Precision
    store: bool = False  # reads stored maps of the frozen conv layers
    compiled: bool = False  # the conv layers went through torch.compile

    def __str__(self) -> str:
        marks = ["store"] * self.store + ["compiled"] * self.compiled
        return ", ".join([self.name, *marks, self.precision])


@dataclass(kw_only=True)
class Contender(ABC):
    """Something that takes steps; what ``prepare`` and ``finish`` do around a step is not timed."""

    identity: Identity
    pictures: int
    watch: Stopwatch
    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    steps: int | None = None  # how many at most; None is as many as there are rounds

    def prepare(self) -> None:
        """Bring the module into the mode that the step needs: contenders share networks."""
        self.module.train(self.optimizer is not None)

    @abstractmethod
    def step(self, iteration: int) -> None:
        """Do the work of one step."""

    def finish(self) -> None:
        """Let go of what the step left behind."""
        self.module.zero_grad(set_to_none=True)

    def held(self) -> int:
        """Return the bytes that it holds between steps."""
        return held_bytes(self.module, self.optimizer)


@dataclass(kw_only=True)
class Trained(Contender):
    """A stage that trains, by the training loop's own step."""

    read: Callable[[int], list[Sample]]
    config: TrainingConfig
    device: torch.device
    snapshot: Path

    def step(self, iteration: int) -> None:
        """Read the pictures, make a batch of them, take a step."""
        assert isinstance(self.optimizer, torch.optim.SGD)
        with self.watch.part("decode"):
            batch = make_batch(self.read(iteration), self.device)
        take_step(self.module, self.optimizer, batch, self.config, iteration, (0, self.identity.name), Ranks())

    def write_snapshot(self) -> None:
        """Write a snapshot, as the training loop does from time to time, and remove it."""
        assert isinstance(self.optimizer, torch.optim.SGD)
        save_snapshot(self.snapshot, key="bench", iteration=0, tensors=state_of(self.module, self.optimizer), seconds=0)
        self.snapshot.unlink()


@dataclass(kw_only=True)
class Computed(Contender):
    """A stage that computes something for each picture and learns nothing."""

    read: Callable[[int], list[Sample]]
    compute: Callable[[Any, int], None]
    device: torch.device

    def step(self, iteration: int) -> None:
        """Read the picture, make a batch of it, compute."""
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


@dataclass(kw_only=True)
class TorchvisionTrained(Contender):
    """torchvision's detector, trained as its users do: autocast around the model, and SGD."""

    read: Callable[[int], list[Sample]]
    device: torch.device

    def step(self, iteration: int) -> None:
        """Read the picture and take a step."""
        assert self.optimizer is not None
        with self.watch.part("decode"):
            pictures, targets = zip(*(torchvision_input(each, self.device) for each in self.read(iteration)),
                                    strict=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.identity.precision == "bfloat16"):
            losses: dict[str, Tensor] = self.module(list(pictures), list(targets))
            total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


@dataclass(kw_only=True)
class TorchvisionDetecting(Contender):
    """torchvision's detector on a picture."""

    read: Callable[[int], list[Sample]]
    device: torch.device

    @torch.inference_mode()
    def step(self, iteration: int) -> None:
        """Read the picture and detect."""
        with self.watch.part("decode"):
            pictures = [torchvision_input(each, self.device)[0] for each in self.read(iteration)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.identity.precision == "bfloat16"):
            found = self.module(pictures)
        for each in found:
            for tensor in each.values():
                tensor.cpu()


@dataclass
class Workplace:
    """Everything that the contenders of one network, size of picture and device share; a context for its files."""

    network_name: str
    size: tuple[int, int]
    device: torch.device
    folder: Path
    watch: Stopwatch
    dataset: Dataset = field(init=False)
    stores: dict[str, FeatureStore] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.dataset = draw_pictures(self.folder, self.size)
        write_proposals(self.folder / "P.h5", self.dataset)
        self.cached = CachedProposals(self.folder / "P.h5", self.dataset, 2000)
        channels = backbones.build(self.network_name).channels
        self.network = NetworkConfig(name=self.network_name, short_side=min(self.size),  # type: ignore[arg-type]
                                     max_side=max(self.size), rpn_channels=channels)
        self.writer = ProposalWriter(self.folder / "written.h5", {"dataset": "bench", "model": "bench"})
        self.runtime = Runtime(feature_store="on", data_digest="bench", workers=0)
        self.learning = self._learning()
        self.frozen = copy.deepcopy(self.learning)
        freeze(self.learning, [f"conv.{name}" for name in layers_named(self.learning.conv, ("conv1", "conv2"))])
        freeze(self.frozen, ["conv"])
        for network in (self.learning, self.frozen):
            network.to(self.device).to(memory_format=torch.channels_last)
            for part, name in (("conv", "trunk"), ("rpn", "rpn"), ("fc", "head"), ("head", "head")):
                self.watch.watch_module(getattr(network, part), name)

    def _learning(self) -> FasterRCNN:
        random = generator("bench", self.network_name)
        conv = backbones.build(self.network_name).conv
        initialise(conv, random)
        network = FasterRCNN(self.network, len(self.dataset.classes))
        network.fill({f"conv.{name}": tensor for name, tensor in conv.state_dict().items()}, random)
        network.use_box_statistics(*fixed_statistics(len(self.dataset.classes)))
        return network

    def config(self, kind: type, precision: Precision = "float32") -> Any:
        """Return the stage's config with py-faster-rcnn's numbers, a learning rate of 0 and no mirror images."""
        fixed = {"network": self.network, "data": data_config(self.size), "precision": precision}
        return kind(**fixed, **({"lr": 0.0, "flips": False} if issubclass(kind, TrainingConfig) else {}))

    def reader(self, count: int, proposals: bool = False,
               store: FeatureStore | None = None) -> Callable[[int], list[Sample]]:
        """Return what reads the pictures of an iteration, or their stored maps, as the training stages do."""
        def read_one(id: str) -> Sample:
            boxes = self.cached.get(id) if proposals else None
            if store is not None:
                return stored_sample(self.dataset, id, self.network, store.map_of(id, False), proposals=boxes)
            return read_sample(self.dataset, id, self.network, proposals=boxes)

        ids = self.dataset.ids
        return lambda iteration: [read_one(ids[(iteration + k) % len(ids)]) for k in range(count)]

    def store(self, precision: Precision) -> FeatureStore:
        """Return the store of the frozen network's maps, built when first asked for."""
        if precision not in self.stores:
            self.stores[precision] = self._new_store("stored", precision)
            self.stores[precision].find_or_build(flips=False, visits=1)
        return self.stores[precision]

    def _new_store(self, name: str, precision: Precision) -> FeatureStore:
        return FeatureStore(self.folder / name / "M3.safetensors", self.frozen.conv, self.network, self.dataset,
                            self.runtime, precision=precision, device=self.device)

    def build_store(self, precision: Precision) -> None:
        """Build a store anew, of all pictures."""
        for path in (self.folder / "built" / "features").glob("*.h5"):
            path.unlink()
        with self._new_store("built", precision) as store:
            store.find_or_build(flips=False, visits=1)

    def __enter__(self) -> "Workplace":
        """Open the file that proposals are written to."""
        self.writer.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Close it, and the stores."""
        self.writer.__exit__(*exc)
        for store in self.stores.values():
            store.__exit__(*exc)


def all_contenders(workplace: Workplace, names: set[str], precisions: tuple[Precision, ...],
                   compiled: bool) -> Iterator[Contender]:
    """Yield the contenders of those names; altopt's in the given precisions, torchvision's in both."""
    trained = _Trainings(workplace)
    for precision in precisions:
        yield from trained.contenders(precision, names, compiled)
        yield from _computed(workplace, precision, names)
    if "add_rpn_layers" in names:
        yield _assembling(workplace)
    yield from _torchvision(workplace, names)


class _Trainings:
    """The stages that train. Precisions, and maps stored or not, share a module and its optimizer."""

    def __init__(self, workplace: Workplace) -> None:
        self.place = workplace
        self.made: dict[str, tuple[nn.Module, torch.optim.SGD]] = {}

    def contenders(self, precision: Precision, names: set[str], compiled: bool) -> Iterator[Contender]:
        """Yield those of the names, frozen ones without and with a store."""
        for kind, make in ((TrainRPN, rpn_training), (TrainFastRCNN, fast_rcnn_training),
                           (TrainRPNFrozenConv, rpn_training), (TrainFastRCNNFrozenConv, fast_rcnn_training),
                           (TrainApproximateJoint, _approximate), (TrainExactJoint, _exact)):
            name = STAGE_OF[kind]
            if name in names:
                for store in (False, True) if getattr(kind, "frozen_conv", False) else (False,):
                    yield self._trained(Identity(name, precision, store), kind, make)
        if compiled:
            identity = Identity("train_approximate_joint", precision, compiled=True)
            yield self._trained(identity, TrainApproximateJoint, self._compiled)

    def _trained(self, identity: Identity, kind: type, make: Callable[..., nn.Module]) -> Contender:
        place = self.place
        config = place.config(kind, identity.precision)
        key = f"{identity.name} {identity.compiled}"
        if key not in self.made:
            network = place.frozen if getattr(kind, "frozen_conv", False) else place.learning
            module = make(network, config, (0, identity.name))
            optimizer = make_optimizer(module, config)
            place.watch.watch_training(module, optimizer)
            self.made[key] = module, optimizer
        module, optimizer = self.made[key]
        read = place.reader(config.images_per_batch, proposals="fast_rcnn" in identity.name,
                            store=place.store(identity.precision) if identity.store else None)
        return Trained(identity=identity, pictures=config.images_per_batch, watch=place.watch, module=module,
                       optimizer=optimizer, read=read, config=config, device=place.device,
                       snapshot=place.folder / "snapshot.safetensors")

    def _compiled(self, network: FasterRCNN, config: TrainApproximateJoint, key: tuple[object, ...]) -> nn.Module:
        module = _approximate(network, config, key)
        conv = copy.deepcopy(network.conv)  # without the watch's hooks, which would break the graph
        for layer in conv.modules():
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
        module.conv = CompiledTrunk(conv)
        self.place.watch.watch_module(module.conv, "trunk")
        return module


class CompiledTrunk(nn.Module):
    """Conv layers by way of torch.compile, which says in one line why it cannot."""

    def __init__(self, conv: nn.Sequential) -> None:
        super().__init__()
        self.compiled = torch.compile(conv)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature maps; UsageError where there is no compiler."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            features: Tensor = self.compiled(images)
        except (TorchDynamoException, RuntimeError, OSError) as error:
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"--compile: torch.compile does not work here ({cause}): install a C++ compiler such as "
                             "g++ with Python's headers, or leave --compile out") from None
        return features


def _approximate(network: FasterRCNN, config: Any, key: tuple[object, ...]) -> nn.Module:
    network.samples_per_bin = 0
    return joint_training(network, config, None, key)


def _exact(network: FasterRCNN, config: Any, key: tuple[object, ...]) -> nn.Module:
    """Return exact joint training with the coordinates' path open, as it is after the warm-up."""
    network.samples_per_bin = config.samples_per_bin
    module = joint_training(network, config, CoordinatePath(0, config.coordinate_clip), key)
    network.samples_per_bin = 0
    return module


def _computed(place: Workplace, precision: Precision, names: set[str]) -> Iterator[Contender]:
    """Yield what learns nothing: proposals from pictures and from stored maps, the store, detection."""
    network, shared = place.frozen, {"watch": place.watch, "module": place.frozen}
    rule, detection = place.config(GenerateProposals, precision), place.config(Detect, precision)

    def propose(batch: Any, iteration: int) -> None:
        for id, boxes, scores in proposed(network, batch, place.dataset, rule):
            with place.watch.part("write"):
                place.writer.append(f"{id} {next(place.numbers)}", boxes, scores)

    @torch.inference_mode()
    def detect(batch: Any, iteration: int) -> None:
        detected(network, network, batch, place.dataset, detection)

    if "generate_proposals" in names:
        for store in (False, True):
            read = place.reader(1, store=place.store(precision) if store else None)
            yield Computed(identity=Identity("generate_proposals", precision, store), pictures=1, read=read,
                           compute=propose, device=place.device, **shared)
    if "feature_store" in names:
        yield Called(identity=Identity("feature_store", precision), pictures=len(place.dataset.ids),
                     function=lambda: place.build_store(precision), **shared)
    if "detect" in names:
        yield Computed(identity=Identity("detect", precision), pictures=1, read=place.reader(1), compute=detect,
                       device=place.device, **shared)


def _assembling(place: Workplace) -> Contender:
    """Return stage 7, on checkpoints of the network written for it."""
    network, paths = place.frozen, [place.folder / f"{name}.safetensors" for name in ("M4", "M3", "M5")]

    def assemble() -> None:
        add_rpn_layers(*paths[:2], out=paths[2], config=Assemble(), runtime=place.runtime)

    description = describe_network(place.network, place.dataset.classes)
    for path, parts in zip(paths, (("conv", "fc", "head"), ("conv", "rpn")), strict=False):
        save_checkpoint(path, network.tensors(parts), description)
    return Called(identity=Identity("add_rpn_layers", "float32"), pictures=0, watch=place.watch, module=network,
                  function=assemble, steps=1)


def _torchvision(place: Workplace, names: set[str]) -> Iterator[Contender]:
    """Yield torchvision's detector in its default form and under autocast, training and detecting."""
    if not names & {"torchvision_training", "torchvision_detection"}:
        return
    joint, detect = place.config(TrainApproximateJoint), place.config(Detect)
    model = torchvision_detector(place.learning, place.network, joint, detect, joint.rois_per_batch).to(place.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=joint.momentum, weight_decay=joint.weight_decay)
    _watch_torchvision(place.watch, model, optimizer)
    shared: dict[str, Any] = {"pictures": 1, "watch": place.watch, "module": model, "read": place.reader(1),
                              "device": place.device}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        if "torchvision_training" in names:
            yield TorchvisionTrained(identity=Identity("torchvision_training", precision), optimizer=optimizer,
                                     **shared)
        if "torchvision_detection" in names:
            yield TorchvisionDetecting(identity=Identity("torchvision_detection", precision), **shared)


def _watch_torchvision(watch: Stopwatch, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Divide torchvision's steps into the same parts; its RPN makes proposals and losses too, and samples anchors."""
    heads = model.roi_heads
    for module, part in ((model.transform, "decode"), (model.backbone, "trunk"), (model.rpn, "rpn"),
                         (heads.box_roi_pool, "roi_pool"), (heads.box_head, "head"), (heads.box_predictor, "head")):
        watch.watch_module(module, part)
    for owner, name, part in ((model.rpn, "assign_targets_to_anchors", "sampling"),
                              (model.rpn, "fg_bg_sampler", "sampling"),
                              (heads, "select_training_samples", "sampling"),
                              (heads, "postprocess_detections", "head")):
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    watch.watch_training(model, optimizer)


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Tell the watch of the functions that stages call, during the block."""
    with watch.worn(WATCHED):
        yield
