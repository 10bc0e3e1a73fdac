"""What stages share that run networks over a whole split: weights on a device, one loop over images, detections."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altopt.batches.reading import Prefetcher
from altopt.config import Pixels
from altopt.datasets.dataset import Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError
from altopt.evaluation.detections import Detections, to_coco_results
from altopt.evaluation.measures import or_none
from altopt.evaluation.recall import proposal_recall
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.network_parts import NetworkOfParts
from cache.checkpoints import load_checkpoint
from cache.files import write_json_atomic
from stages.shared.events import ImagesDone
from stages.shared.stage_config import OnTrainSplit
from stages.shared.step import Facts, Runtime
from stages.shared.training import device_of, require_network, require_same_frame

Read = TypeVar("Read")
Made = TypeVar("Made")
Writer = TypeVar("Writer")


class Inference:
    """Networks in evaluation mode on a device, and a split of the data set to run them on.

    ``checkpoints`` are files with the parts that are used of each. Raises ``ArtifactError`` where one lacks a part, or
    was made for another network or data set.
    """

    def __init__(self, checkpoints: Sequence[tuple[Path, Sequence[str]]], config: OnTrainSplit,
                 runtime: Runtime) -> None:
        self.network_config, self.precision, self.runtime = config.network, config.precision, runtime
        self.device = device_of(runtime)
        self.dataset: Dataset = open_dataset(config.data, config.split, runtime.data_root)
        self.networks = [self._load(path, parts) for path, parts in checkpoints]
        require_same_pixels({path.name: network for (path, _), network in zip(checkpoints, self.networks, strict=True)})

    def _load(self, path: Path, parts: Sequence[str]) -> FasterRCNN:
        tensors, description = load_checkpoint(path)
        require_network(path, description, self.network_config)
        if "rpn" in parts:
            require_same_frame(path, description, self.network_config)
        if "head" in parts:
            require_classes(path, description, self.dataset)
        network = FasterRCNN(self.network_config, len(self.dataset.classes))
        fill_parts(network, path, tensors, description, parts)
        self.prepare(network)
        return network

    def prepare(self, network: NetworkOfParts) -> None:
        """Bring a network to the device, to be run and not trained."""
        prepare(network, self.device, self.precision)

    def autocast(self) -> torch.autocast:
        """Return the context in which networks compute with the config's precision."""
        return autocast(self.device, self.precision)

    def groups(self, size: int) -> list[list[str]]:
        """Return the split's image ids in its order, up to ``size`` neighbours of equal extent in each group."""
        # Equal extents alone: a padded image would not give what it gives by itself.
        groups: list[list[str]] = []
        last = None
        for id in self.dataset.ids:
            extent = self.dataset.size(id)
            if extent != last or len(groups[-1]) == size:
                groups.append([])
            groups[-1].append(id)
            last = extent
        return groups

    def results(self, groups: Sequence[list[str]], read: Callable[[list[str]], Read],
                compute: Callable[[list[str], Read], Made]) -> Iterator[Made]:
        """Yield ``compute(group, read(group))`` of each group of image ids, in order; groups are read ahead by threads.

        Reports progress; images of the split that are in no group count as done. Several ranks divide the work; the
        results all come to rank 0, and to no other.
        """
        def work(own: Sequence[list[str]]) -> Iterator[Made]:
            with Prefetcher(read, own, self.runtime.readers) as ahead:
                for group, prepared in zip(own, ahead, strict=True):
                    yield compute(group, prepared)

        total = len(self.dataset.ids)
        done = total - sum(map(len, groups))
        # Not strict: a rank that gets no results has to ask for the first one all the same, to do its part.
        for made, group in zip(self.runtime.ranks.map_images(groups, work), groups, strict=False):
            yield made
            done += len(group)
            self.runtime.report(ImagesDone(done, total))


def fill_parts(network: FasterRCNN, path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
               parts: Sequence[str]) -> None:
    """Give a network the weights of a checkpoint. Raises ``ArtifactError`` unless it has all of ``parts``."""
    # Parts that the checkpoint lacks are drawn too, and never run: which numbers they get does not matter.
    drawn = network.fill(tensors, generator("unused"))
    if missing := set(drawn) & set(parts):
        raise ArtifactError(f"{path.name} has no {sorted(missing)[0]} layers: it is an output of another stage")
    network.samples_per_bin, network.pixels = description.get("samples_per_bin", 0), Pixels.of(description)


def require_same_pixels(networks: Mapping[str, FasterRCNN]) -> None:
    """Raise ``ArtifactError`` unless all networks, by their names, want an image's values in one way."""
    if len({network.pixels for network in networks.values()}) > 1:
        raise ArtifactError(f"{' and '.join(networks)} want an image's values differently: make both from one M0")


def prepare(network: NetworkOfParts, device: torch.device, precision: str) -> None:
    """Bring a network to a device, to be run and not trained."""
    # Convolutions are faster in this layout, and choose it by their weights'.
    network.to(device).to(memory_format=torch.channels_last).eval()
    if precision == "bfloat16":
        network.round_fc()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks compute with a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def require_classes(path: Path, description: dict[str, object], dataset: Dataset) -> None:
    """Raise ``ArtifactError`` unless an artifact is about the data set's classes."""
    held = description.get("classes", ())
    if list(dataset.classes) != held:
        names = ", ".join(map(str, held)) if isinstance(held, list) else ""
        raise ArtifactError(f"{path.name} knows the classes {names} and the data set has "
                            f"{', '.join(dataset.classes)}: use the data set it was made for")


def written_by_first(ranks: SingleProcess,
                     writer: Callable[[], AbstractContextManager[Writer]]) -> AbstractContextManager[Writer | None]:
    """Return what writes a file on rank 0; the others, to which no results come, have nothing to write."""
    return writer() if ranks.first else nullcontext()


class Detected(NamedTuple):
    """What was found in an image, and the proposals it was found in."""

    id: str
    detections: Detections
    proposals: NDArray[np.float32]  # (K, 4) xyxy in the original frame


def write_detections(inference: Inference, groups: Sequence[list[str]], read: Callable[[list[str]], Read],
                     detect: Callable[[list[str], Read], list[Detected]], out: Path, proposals: int) -> Facts:
    """Detect on every group of images, write COCO results to ``out``, and return facts for the record.

    The facts: seconds for an image, from what ``read`` prepared to detections on the CPU; and the recall of its
    ``proposals`` best proposals.
    """
    dataset = inference.dataset
    found: dict[str, Detections] = {}
    covered = []
    seconds = 0.0

    def compute(group: list[str], prepared: Read) -> tuple[list[Detected], float]:
        started = time.perf_counter()
        with torch.inference_mode():
            made = detect(group, prepared)
        return made, time.perf_counter() - started

    # Seconds are added up over ranks: they are those of an image, not of the whole split.
    for made, took in inference.results(groups, read, compute):
        for each in made:
            found[each.id] = each.detections
            objects = dataset.objects(each.id)
            covered.append((objects.usable().boxes, each.proposals))
        seconds += took
    if not inference.runtime.ranks.first:
        return {}
    write_json_atomic(out, to_coco_results(found, dataset.category_ids, dataset.coco_image_id))
    recall = proposal_recall(covered, (proposals,))
    return {"seconds_per_image": round(seconds / max(len(found), 1), 5),
            "recall_at_0.5": or_none(recall.at(proposals)[0]), "average_recall": or_none(recall.average(proposals))}
