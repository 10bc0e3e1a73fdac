"""What stages share that run networks over a whole split: weights on a device, and batches of equal size."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from altopt.batches.reading import Prefetcher
from altopt.batches.samples import Batch, Sample, make_batch, read_sample
from altopt.datasets.dataset import Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from cache.checkpoints import load_checkpoint
from stages.shared.feature_store import FeatureStore
from stages.shared.step import Runtime
from stages.shared.training import device_of, require_network, require_same_frame

Made = TypeVar("Made")


class Inference:
    """Networks in evaluation mode, and a split of the data set to run them on."""

    def __init__(self, checkpoints: Sequence[tuple[Path, Sequence[str]]], config: Any, runtime: Runtime,
                 split: Any) -> None:
        self.config, self.runtime = config, runtime
        self.device = device_of(runtime)
        self.dataset: Dataset = open_dataset(config.data, split, runtime.data_root)
        self.networks = [self._load(path, parts) for path, parts in checkpoints]

    def _load(self, path: Path, parts: Sequence[str]) -> FasterRCNN:
        tensors, description = load_checkpoint(path)
        require_network(path, description, self.config.network)
        if "rpn" in parts:
            require_same_frame(path, description, self.config.network)
        classes: Sequence[str] = self.dataset.classes
        if "head" in parts and list(classes) != description.get("classes"):
            raise ArtifactError(f"{path.name} knows the classes {', '.join(description.get('classes', []))} and the "
                                f"data set has {', '.join(classes)}: evaluate it on the data set it was trained for")
        network = FasterRCNN(self.config.network, len(classes))
        drawn = network.fill(tensors, generator("unused"))
        if missing := set(drawn) & set(parts):
            raise ArtifactError(f"{path.name} has no {sorted(missing)[0]} layers: it is an output of another stage")
        network.samples_per_bin = description.get("samples_per_bin", 0)
        network.to(self.device).to(memory_format=torch.channels_last)
        if self.config.precision == "bfloat16":
            network.round_fc()
        return network.eval()

    def autocast(self) -> torch.autocast:
        """Return the context in which networks compute with the config's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def results(self, size: int, compute: Callable[[Batch], Made], store: FeatureStore | None = None) -> Iterator[Made]:
        """Yield what ``compute`` makes of the split, up to ``size`` neighbours of equal size at a time, in its order.

        Reports progress. Several ranks divide the work; the results all come to rank 0, and to no other. Where a store
        has maps, they take the place of the images.
        """
        groups = _runs_of_equal_size(self.dataset, size)

        def read(ids: list[str]) -> list[Sample]:
            if store is None:
                return [read_sample(self.dataset, id, self.config.network) for id in ids]
            return [store.sample(id) for id in ids]

        def work(own: Sequence[list[str]]) -> Iterator[Made]:
            with Prefetcher(read, own, self.runtime.readers) as ahead:
                for samples in ahead:
                    yield compute(make_batch(samples, self.device))

        done = 0
        for made, group in zip(self.runtime.ranks.map_images(groups, work), groups, strict=False):
            yield made
            done += len(group)
            self.runtime.report({"event": "images", "done": done, "total": len(self.dataset.ids)})


def written_by_first(ranks: SingleProcess,
                     writer: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """Return what writes a file on rank 0; the others, to which no results come, have nothing to write."""
    return writer() if ranks.first else nullcontext()


def _runs_of_equal_size(dataset: Dataset, size: int) -> list[list[str]]:
    groups: list[list[str]] = []
    last = None
    for id in dataset.ids:
        extent = dataset.size(id)
        if extent != last or len(groups[-1]) == size:
            groups.append([])
        groups[-1].append(id)
        last = extent
    return groups
