"""What SPP-net and slow R-CNN share: features of every region of an image, on disk for training and in detection."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from altopt.batches.reading import Prefetcher
from altopt.batches.sampling import match_rois
from altopt.datasets.dataset import Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError
from altopt.evaluation.detections import Detections, to_coco_results
from altopt.evaluation.ground_truth import counted
from altopt.evaluation.recall import proposal_recall
from altopt.machine.randomness import generator
from altopt.models.fast_rcnn import FastRCNNHead, postprocess_detections
from altopt.models.region_classifier import RegionClassifier
from altopt.models.region_detections import region_detections
from altopt.ops import boxes as bx
from cache.checkpoints import load_checkpoint
from cache.files import sha256_file, write_json_atomic
from cache.region_features import ImageRegions, RegionCount, RegionFeatureWriter, RegionSizes
from stages.shared.inference import written_by_first
from stages.shared.step import Runtime
from stages.shared.training import CachedProposals, describe_network, device_of, require_network

FAST_RCNN = "fast_rcnn"  # the method of a network that names none
Made = TypeVar("Made")


class Regions(Protocol):
    """How a method looks at the regions of an image."""

    def read(self, id: str) -> Any:
        """Return what can be prepared of an image; called from threads."""

    def open(self, prepared: Any) -> Any:
        """Bring it to the device, as ``pool`` wants it."""

    def pool(self, image: Any, boxes: Tensor) -> Tensor:
        """Return what fc6 sees, ``Tensor[R, E]``, of boxes ``Tensor[R, 4]`` in the original frame."""


class Outputs(Protocol):
    """What is on top of the features of an image's regions."""

    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and deltas of regions, from what fc6 sees of them, ``Tensor[R, E]``, and fc7's output."""

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image's boxes, scores and classes in the original frame, of ``size`` (width, height)."""


class RegionNetwork:
    """A fine-tuned region classifier in evaluation mode, and a split of the data set."""

    def __init__(self, path: Path, method: str, config: Any, runtime: Runtime, split: Any) -> None:
        self.path, self.config, self.runtime = path, config, runtime
        self.device = device_of(runtime)
        self.dataset: Dataset = open_dataset(config.data, split, runtime.data_root)
        tensors, self.description = load_checkpoint(path)
        require_network(path, self.description, config.network)
        if self.description.get("method", FAST_RCNN) != method:
            raise ArtifactError(f"{path.name} was not fine-tuned for {method}: make it with the steps of that scheme")
        require_classes(path, self.description, self.dataset)
        levels = self.description.get("levels", ())
        self.classifier = RegionClassifier(config.network, len(self.dataset.classes), levels)
        self.levels: list[int] = list(levels) or [self.classifier.roi_size]
        drawn = self.classifier.fill(tensors, generator("unused"))
        if drawn:
            raise ArtifactError(f"{path.name} has no {drawn[0]} that fits: it is an output of another stage")
        self.classifier.to(self.device).to(memory_format=torch.channels_last).eval()
        if config.precision == "bfloat16":
            self.classifier.round_fc()

    def autocast(self) -> torch.autocast:
        """Return the context in which the network computes with the config's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def results(self, regions: Regions, ids: Sequence[str], compute: Callable[[str, Any], Made]) -> Iterator[Made]:
        """Yield ``compute(id, what was prepared)`` in the order of the ids, reading ahead; reports progress.

        Several ranks divide the work; the results all come to rank 0, and to no other.
        """
        def work(own: Sequence[str]) -> Iterator[Made]:
            with Prefetcher(regions.read, own, self.runtime.readers) as ahead:
                for id, prepared in zip(own, ahead, strict=True):
                    yield compute(id, prepared)

        total = len(self.dataset.ids)
        for done, made in enumerate(self.runtime.ranks.map_images(ids, work), total - len(ids) + 1):
            yield made
            self.runtime.report({"event": "images", "done": done, "total": total})

    def features(self, regions: Regions, image: Any, boxes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what fc6 sees, ``Tensor[r, E]``, and fc7, ``Tensor[r, D]``, in float32 for a few boxes at a time."""
        for part in torch.split(boxes.to(self.device), self.config.rois_at_once):
            with torch.inference_mode(), self.autocast():
                pooled = regions.pool(image, part)
                hidden = self.classifier.fc(pooled)
            yield pooled.float(), hidden.float()


def require_classes(path: Path, description: dict[str, Any], dataset: Dataset) -> None:
    """Raise ``ArtifactError`` unless an artifact is about the data set's classes."""
    if list(dataset.classes) != description.get("classes"):
        raise ArtifactError(f"{path.name} knows the classes {', '.join(description.get('classes', []))} and the data "
                            f"set has {', '.join(dataset.classes)}: use the data set it was made for")


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """An image's regions before any network has seen them, objects first; G objects, R regions, Q kept pooled.

    ``boxes`` ``Tensor[R, 4]`` in the original frame, ``labels`` int64 ``Tensor[R]`` (-1 for proposals), ``overlaps``
    ``Tensor[R, K]``, ``kept`` int64 ``Tensor[Q]`` into the regions, ``matched`` int64 ``Tensor[Q]`` into the objects.
    """

    boxes: Tensor
    labels: Tensor
    overlaps: Tensor
    kept: Tensor
    matched: Tensor


def boxes_of(dataset: Dataset, id: str, proposals: Any, regressor_iou: float) -> ImageBoxes:
    """Return an image's objects and proposals; kept are proposals with IoU above ``regressor_iou``."""
    usable = dataset.objects(id).usable()
    objects, classes = torch.from_numpy(usable.boxes), torch.from_numpy(usable.labels)
    boxes = torch.cat([objects, torch.from_numpy(proposals)])
    labels = torch.cat([classes, classes.new_full((len(proposals),), -1)])
    overlaps = torch.zeros(len(boxes), len(dataset.classes))
    if len(objects):
        of_object = bx.iou(boxes, objects)  # (R, G)
        overlaps.scatter_reduce_(1, classes.expand(len(boxes), -1), of_object, "amax")
    best, matched = match_rois(boxes, objects)
    kept = torch.nonzero((best > regressor_iou) & (labels < 0))[:, 0]
    return ImageBoxes(boxes, labels, overlaps, kept, matched[kept])


def cache_regions(network: RegionNetwork, regions: Regions, proposals: Path, out: Path, method: str,
                  settings: dict[str, Any]) -> dict[str, Any]:
    """Write the features of every region of the training split; return facts for the record."""
    config, dataset, runtime = network.config, network.dataset, network.runtime
    cached = CachedProposals(proposals, dataset, config.proposals)

    def boxes(id: str) -> ImageBoxes:
        return boxes_of(dataset, id, cached.get(id), config.regressor_iou)

    counts = {}
    for id in dataset.ids:
        each = boxes(id)
        counts[id] = RegionCount(len(each.boxes), len(each.kept))
    classifier = network.classifier
    sizes = RegionSizes(len(dataset.classes), classifier.features, classifier.pooled_features, config.stored)
    attributes = {
        "method": method, "model": sha256_file(network.path), "proposals": sha256_file(proposals),
        "dataset": runtime.data_digest, **describe_network(config.network, dataset.classes),
        "settings": settings | {"proposals": config.proposals, "regressor_iou": config.regressor_iou,
                                "precision": config.precision, "rois_at_once": config.rois_at_once},
    }

    def compute(id: str, prepared: Any) -> tuple[str, ImageRegions]:
        return id, _features_of(network, regions, regions.open(prepared), boxes(id), dataset.objects(id).usable())

    with written_by_first(runtime.ranks, lambda: RegionFeatureWriter(out, attributes, counts, sizes)) as writer:
        left = [id for id in dataset.ids if not writer.done(id)] if runtime.ranks.first else None
        missing = runtime.ranks.broadcast(left)
        for id, features in network.results(regions, missing, compute):
            writer.write(id, features)
    if not runtime.ranks.first:
        return {}
    total = sum(count.regions for count in counts.values())
    return {"regions": total, "pooled_regions": sum(count.pooled for count in counts.values()),
            "images": len(counts), "images_found": len(counts) - len(missing), "bytes": out.stat().st_size}


def _features_of(network: RegionNetwork, regions: Regions, image: Any, each: ImageBoxes,
                 objects: Any) -> ImageRegions:
    stored = np.dtype(network.config.stored)
    kept = torch.zeros(len(each.boxes), dtype=torch.bool)
    kept[each.kept] = True
    classifier = network.classifier
    hidden = [np.empty((0, classifier.features), stored)]
    pooled = [np.empty((0, classifier.pooled_features), stored)]
    row = 0
    for seen, last in network.features(regions, image, each.boxes):
        pooled.append(seen[kept[row : row + len(seen)].to(seen.device)].cpu().numpy().astype(stored))
        hidden.append(last.cpu().numpy().astype(stored))
        row += len(seen)
    targets = bx.encode(torch.from_numpy(objects.boxes)[each.matched], each.boxes[each.kept])
    return ImageRegions(
        each.boxes.numpy(), each.labels.numpy().astype(np.int32), each.overlaps.numpy(), np.concatenate(hidden),
        np.concatenate(pooled), objects.labels[each.matched.numpy()].astype(np.int32), targets.numpy(),
    )


class LinearLayers:
    """The SVMs and the box regressors of all classes, as two matrices on a device."""

    def __init__(self, svms: Path, regressors: Path, network: RegionNetwork) -> None:
        self.scores = linear_layer(svms, network)
        self.deltas = linear_layer(regressors, network)
        self.rule = network.config

    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``Tensor[R, K]`` and deltas ``Tensor[R, K, 4]``."""
        deltas = torch.addmm(self.deltas[1].flatten(), pooled, self.deltas[0].flatten(0, 1).T)
        return torch.addmm(self.scores[1], hidden, self.scores[0].T), deltas.view(len(pooled), -1, 4)

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``region_detections`` makes of them."""
        return region_detections(scores, deltas, boxes, size, self.rule)


def linear_layer(path: Path, network: RegionNetwork) -> tuple[Tensor, Tensor]:
    """Return the weights and biases of SVMs or regressors, which must be of the network's own features."""
    tensors, description = load_checkpoint(path)
    if description.get("model") != sha256_file(network.path):
        raise ArtifactError(f"{path.name} was trained on the features of another network than {network.path.name}: "
                            "make it again from this one's features")
    require_classes(path, description, network.dataset)
    return tensors["weights"].to(network.device), tensors["biases"].to(network.device)


class SoftmaxAndBoxes:
    """The head of a Fast R-CNN."""

    def __init__(self, network: RegionNetwork) -> None:
        self.rule = network.config
        with torch.device("meta"):
            self.head = FastRCNNHead(network.classifier.features, len(network.dataset.classes))
        tensors, _ = load_checkpoint(network.path)
        self.head.load_state_dict({name: tensors[f"head.{name}"] for name in self.head.state_dict()}, assign=True)
        self.head.to(network.device).eval()

    @torch.inference_mode()
    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``Tensor[R, K + 1]`` and deltas ``Tensor[R, K + 1, 4]``, background first."""
        logits, normalised = self.head(hidden)
        return logits, self.head.deltas(normalised)

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``postprocess_detections`` makes of them."""
        return postprocess_detections(scores, deltas, boxes, size, self.rule)


class SVMsAndBoxes(SoftmaxAndBoxes):
    """SVMs in place of the softmax, and the network's own box layer."""

    def __init__(self, svms: Path, network: RegionNetwork) -> None:
        super().__init__(network)
        self.weights, self.biases = linear_layer(svms, network)

    @torch.inference_mode()
    def __call__(self, pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``Tensor[R, K]`` and deltas ``Tensor[R, K, 4]``."""
        _, deltas = super().__call__(pooled, hidden)
        return torch.addmm(self.biases, hidden, self.weights.T), deltas[:, 1:]

    def detections(self, scores: Tensor, deltas: Tensor, boxes: Tensor,
                   size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``region_detections`` makes of them."""
        return region_detections(scores, deltas, boxes, size, self.rule)


def detect_regions(network: RegionNetwork, regions: Regions, outputs: Outputs, proposals: Path,
                   out: Path) -> dict[str, Any]:
    """Score and refine the proposals of every test image; write detections and return facts for the record."""
    config, dataset = network.config, network.dataset
    cached = CachedProposals(proposals, dataset, config.proposals)
    found: dict[str, Detections] = {}
    covered = []
    seconds = 0.0

    def compute(id: str, prepared: Any) -> tuple[str, Detections, float]:
        started = time.perf_counter()
        image = regions.open(prepared)
        boxes = torch.from_numpy(cached.get(id)).to(network.device)
        detections = _detections_in(network, regions, outputs, image, boxes, dataset.size(id))
        return id, detections, time.perf_counter() - started

    for id, detections, took in network.results(regions, dataset.ids, compute):
        found[id] = detections
        seconds += took
        objects = dataset.objects(id)
        covered.append((objects.boxes[counted(objects)], cached.get(id)))
    if not network.runtime.ranks.first:
        return {}
    write_json_atomic(out, to_coco_results(found, dataset.category_ids, dataset.coco_image_id))
    recall = proposal_recall(covered, (config.proposals,))
    return {"seconds_per_image": round(seconds / max(len(found), 1), 5),
            "recall_at_0.5": float(recall.at(config.proposals)[0]), "average_recall": recall.average(config.proposals)}


def _detections_in(network: RegionNetwork, regions: Regions, outputs: Outputs, image: Any, boxes: Tensor,
                   size: tuple[int, int]) -> Detections:
    parts = [outputs(pooled, hidden) for pooled, hidden in network.features(regions, image, boxes)]
    scores, deltas = (torch.cat(each) for each in zip(*parts, strict=True))
    result = outputs.detections(scores, deltas, boxes, size)
    return Detections(*(each.cpu().numpy() for each in result))


def describe_features(description: Mapping[str, object]) -> dict[str, object]:
    """Return what SVMs and regressors say of the features that they were trained on."""
    return {name: description[name] for name in ("network", "classes", "model", "method")}
