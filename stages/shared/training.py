"""What every trained stage does around the training loop: read weights, freeze, keep snapshots, verify, write."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from altopt.batches.local_batches import LocalBatches
from altopt.batches.reading import BatchOrder, Entry
from altopt.batches.samples import Batch, Sample, read_sample
from altopt.batches.sampling import RoISampling, RoIThresholds, has_samples
from altopt.config import TORCHVISION_PIXELS, NetworkConfig, Pixels, RoITraining
from altopt.datasets.dataset import Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, UsageError
from altopt.machine.interruption import Stop, deferred_signals
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.losses import LossModule
from altopt.models.network_parts import NetworkOfParts
from altopt.training.box_statistics import fixed_statistics, measure
from altopt.training.loop import LoopRuntime, Progress, freeze, layers_named, train
from cache.checkpoints import digest, load_checkpoint, save_checkpoint
from cache.files import sha256_text
from cache.proposals import ProposalFile
from cache.records import JSON
from cache.snapshots import SnapshotClock, load_snapshot, save_snapshot
from stages.shared.events import Resumed, TrainingProgress, WeightsDrawn
from stages.shared.stage_config import Trains, TrainsOnData
from stages.shared.step import Runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from altopt.models.region_classifier import RegionClassifier
    from stages.shared.feature_store import FeatureStore


def device_of(runtime: Runtime) -> torch.device:
    """Return the runtime's device; ``auto`` is CUDA where there is one, a GPU for each rank. Raises ``UsageError``."""
    if runtime.device == "auto":
        return runtime.ranks.own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return runtime.ranks.own_device(torch.empty(0, device=runtime.device).device)
    except (RuntimeError, AssertionError):  # the latter from a PyTorch without CUDA
        raise UsageError(f"--device {runtime.device}: this PyTorch sees no such device; use --device cpu") from None


def describe_network(network: NetworkConfig, classes: Sequence[str], pixels: Pixels) -> dict[str, Any]:
    """Return what a checkpoint says of itself."""
    plain: dict[str, Any] = json.loads(json.dumps({"network": asdict(network), "classes": list(classes),
                                                   "pixels": asdict(pixels)}))
    return plain


def require_network(path: Path, description: dict[str, Any], network: NetworkConfig) -> None:
    """Raise ``ArtifactError`` unless a checkpoint holds the network that a config speaks of."""
    held = description.get("network", {}).get("name")
    if held != network.name:
        raise ArtifactError(f"{path.name} holds {held or 'no network known to altopt'}, and {network.name} is asked "
                            "for: choose the recipe it was made with, or import it with --from M0=FILE")


def require_same_frame(path: Path, description: dict[str, Any], network: NetworkConfig) -> None:
    """Raise ``ArtifactError`` unless an RPN was trained with the anchors and image sizes of the config."""
    held = description.get("network", {})
    for name, value in json.loads(json.dumps(asdict(network))).items():
        if held.get(name) != value:
            raise ArtifactError(f"the RPN of {path.name} was trained with {name} = {held.get(name)}, and the recipe "
                                f"says {value}: set network.{name} to what it was, or train the RPN anew")


class TrainedStage:
    """A stage that trains something: its data, its seed, and the loop with snapshots beside the output."""

    store: "FeatureStore | None" = None  # of what frozen conv layers make of the images

    def __init__(self, stage: str, out: Path, config: TrainsOnData, runtime: Runtime) -> None:
        self.dataset: Dataset = open_dataset(config.data, "train", runtime.data_root)
        self.stage, self.out, self.runtime = stage, out, runtime
        self.config = config.for_images(len(self.dataset.ids))
        self.seed: tuple[object, ...] = (config.seed, stage)
        self.snapshot = out.with_name(f"{out.stem}.snapshot.safetensors")  # of the state, while it trains
        self.device = device_of(runtime)
        self.pixels = TORCHVISION_PIXELS  # what the weights want of an image; initial ones bring their own

    def entries(self, ids: Sequence[str] | None = None) -> list[Entry]:
        """Return the images, by default all, each followed by its mirror image if the config has ``flips``."""
        entries = []
        for id in self.dataset.ids if ids is None else ids:
            width, height = self.dataset.size(id)
            for flipped in (False, True) if self.config.flips else (False,):
                entries.append(Entry(id, flipped, landscape=width >= height))
        return entries

    def run(self, module: LossModule, entries: list[Entry], read: Callable[[Entry, int], Sample]) -> dict[str, JSON]:
        """Train on samples that ``read(entry, iteration)`` makes, called from threads; return facts for the record."""
        config, runtime = self.config, self.runtime
        batches = LocalBatches(runtime.ranks, BatchOrder(entries, config.images_per_batch, *self.seed))
        # What adds in a fixed order has to do so from the first iteration, and goes on from no other snapshot.
        exact: dict[str, JSON] = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        fingerprint = sha256_text(json.dumps([runtime.inputs_key, asdict(config) | exact], sort_keys=True))

        def report(progress: Progress) -> None:
            runtime.report(TrainingProgress(
                progress.iteration, progress.iterations, progress.lr, progress.losses,
                round(progress.images_per_second, 3), round(progress.wait_share, 4), round(progress.seconds, 3)))

        # A signal that arrives inside a step waits until the step is done and a snapshot is written.
        with deferred_signals() as stop:
            seconds = train(module, lambda iteration: [read(entry, iteration) for entry in batches[iteration]],
                            config, self.seed, LoopRuntime(
                device=self.device, pixels=self.pixels, workers=runtime.readers, report=report,
                report_every=runtime.report_every, snapshots=FileSnapshots(self.snapshot, fingerprint, runtime, stop),
                diverged=self._keep_batch, group=runtime.ranks, batches=batches))
        about_store: Mapping[str, JSON] = {} if self.store is None else self.store.facts
        seconds += 0.0 if self.store is None else self.store.seconds  # to build it counts as training
        # The number of threads decides the order of sums, and so the last bits, on the CPU; that of processes
        # everywhere.
        return {"train_seconds": round(seconds, 2), "iterations": config.iterations,
                "threads": torch.get_num_threads(), "processes": runtime.ranks.count, **exact, **about_store}

    def _keep_batch(self, batch: Batch, iteration: int) -> str:
        """Write the batch on which a loss was not finite, and say where."""
        path = self.out.with_name(f"{self.out.stem}.diverged.safetensors")
        images = [f"{sample.id}{' mirrored' if sample.flipped else ''}" for sample in batch.samples]
        kept = ({"images": batch.images} if batch.maps is None
                else {f"features.{number}": features for number, features in enumerate(batch.maps)})
        save_checkpoint(path, kept, {"iteration": iteration, "images": images})
        return f" (its {'pixels' if batch.maps is None else 'feature maps'} are in {path.name})"


class Training(TrainedStage):
    """A stage that trains a network of the run from another one's weights."""

    config: Trains

    def __init__(self, stage: str, init: Path, out: Path, config: Trains, runtime: Runtime) -> None:
        super().__init__(stage, out, config, runtime)
        self.tensors, self.description = load_checkpoint(init)
        require_network(init, self.description, config.network)
        self.pixels = Pixels.of(self.description)
        self._frozen: dict[str, str] = {}  # module: digest of its weights before training

    def network(self, parts: Sequence[str], fresh: Sequence[str] = ()) -> FasterRCNN:
        """Return the network with the initial weights; parts in ``fresh``, and missing ones, are re-initialised."""
        # ``parts`` are those that the stage trains or runs: only they are worth a report.
        num_classes = len(self.dataset.classes)
        scores = self.tensors.get("head.cls_score.weight")  # (K + 1, D)
        if scores is not None and "head" not in fresh and len(scores) != num_classes + 1:
            raise ArtifactError(f"the initial weights score {len(scores) - 1} classes and the data set has "
                                f"{num_classes}: train the head anew, or give weights for these classes")
        network = FasterRCNN(self.config.network, num_classes)
        new = network.fill(self.tensors, generator(*self.seed, "weights"), fresh)
        self.runtime.report(WeightsDrawn(tuple(part for part in new if part in parts)))
        return network

    def classifier(self, levels: Sequence[int] = ()) -> "RegionClassifier":
        """Return a region classifier with the initial weights; its head, and what does not fit, is re-initialised."""
        from altopt.models.region_classifier import RegionClassifier

        classifier = RegionClassifier(self.config.network, len(self.dataset.classes), levels)
        new = classifier.fill(self.tensors, generator(*self.seed, "weights"), fresh=("head",))
        self.runtime.report(WeightsDrawn(tuple(new)))
        return classifier

    def freeze(self, network: NetworkOfParts, others: Sequence[str] = ()) -> None:
        """Freeze the conv layers that the config names, and ``others``, such as fc."""
        frozen = [*(f"conv.{layer}" for layer in layers_named(network.conv, self.config.freeze)), *others]
        freeze(network, frozen)
        # Taken now: the network may share the memory of the tensors it was filled from, which then change with it.
        self._frozen = {name: digest(network.get_submodule(name).state_dict()) for name in frozen}

    @contextmanager
    def stored_maps(self, conv: nn.Sequential) -> Iterator[None]:
        """Let ``sample`` read stored maps in the block, where all conv layers are frozen and that pays."""
        # Asked of the network, not of the config: whatever was configured, a map of learning layers is never stored.
        # At several scales an image has several maps, and none is seen often enough.
        if self.config.scales or any(weight.requires_grad for weight in conv.parameters()):
            yield
            return
        from stages.shared.feature_store import FeatureStore  # here: most stages need none

        with FeatureStore(self.out, conv, self.pixels, self.config.network, self.dataset, self.runtime,
                          precision=self.config.precision, device=self.device) as self.store:
            self.store.find_or_build(self.config.flips, self.config.iterations * self.config.images_per_batch)
            yield

    def sample(self, entry: Entry, proposals: "NDArray[np.float32] | None" = None) -> Sample:
        """Return an image, or its stored map where there are such; from any thread."""
        if self.store is not None:
            return self.store.sample(entry.id, flipped=entry.flipped, proposals=proposals)
        return read_sample(self.dataset, entry.id, self.config.network, flipped=entry.flipped, proposals=proposals)

    def scale(self, count: int, entry: Entry, iteration: int) -> int:
        """Return which of so many scales an image has at this visit."""
        random = generator(*self.seed, "scale", iteration, entry.id, entry.flipped)
        return int(torch.randint(count, (), generator=random))

    def save(self, network: NetworkOfParts, parts: Sequence[str], **described: JSON) -> None:
        """Write the output, after making sure that frozen layers are what they were; ``described`` goes with it."""
        # Of several processes the first one writes, after making sure that all have the same.
        tensors = network.tensors(parts)
        ranks = self.runtime.ranks
        if ranks.count > 1:
            digests = ranks.all_gather({name: digest({name: tensor}) for name, tensor in tensors.items()})
            for name, (rank, held) in product(tensors, enumerate(digests)):
                if held[name] != digests[0][name]:
                    raise AssertionError(f"{self.stage}: {name} of process {rank} is not that of process 0")
        if not ranks.first:
            return
        for name, before in self._frozen.items():
            if digest(network.get_submodule(name).state_dict()) != before:
                raise AssertionError(f"{self.stage} changed {name}, which is frozen")
        classes = self.dataset.classes if "head" in parts else self.description.get("classes", ())
        save_checkpoint(self.out, tensors, describe_network(self.config.network, classes, self.pixels) | described)
        self.snapshot.unlink(missing_ok=True)


class FileSnapshots:
    """The training loop's state in a file; written when the clock says so, and when a signal asks to stop."""
    # Of several ranks the first one writes, and a signal to any of them stops all after the same iteration.

    def __init__(self, path: Path, fingerprint: str, runtime: Runtime, stop: Stop) -> None:
        self.path, self.fingerprint, self.runtime, self.stop = path, fingerprint, runtime, stop
        self.ranks = runtime.ranks
        self.agreed = Stop()
        self.clock = SnapshotClock(runtime.snapshot_seconds)

    def load(self) -> tuple[int, dict[str, Tensor], float] | None:
        """Return what the last process of the same stage, inputs and config left; None if nothing fits."""
        found = load_snapshot(self.path, self.fingerprint)
        # Each reads the file itself: processes that began at different iterations would wait for each other for ever.
        if len(set(self.ranks.all_gather(found and found[0]))) > 1:
            raise ArtifactError(f"{self.path.name} is not the same for all processes: let them share the run folder")
        if found is None:
            return None
        self.runtime.report(Resumed(found[0]))
        return found

    def due(self) -> bool:
        """Return whether to save now, or to stop."""
        self.agreed.signal = self.ranks.all_reduce_max(self.stop.signal or 0) or None
        return self.agreed.signal is not None or (self.ranks.first and self.clock.due())

    def save(self, iteration: int, tensors: dict[str, Tensor], seconds: float) -> None:
        """Save, and then stop if a signal asked for it."""
        if self.ranks.first:
            with self.clock.writing():
                save_snapshot(self.path, key=self.fingerprint, iteration=iteration, tensors=tensors, seconds=seconds)
        if self.agreed.signal is not None:
            self.ranks.broadcast(None)  # until it is written: a process that ends makes the launcher end the others
            self.agreed.raise_it()


class CachedProposals:
    """A proposal file read image by image, cut to the ``limit`` best of each."""

    def __init__(self, path: Path, dataset: Dataset, limit: int) -> None:
        self.file, self.limit = ProposalFile(path), limit
        missing = [id for id in dataset.ids if id not in self.file]
        if missing:
            raise ArtifactError(f"{path.name} has no proposals for image {missing[0]} and {len(missing) - 1} others "
                                f"of {dataset.name}: make {path.stem} again, or import one for this data set")

    def get(self, id: str) -> "NDArray[np.float32]":
        """Return an image's boxes, float32 [K, 4] in the original frame, best first."""
        return self.file.get(id)[0][: self.limit]


def roi_sampling(config: RoITraining) -> RoISampling:
    """Return how RoIs are drawn: each image of a batch has an equal part of ``rois_per_batch``, and at least one."""
    thresholds = RoIThresholds(config.fg_iou, config.bg_iou_high, config.bg_iou_low)
    return RoISampling(thresholds, max(1, config.rois_per_batch // config.images_per_batch), config.fg_fraction)


def trainable_entries(training: Training, cached: CachedProposals,
                      thresholds: RoIThresholds) -> tuple[list[Entry], int]:
    """Return the entries of images with at least one foreground or background RoI, and how many have none."""
    dataset = training.dataset
    usable = [
        id for id in dataset.ids
        if has_samples(torch.from_numpy(cached.get(id)), torch.from_numpy(dataset.objects(id).usable().boxes),
                       thresholds)
    ]
    if not usable:
        raise ArtifactError("no image has a foreground or background RoI: look at the proposals with altopt recall")
    return training.entries(usable), len(dataset.ids) - len(usable)


def box_statistics(training: Training, cached: CachedProposals, kind: str, overlap: float) -> tuple[Tensor, Tensor]:
    """Return the means and deviations of box deltas, each ``Tensor[K + 1, 4]``: measured on the proposals, or fixed."""
    dataset = training.dataset
    if kind == "fixed":
        return fixed_statistics(len(dataset.classes))

    def images() -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
        for id in dataset.ids:
            objects = dataset.objects(id).usable()
            yield (torch.from_numpy(cached.get(id)), torch.from_numpy(objects.boxes),
                   torch.from_numpy(objects.labels), dataset.size(id)[0])

    return measure(images(), len(dataset.classes), overlap, training.config.flips)
