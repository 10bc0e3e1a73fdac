"""Where contenders meet: one network, one size of image, one device, and what they share of it."""

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altopt.batches.samples import Sample, read_sample
from altopt.config import NetworkConfig, Pixels, TrainingConfig
from altopt.datasets.dataset import Dataset
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.detector import FasterRCNN
from altopt.models.network_parts import initialise_all
from altopt.training.box_statistics import fixed_statistics
from altopt.training.loop import freeze, layers_named
from benchmarks.bench.contender import Precision
from benchmarks.bench.images import PROPOSALS, data_config, draw_images, write_proposals
from benchmarks.bench.stopwatch import Stopwatch
from cache.proposals import ProposalWriter
from stages.shared.feature_store import FeatureStore
from stages.shared.step import Runtime
from stages.shared.training import CachedProposals


@dataclass
class Workplace:
    """Everything that the contenders of one network, size of image and device share; a context for its files."""

    network_name: str
    size: tuple[int, int]
    device: torch.device
    folder: Path
    watch: Stopwatch
    dataset: Dataset = field(init=False)
    stores: dict[Precision, FeatureStore] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.dataset = draw_images(self.folder, self.size)
        write_proposals(self.folder / "P.h5", self.dataset)
        self.cached = CachedProposals(self.folder / "P.h5", self.dataset, PROPOSALS)
        with torch.device("meta"):
            backbone = backbones.build(self.network_name)
        self.network = NetworkConfig(name=self.network_name, short_side=min(self.size),  # type: ignore[arg-type]
                                     max_side=max(self.size), rpn_channels=backbone.channels)
        self.writer = ProposalWriter(self.folder / "written.h5", {"dataset": "bench", "model": "bench"})
        self.runtime = Runtime(feature_store="on", data_digest="bench", workers=0)
        self.learning = self._learning(backbone.conv)
        self.frozen = copy.deepcopy(self.learning)
        freeze(self.learning, [f"conv.{name}" for name in layers_named(self.learning.conv, ("conv1", "conv2"))])
        freeze(self.frozen, ["conv"])
        for network in (self.learning, self.frozen):
            network.to(self.device).to(memory_format=torch.channels_last)
            for part, name in (("conv", "trunk"), ("rpn", "rpn"), ("fc", "head"), ("head", "head")):
                self.watch.watch_module(getattr(network, part), name)

    def _learning(self, conv: nn.Sequential) -> FasterRCNN:
        random = generator("bench", self.network_name)
        conv.to_empty(device="cpu")
        initialise_all(conv, random)
        network = FasterRCNN(self.network, len(self.dataset.classes))
        network.fill({f"conv.{name}": tensor for name, tensor in conv.state_dict().items()}, random)
        network.use_box_statistics(*fixed_statistics(len(self.dataset.classes)))
        return network

    def rounded(self) -> FasterRCNN:
        """Return the network as a stage in bfloat16 detects with it."""
        network = copy.copy(self.frozen)
        network._modules = dict(self.frozen._modules)
        network.fc = copy.deepcopy(self.frozen.fc)
        network.round_fc()
        return network

    def config(self, kind: type, precision: Precision = "float32") -> Any:
        """Return the stage's config with py-faster-rcnn's numbers, a learning rate of 0 and no mirror images."""
        fixed = {"network": self.network, "data": data_config(self.size), "precision": precision}
        return kind(**fixed, **({"lr": 0.0, "flips": False} if issubclass(kind, TrainingConfig) else {}))

    def reader(self, count: int, proposals: bool = False,
               store: FeatureStore | None = None) -> Callable[[int], list[Sample]]:
        """Return what reads the images of an iteration, or their stored maps, as the training stages do."""
        def read_one(id: str) -> Sample:
            boxes = self.cached.get(id) if proposals else None
            if store is not None:
                return store.sample(id, proposals=boxes)
            return read_sample(self.dataset, id, self.network, proposals=boxes)

        ids = self.dataset.ids
        return lambda iteration: [read_one(ids[(iteration + k) % len(ids)]) for k in range(count)]

    def store(self, precision: Precision) -> FeatureStore:
        """Return the store of what the frozen conv layers make of the images, built when first asked for."""
        if precision not in self.stores:
            self.stores[precision] = self._new_store(f"stored {precision}", precision)
            self.stores[precision].find_or_build(flips=False, visits=1)
        return self.stores[precision]

    def _new_store(self, name: str, precision: Precision) -> FeatureStore:
        return FeatureStore(self.folder / name / "M3.safetensors", self.frozen.conv, Pixels(), self.network,
                            self.dataset, self.runtime, precision=precision, device=self.device)

    def build_store(self, precision: Precision) -> None:
        """Build such a store anew, of all images."""
        shutil.rmtree(self.folder / "built" / "features", ignore_errors=True)
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
