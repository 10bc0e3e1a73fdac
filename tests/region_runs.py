"""SPP-net and slow R-CNN on a few small images, stage function by stage function, each writing into one folder."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from altopt.config import NetworkConfig
from altopt.datasets.dataset import DataConfig
from altopt.datasets.shapes import ShapesDataset
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.network_parts import initialise_all
from cache.checkpoints import save_checkpoint
from cache.files import sha256_file
from cache.proposals import ProposalWriter
from stages.shared.events import Event
from stages.shared.step import Facts, Runtime, file_name
from stages.steps.fast_rcnn import TrainFastRCNN, train_fast_rcnn
from stages.steps.fast_rcnn_regions import CachePooledFeatures, DetectWithSVMs, cache_pooled_features, detect_with_svms
from stages.steps.rcnn import (
    CacheWarpedFeatures,
    DetectRCNN,
    TrainOnWarpedRegions,
    cache_warped_features,
    detect_rcnn,
    train_on_warped_regions,
)
from stages.steps.spp_net import (
    CacheConvFeatures,
    CacheRegionFeatures,
    DetectSPPNet,
    TrainFCLayers,
    cache_conv_features,
    cache_region_features,
    detect_spp_net,
    train_fc_layers,
)
from stages.steps.svms import TrainRegressors, TrainSVMs, train_regressors, train_svms

NETWORK = NetworkConfig(name="small", short_side=80, max_side=96)
DATA = DataConfig(format="shapes", train=("train:5",), test=("test:3",), width=96, height=80)
TRAINING: dict[str, Any] = {"iterations": 4, "lr": 0.001, "lr_steps": (3,), "images_per_batch": 2,
                            "rois_per_batch": 16}
SHARED: dict[str, Any] = {"network": NETWORK, "data": DATA}

STAGES: dict[str, list[tuple[str, Callable[..., Facts], tuple[str, ...], Any]]] = {
    "spp_net": [
        ("F1", cache_conv_features, ("M0",), CacheConvFeatures(**SHARED, scales=(64, 96), max_side=200)),
        ("M1", train_fc_layers, ("M0", "F1", "P0"), TrainFCLayers(**SHARED, **TRAINING)),
        ("F2", cache_region_features, ("M1", "F1", "P0"),
         CacheRegionFeatures(**SHARED, region_area=40 * 40, rois_at_once=7)),
        ("S1", train_svms, ("F2",), TrainSVMs()),
        ("R1", train_regressors, ("F2",), TrainRegressors()),
        ("D1", detect_spp_net, ("M1", "S1", "R1", "T0"),
         DetectSPPNet(**SHARED, scales=(64, 96), max_side=200, region_area=40 * 40, rois_at_once=7)),
    ],
    "rcnn": [
        ("M1", train_on_warped_regions, ("M0", "P0"), TrainOnWarpedRegions(**SHARED, **TRAINING, crop_side=64)),
        ("F1", cache_warped_features, ("M1", "P0"), CacheWarpedFeatures(**SHARED, rois_at_once=7, stored="float16")),
        ("S1", train_svms, ("F1",), TrainSVMs()),
        ("R1", train_regressors, ("F1",), TrainRegressors()),
        ("D1", detect_rcnn, ("M1", "S1", "R1", "T0"), DetectRCNN(**SHARED, rois_at_once=7)),
    ],
    "fast_rcnn_svm": [
        ("M1", train_fast_rcnn, ("M0", "P0"), TrainFastRCNN(**SHARED, **TRAINING)),
        ("F1", cache_pooled_features, ("M1", "P0"), CachePooledFeatures(**SHARED, rois_at_once=7)),
        ("S1", train_svms, ("F1",), TrainSVMs()),
        ("D1", detect_with_svms, ("M1", "S1", "T0"), DetectWithSVMs(**SHARED, rois_at_once=7)),
    ],
}


@dataclass
class Stopping:
    """A report at which Ctrl-C comes: the ``at``-th event of a kind."""

    event: str
    at: int
    seen: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        if [each.kind for each in self.seen].count(self.event) == self.at and event.kind == self.event:
            signal.raise_signal(signal.SIGINT)


def prepare(folder: Path) -> None:
    """Write M0, the proposals P0 of the training split and T0 of the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    conv = backbones.small().conv
    initialise_all(conv, generator("region runs"))
    tensors = {f"conv.{name}": tensor.detach() for name, tensor in conv.state_dict().items()}
    save_checkpoint(folder / file_name("M0"), tensors, {"network": {"name": "small"}, "classes": []})
    for artifact, split in (("P0", "train:5"), ("T0", "test:3")):
        with ProposalWriter(folder / file_name(artifact), {}) as writer:
            dataset = ShapesDataset((split,), width=96, height=80)
            for id in dataset.ids:
                boxes = jittered(dataset.objects(id).boxes, id)
                writer.append(id, boxes, np.linspace(1, 0, len(boxes)))


def jittered(boxes: np.ndarray, id: str) -> np.ndarray:
    """Objects moved about a little and a lot, and boxes anywhere: float32 [K, 4] within 96 x 80."""
    random = np.random.default_rng(list(id.encode()))
    near = [boxes + random.uniform(-spread, spread, boxes.shape) for spread in (1, 2, 3, 8)]
    corner = random.uniform(0, 60, (12, 2))
    anywhere = np.concatenate([corner, corner + random.uniform(8, 40, (12, 2))], axis=1)
    found = np.concatenate([*near, anywhere]).astype(np.float32).clip(0, np.array([96, 80, 96, 80], np.float32))
    kept: np.ndarray = found[(found[:, 2:] > found[:, :2] + 4).all(axis=1)]
    return kept


def make(folder: Path, artifact: str, scheme: str, report: Any = None, changes: Any = None,
         **runtime: Any) -> dict[str, Any]:
    """Run the stage that makes an artifact, with changes of its config."""
    settings: dict[str, Any] = {"device": "cpu", "snapshot_seconds": 0, "report_every": 1} | runtime
    stage, inputs, config = next(each[1:] for each in STAGES[scheme] if each[0] == artifact)
    with torch.random.fork_rng():
        facts = partial(stage, *(folder / file_name(name) for name in inputs))(
            out=folder / file_name(artifact), config=replace(config, **(changes or {})),
            runtime=Runtime(report=report or (lambda event: None), **settings))
    return dict(facts)


def make_all(folder: Path, scheme: str, **runtime: Any) -> dict[str, dict[str, Any]]:
    """Run all stages and return their facts."""
    prepare(folder)
    return {artifact: make(folder, artifact, scheme, **runtime) for artifact, *_ in STAGES[scheme]}


def hashes(folder: Path, scheme: str) -> dict[str, str]:
    return {artifact: sha256_file(folder / file_name(artifact)) for artifact, *_ in STAGES[scheme]}
