"""What SPP-net and slow R-CNN share: features of every region of an image, on disk for training and in detection.

Letters: R regions of an image, G its objects, K classes, D features of fc7, E features that fc6 sees, Q regions that
are kept pooled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altopt.batches.samples import Sample, make_batch, read_sample
from altopt.batches.sampling import match_rois
from altopt.config import DetectionSettings, NetworkConfig, Pixels, RegionDetectionSettings
from altopt.datasets.dataset import Dataset, Objects
from altopt.errors import ArtifactError
from altopt.evaluation.detections import Detections
from altopt.extents import original_frame, scale_of
from altopt.machine.randomness import generator
from altopt.models.fast_rcnn import FastRCNNHead, postprocess_detections
from altopt.models.region_classifier import RegionClassifier
from altopt.models.region_detections import region_detections
from altopt.ops import boxes as bx
from altopt.ops.pyramid import pool_at_nearest_scale
from altopt.ops.warped_crops import warp
from cache.checkpoints import load_checkpoint
from cache.features import FeatureMapFile, MapKey
from cache.files import sha256_file
from cache.records import JSON
from cache.region_features import ImageRegions, RegionCount, RegionFeatureWriter, RegionSizes
from stages.shared.inference import Detected, Inference, require_classes, write_detections, written_by_first
from stages.shared.stage_config import CachesRegions, OnRegions
from stages.shared.step import Facts, Runtime
from stages.shared.training import CachedProposals, describe_network, require_network

FAST_RCNN = "fast_rcnn"  # the method of a network that names none
Prepared = TypeVar("Prepared")
Pool = Callable[[Tensor], Tensor]  # boxes Tensor[r, 4] in the original frame -> what fc6 sees of them, Tensor[r, E]
# What fc6 sees of regions, Tensor[R, E], and what fc7 makes of it, Tensor[R, D] -> their scores and deltas.
Outputs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Regions(Protocol[Prepared]):
    """How a method looks at the regions of an image."""

    def read(self, id: str) -> Prepared:
        """Return what can be prepared of an image; called from threads."""

    def open(self, prepared: Prepared) -> Pool:
        """Bring it to the device, and return what pools its regions."""


class RegionNetwork(Inference):
    """A fine-tuned region classifier in evaluation mode, and a split of the data set."""

    def __init__(self, path: Path, method: str, config: OnRegions, runtime: Runtime) -> None:
        super().__init__([], config, runtime)
        self.path, self.method, self.config = path, method, config
        tensors, self.description = load_checkpoint(path)
        require_network(path, self.description, config.network)
        if self.description.get("method", FAST_RCNN) != method:
            raise ArtifactError(f"{path.name} was not fine-tuned for {method}: make it with the steps of that scheme")
        require_classes(path, self.description, self.dataset)
        levels = self.description.get("levels", ())
        self.classifier = RegionClassifier(config.network, len(self.dataset.classes), levels)
        self.levels: list[int] = list(levels) or [self.classifier.roi_size]
        if drawn := self.classifier.fill(tensors, generator("unused")):
            raise ArtifactError(f"{path.name} has no {drawn[0]} that fits: it is an output of another stage")
        self.classifier.pixels = Pixels.of(self.description)
        self.prepare(self.classifier)

    def features(self, pool: Pool, boxes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what fc6 sees, ``Tensor[r, E]``, and fc7, ``Tensor[r, D]``, in float32 for a few boxes at a time."""
        for part in torch.split(boxes.to(self.device), self.config.rois_at_once):
            with torch.inference_mode(), self.autocast():
                pooled = pool(part)  # (r, E)
                hidden = self.classifier.fc(pooled)  # (r, D)
            yield pooled.float(), hidden.float()


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """An image's regions before any network has seen them, objects first."""

    boxes: Tensor  # (R, 4) in the original frame
    labels: Tensor  # (R,) int64, -1 for proposals
    overlaps: Tensor  # (R, K)
    kept: Tensor  # (Q,) int64 into the regions
    matched: Tensor  # (Q,) int64 into the objects


def boxes_of(dataset: Dataset, id: str, proposals: NDArray[np.float32], regressor_iou: float) -> ImageBoxes:
    """Return an image's objects and proposals; kept are proposals with IoU above ``regressor_iou``."""
    usable = dataset.objects(id).usable()
    objects, classes = torch.from_numpy(usable.boxes), torch.from_numpy(usable.labels)  # (G, 4), (G,)
    boxes = torch.cat([objects, torch.from_numpy(proposals)])  # (R, 4)
    labels = torch.cat([classes, classes.new_full((len(proposals),), -1)])  # (R,)
    overlaps = torch.zeros(len(boxes), len(dataset.classes))  # (R, K)
    if len(objects):
        of_object = bx.iou(boxes, objects)  # (R, G)
        overlaps.scatter_reduce_(1, classes.expand(len(boxes), -1), of_object, "amax")
    best, matched = match_rois(boxes, objects)  # (R,) each
    # An object is no example for regressors: its deltas to itself are nought.
    kept = torch.nonzero((best > regressor_iou) & (labels < 0))[:, 0]  # (Q,)
    return ImageBoxes(boxes, labels, overlaps, kept, matched[kept])


def cache_regions(network: RegionNetwork, regions: Regions[Prepared], proposals: Path, out: Path,
                  config: CachesRegions, settings: Mapping[str, JSON]) -> Facts:
    """Write the features of every region of the training split; return facts for the record."""
    dataset, runtime, classifier = network.dataset, network.runtime, network.classifier
    cached = CachedProposals(proposals, dataset, config.proposals)

    def boxes(id: str) -> ImageBoxes:
        return boxes_of(dataset, id, cached.get(id), config.regressor_iou)

    # Counted first, and matched again below: the file is laid out before anything is written, and boxes are cheap.
    counts = {}
    for id in dataset.ids:
        each = boxes(id)
        counts[id] = RegionCount(len(each.boxes), len(each.kept))
    sizes = RegionSizes(len(dataset.classes), classifier.hidden_size, classifier.pooled_size, config.stored)
    attributes = {
        "method": network.method, "model": sha256_file(network.path), "proposals": sha256_file(proposals),
        "dataset": runtime.data_digest, **describe_network(config.network, dataset.classes, classifier.pixels),
        "settings": {**settings, "proposals": config.proposals, "regressor_iou": config.regressor_iou,
                     "precision": config.precision, "rois_at_once": config.rois_at_once},
    }

    def compute(ids: list[str], prepared: Prepared) -> tuple[str, ImageRegions]:
        objects = dataset.objects(ids[0]).usable()
        pool = regions.open(prepared)
        return ids[0], _features_of(network, pool, boxes(ids[0]), objects, np.dtype(config.stored))

    with written_by_first(runtime.ranks, lambda: RegionFeatureWriter(out, attributes, counts, sizes)) as writer:
        left = [[id] for id in dataset.ids if not writer.done(id)] if writer is not None else None
        missing: list[list[str]] = runtime.ranks.broadcast(left)
        for id, features in network.results(missing, lambda ids: regions.read(ids[0]), compute):
            assert writer is not None  # results come to rank 0 alone
            writer.write(id, features)
    if writer is None:
        return {}
    total = sum(count.regions for count in counts.values())
    return {"regions": total, "pooled_regions": sum(count.pooled for count in counts.values()),
            "images": len(counts), "images_found": len(counts) - len(missing), "bytes": out.stat().st_size}


def _features_of(network: RegionNetwork, pool: Pool, each: ImageBoxes, objects: Objects,
                 stored: np.dtype[np.floating]) -> ImageRegions:
    kept = torch.zeros(len(each.boxes), dtype=torch.bool)  # (R,)
    kept[each.kept] = True
    classifier = network.classifier
    hidden = [np.empty((0, classifier.hidden_size), stored)]
    pooled = [np.empty((0, classifier.pooled_size), stored)]
    row = 0
    for seen, last in network.features(pool, each.boxes):
        pooled.append(seen[kept[row : row + len(seen)].to(seen.device)].cpu().numpy().astype(stored))
        hidden.append(last.cpu().numpy().astype(stored))
        row += len(seen)
    targets = bx.encode(torch.from_numpy(objects.boxes)[each.matched], each.boxes[each.kept])  # (Q, 4)
    return ImageRegions(
        each.boxes.numpy(), each.labels.numpy().astype(np.int32), each.overlaps.numpy(), np.concatenate(hidden),
        np.concatenate(pooled), objects.labels[each.matched.numpy()].astype(np.int32), targets.numpy(),
    )


def linear_layers(svms: Path, regressors: Path, network: RegionNetwork) -> Outputs:
    """Return the SVMs and the box regressors of all classes: scores ``Tensor[R, K]`` and deltas ``Tensor[R, K, 4]``."""
    weights, biases = linear_layer(svms, network)  # (K, D), (K,)
    of_boxes, box_biases = linear_layer(regressors, network)  # (K, 4, E), (K, 4)

    def outputs(pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        deltas = torch.addmm(box_biases.flatten(), pooled, of_boxes.flatten(0, 1).T)  # (R, K*4)
        return torch.addmm(biases, hidden, weights.T), deltas.view(len(pooled), -1, 4)

    return outputs


def softmax_and_boxes(network: RegionNetwork) -> Outputs:
    """Return the head of a Fast R-CNN: logits ``Tensor[R, K + 1]`` and deltas ``Tensor[R, K + 1, 4]``."""
    # On no device: the weights come from the file, and would only be drawn in vain.
    with torch.device("meta"):
        head = FastRCNNHead(network.classifier.hidden_size, len(network.dataset.classes))
    tensors, _ = load_checkpoint(network.path)
    head.load_state_dict({name: tensors[f"head.{name}"] for name in head.state_dict()}, assign=True)
    head.to(network.device).eval()

    def outputs(pooled: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits, normalised = head(hidden)  # (R, K + 1), (R, K + 1, 4)
        return logits, head.deltas(normalised)

    return outputs


def svms_and_boxes(svms: Path, network: RegionNetwork) -> Outputs:
    """Return SVMs in place of a Fast R-CNN's softmax, with its own box layer; classes are without background."""
    head = softmax_and_boxes(network)
    weights, biases = linear_layer(svms, network)  # (K, D), (K,)
    return lambda pooled, hidden: (torch.addmm(biases, hidden, weights.T), head(pooled, hidden)[1][:, 1:])


def linear_layer(path: Path, network: RegionNetwork) -> tuple[Tensor, Tensor]:
    """Return the weights and biases of SVMs or regressors, which must be of the network's own features."""
    tensors, description = load_checkpoint(path)
    # By the file's hash: weights of the same shape fit any network's features, and find nothing on another's.
    if description.get("model") != sha256_file(network.path):
        raise ArtifactError(f"{path.name} was trained on the features of another network than {network.path.name}: "
                            "make it again from this one's features")
    require_classes(path, description, network.dataset)
    return tensors["weights"].to(network.device), tensors["biases"].to(network.device)


def detect_regions(network: RegionNetwork, regions: Regions[Prepared], outputs: Outputs, proposals: Path, out: Path,
                   settings: DetectionSettings | RegionDetectionSettings) -> Facts:
    """Score and refine the proposals of every test image; write detections and return facts for the record."""
    # Scores are a softmax's where the settings are a Fast R-CNN's, and else those of SVMs.
    limit = network.config.proposals
    cached = CachedProposals(proposals, network.dataset, limit)

    def detect(ids: list[str], prepared: Prepared) -> list[Detected]:
        proposed, size = cached.get(ids[0]), network.dataset.size(ids[0])
        boxes = torch.from_numpy(proposed).to(network.device)  # (R, 4)
        parts = [outputs(pooled, hidden) for pooled, hidden in network.features(regions.open(prepared), boxes)]
        scores, deltas = (torch.cat(each) for each in zip(*parts, strict=True))  # (R, K), (R, K, 4), or K + 1
        if isinstance(settings, DetectionSettings):
            found = postprocess_detections(scores, deltas, boxes, size, settings)
        else:
            found = region_detections(scores, deltas, boxes, size, settings)
        return [Detected(ids[0], Detections(*(each.cpu().numpy() for each in found)), proposed)]

    return write_detections(network, network.groups(1), lambda ids: regions.read(ids[0]), detect, out, limit)


def describe_features(description: Mapping[str, object]) -> dict[str, object]:
    """Return what SVMs and regressors say of the features that they were trained on."""
    return {name: description[name] for name in ("network", "classes", "model", "method")}


class WarpedRegions:
    """Slow R-CNN: each region is cut out of the original image and goes through the conv layers by itself."""

    def __init__(self, network: RegionNetwork) -> None:
        self.network = network
        self.side: int = network.description["crop_side"]

    def read(self, id: str) -> Sample:
        """Return the image in its original frame."""
        dataset = self.network.dataset
        return read_sample(dataset, id, original_frame(self.network.config.network, dataset.size(id)))

    def open(self, prepared: Sample) -> Pool:
        """Return what crops boxes out of the image, warps them, and runs the conv layers on each."""
        classifier = self.network.classifier
        image = make_batch([prepared], self.network.device, pixels=classifier.pixels).images[0]  # (3, H, W)
        return lambda boxes: classifier.pool_crops(warp(image, boxes, self.side))


class PyramidRegions:
    """SPP-net: each region pools a pyramid from the map whose scale suits it best; maps are stored ones, or fresh."""
    # Fast R-CNN's RoI pooling is such a pyramid, of one level.

    def __init__(self, network: RegionNetwork, frames: Sequence[NetworkConfig], area: int,
                 stored: FeatureMapFile | None = None) -> None:
        self.network, self.frames, self.area, self.stored = network, frames, area, stored

    def read(self, id: str) -> tuple[str, Sequence[Sample | Tensor]]:
        """Return the image's id and, for each frame, the image or its stored map."""
        if self.stored is not None:
            return id, [self.stored.get(MapKey(id, False, scale)) for scale in range(len(self.frames))]
        return id, [read_sample(self.network.dataset, id, frame) for frame in self.frames]

    def open(self, prepared: tuple[str, Sequence[Sample | Tensor]]) -> Pool:
        """Return what pools boxes from the maps, once they are made, or on the device."""
        classifier, device, levels = self.network.classifier, self.network.device, self.network.levels
        size = self.network.dataset.size(prepared[0])
        scales = [scale_of(size, frame.short_side, frame.max_side) for frame in self.frames]
        with torch.inference_mode(), self.network.autocast():
            maps = [each.to(device).float()[None] if isinstance(each, Tensor)
                    else classifier.conv(make_batch([each], device, pixels=classifier.pixels).images)
                    for each in prepared[1]]  # (1, C, h, w)
        return lambda boxes: pool_at_nearest_scale(
            boxes, scales, self.area, lambda scale, here: classifier.pool_pyramids(maps[scale], [here], levels))
