"""The store of frozen conv features: training sees the same maps again and again, so they are computed once."""
# A store is a file of runs/NAME/features/, named by a digest of the conv layers and one of all else that its maps
# depend on: the frame, the data, the precision, and what computed them. M2, M3 and M4 share their conv layers, so M3,
# P2 and M4 share a store. It is a cache and no artifact: it has no record, nothing depends on whether it is there, and
# a stage computes the same bytes with and without it. It is built when a stage first needs it, and filled on after an
# interruption. Before that, the stores of other conv layers in the folder are removed: they are large, and no stage to
# come starts from those.

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from altopt.batches.reading import Prefetcher
from altopt.batches.samples import Sample, make_batch, read_sample, stored_sample
from altopt.config import NetworkConfig, Pixels
from altopt.datasets.dataset import Dataset
from altopt.errors import ArtifactError, ResourceError
from altopt.extents import map_shape, maps_bytes
from altopt.models.trunk import image_maps
from cache.checkpoints import digest
from cache.features import FeatureMapFile, FeatureMapWriter, MapKey, Precision
from cache.files import canonical_json, sha256_text
from cache.preallocated import growing_path
from stages.shared.events import ImagesDone, Note
from stages.shared.feature_plan import FOLDER, Decision, decide, gigabytes, sizes_of
from stages.shared.step import Runtime

DIGITS = 16  # of a digest in a file's name
Shapes = Mapping[MapKey, tuple[int, int, int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FeatureStore:
    """What the conv layers make of one stage's images, as a context."""

    def __init__(self, out: Path, conv: nn.Sequential, pixels: Pixels, network: NetworkConfig, dataset: Dataset,
                 runtime: Runtime, *, precision: Precision, device: torch.device) -> None:
        self.folder = out.parent / FOLDER
        self.conv, self.pixels, self.network, self.dataset, self.runtime = conv, pixels, network, dataset, runtime
        self.precision, self.device = precision, device
        self.maps: FeatureMapFile | None = None  # those found or built
        self.facts: dict[str, str | int | float] = {}  # for the stage's record
        self.seconds = 0.0  # that building took in this process
        self._threads = torch.get_num_threads()
        self._damaged = False
        self._repair = threading.Lock()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self._damaged and self.maps is not None:
            # Not repaired in place: other processes have it mapped, and files here are replaced, never written into.
            self.maps.path.unlink(missing_ok=True)
        self.maps = None

    def find(self, flips: tuple[bool, ...]) -> None:
        """Take the finished store, with mirror images or without as ``flips`` allows; build none."""
        # That is for stages that look at each image once.
        if self.runtime.feature_store != "off":
            self.maps = self._finished(flips)
        if self.maps is not None:
            self._say("read")

    def find_or_build(self, flips: bool, visits: int) -> None:
        """Take the store, or build it if that pays for so many visits of images; see ``decide``."""
        # Of several ranks the first one decides; they build it together, and all read it or none.
        ranks, covering = self.runtime.ranks, (True,) if flips else (False, True)  # with mirror images it serves both
        if not ranks.first:
            while (news := ranks.broadcast(None)) == "build":
                self._write(None, flips)
            self.maps = self._finished(covering) if news else None
            return
        self.maps = self._finished(covering) if self.runtime.feature_store != "off" else None
        if self.maps is not None:
            self._say("read")
        elif not (decision := self._decision(flips, visits)).used:
            self._say(f"off: {decision.reason}")
        else:
            try:
                self._build(flips, decision.reason)
            except (ResourceError, ArtifactError) as error:
                if self.runtime.feature_store == "on":
                    raise
                growing_path(self._path(flips)).unlink(missing_ok=True)
                self._say(f"off: {error}")
        ranks.broadcast(self.maps is not None)

    def sample(self, id: str, *, flipped: bool = False, proposals: np.ndarray | None = None) -> Sample:
        """Return an image of the data set as ``read_sample`` does, or its stored map; from any thread."""
        if self.maps is None:
            return read_sample(self.dataset, id, self.network, flipped=flipped, proposals=proposals)
        try:
            features = self.maps.get(MapKey(id, flipped, 0))
        except ArtifactError:
            features = self._computed_again(id, flipped)
        return stored_sample(self.dataset, id, self.network, features, flipped=flipped, proposals=proposals)

    def _computed_again(self, id: str, flipped: bool) -> Tensor:
        """Return the map that the file does not give, to the same bits."""
        with self._repair:
            if not self._damaged:
                self._damaged = True
                self._note(f"feature store: the map of {id} is damaged: damaged maps are computed at each visit, and "
                           "the next stage builds the store anew")
            # Readers have a thread each to compute with, and another number of them may sum in another order.
            torch.set_num_threads(self._threads)
            sample = read_sample(self.dataset, id, self.network, flipped=flipped)
            return computed_map(self.conv, self.pixels, sample, self.precision, self.device)

    def _decision(self, flips: bool, visits: int) -> Decision:
        wish = self.runtime.feature_store
        if wish == "off":
            return decide("off", 0, 0, 0, 0)
        if not self.runtime.data_digest:
            return Decision(False, "the stage was not told the digest of its data")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # A file full of holes takes only what was written of it.
        reusable = sum(path.stat().st_blocks * 512 for path in [growing_path(self._path(flips)), *self._outdated()]
                       if path.is_file())
        free = shutil.disk_usage(self.folder.parent).free + reusable
        needed = maps_bytes(sizes_of(self.dataset), self.network, flips, self.precision)
        return decide(wish, needed, free, visits, len(self.dataset.ids) * (2 if flips else 1))

    @cached_property
    def _conv_digest(self) -> str:
        return digest({name: tensor.detach() for name, tensor in self.conv.state_dict().items()})

    def _description(self, flips: bool) -> dict[str, object]:
        return {"conv": self._conv_digest, "dataset": self.runtime.data_digest, "settings": {
            "network": self.network.name, "short_side": self.network.short_side, "max_side": self.network.max_side,
            "pixels": asdict(self.pixels), "flips": flips,
            "computed_by": f"torch {torch.__version__} on {self.device.type}"}}

    def _path(self, flips: bool) -> Path:
        name = sha256_text(canonical_json([self._description(flips), self.precision]))
        return self.folder / f"{self._conv_digest[:DIGITS]}-{name[:DIGITS]}.safetensors"

    def _finished(self, flips: tuple[bool, ...]) -> FeatureMapFile | None:
        """Return the finished store; None if there is none, or one that cannot be read: then it is built anew."""
        for path in map(self._path, flips):
            if path.is_file():
                try:
                    return FeatureMapFile(path)
                except ArtifactError as error:
                    self._note(f"{error} (a stage that needs it does so by itself)")
        return None

    def _build(self, flips: bool, reason: str) -> None:
        started = time.perf_counter()
        path = self._path(flips)
        for outdated in list(self._outdated()):
            with contextlib.suppress(OSError):
                outdated.unlink()
                self._note(f"{FOLDER}/{outdated.name} is removed: other conv layers, or an earlier altopt, made it")
        self._say(f"is built as {FOLDER}/{path.name}: {reason}")
        shapes = map_shapes(self.dataset, [self.network], flips)
        with FeatureMapWriter(path, self._description(flips), shapes, self.precision) as writer:
            self.runtime.ranks.broadcast("build")
            found = self._write(writer, flips)
        self.maps = FeatureMapFile(path)
        self.seconds = time.perf_counter() - started
        size = path.stat().st_size
        self._say(f"built: {len(shapes)} maps, {gigabytes(size)}, in {self.seconds:.1f} s")
        self.facts |= {"store_seconds": round(self.seconds, 2), "store_maps": len(shapes), "store_maps_found": found,
                       "store_bytes": size}

    def _write(self, writer: FeatureMapWriter | None, flips: bool) -> int:
        conv = self.conv.to(self.device).to(memory_format=torch.channels_last)
        return write_maps(writer, map_shapes(self.dataset, [self.network], flips), conv, self.pixels,
                          lambda key: read_sample(self.dataset, key.image_id, self.network, flipped=key.mirrored),
                          precision=self.precision, device=self.device, runtime=self.runtime)

    def _outdated(self) -> Iterator[Path]:
        """Yield the stores, finished and begun, of other conv layers and of earlier formats."""
        for path in sorted(self.folder.glob("*")):
            if path.suffix == ".h5" or (path.suffix == ".safetensors"
                                        and not path.name.startswith(f"{self._conv_digest[:DIGITS]}-")):
                yield path

    def _say(self, text: str) -> None:
        self.facts["feature_store"] = text
        self._note(f"feature store {text}")

    def _note(self, text: str) -> None:
        self.runtime.report(Note(text))


def map_shapes(dataset: Dataset, frames: Sequence[NetworkConfig], flips: bool) -> Shapes:
    """Return (channels, height, width) of the map of every image in every frame, with ``flips`` mirrored too."""
    shapes: dict[MapKey, tuple[int, int, int]] = {}
    for id in dataset.ids:
        of_frames = [map_shape(frame, dataset.size(id)) for frame in frames]
        for mirrored in (False, True) if flips else (False,):
            shapes |= {MapKey(id, mirrored, scale): shape for scale, shape in enumerate(of_frames)}
    return shapes


def computed_map(conv: nn.Sequential, pixels: Pixels, sample: Sample, precision: Precision,
                 device: torch.device) -> Tensor:
    """Return what the conv layers, which are on the device, make of one image: ``Tensor[C, h, w]`` on the CPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        features = image_maps(conv, make_batch([sample], device, pixels=pixels))[0]  # (C, h, w)
    return features.to(DTYPES[precision]).cpu()


def write_maps(writer: FeatureMapWriter | None, shapes: Shapes, conv: nn.Sequential, pixels: Pixels,
               read: Callable[[MapKey], Sample], *, precision: Precision, device: torch.device,
               runtime: Runtime) -> int:
    """Write every map that the writer does not have yet, reading samples ahead; return how many it had."""
    # ``conv`` is on the device. Several ranks divide the work; rank 0 has the writer.
    def work(own: Sequence[MapKey]) -> Iterator[Tensor]:
        with Prefetcher(read, own, runtime.readers) as ahead:
            for sample in ahead:
                # One image at a time: convolutions of several sum in another order, which changes last bits.
                yield computed_map(conv, pixels, sample, precision, device)

    missing = runtime.ranks.broadcast([key for key in shapes if not writer.done(key)] if writer is not None else None)
    found = len(shapes) - len(missing)
    # Closed at once after an error, or readers would go on in the background while the file is given up.
    with closing(runtime.ranks.map_images(missing, work)) as made:
        for done, (features, key) in enumerate(zip(made, missing, strict=False), found + 1):
            assert writer is not None
            writer.write(key, features)
            runtime.report(ImagesDone(done, len(shapes), "maps"))
    return found
