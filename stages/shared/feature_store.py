"""The store of frozen conv features: training sees the same maps again and again, so they are computed once.

A store is a file of runs/NAME/features/, named by the number of conv layers that its maps went through and by a digest
of all that they depend on: the weights of those layers, the frame, the data, the precision, and what computed them. M2,
M3 and M4 share all their conv layers, so they share a store; M1 and M2 share the first ones, which stages 1 and 3 leave
as they are in M0. It is a cache and no artifact: it has no record, nothing depends on whether it is there, and a stage
computes the same bytes with and without it (altopt/models/frozen.py says why).

It is built when a stage first needs it, from maps behind fewer layers where there are any, and filled on after an
interruption. Before that, the stores of other layers in the folder are removed: they are large, and no stage to come
starts from those.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from altopt.batches.samples import Sample, read_sample, stored_sample
from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.errors import ArtifactError, ResourceError
from altopt.extents import maps_bytes
from altopt.layers import LAYERS
from cache.checkpoints import digest
from cache.features import FeatureMapFile, FeatureMapWriter, MapKey, Precision
from cache.files import canonical_json, sha256_text
from cache.preallocated import growing_path
from stages.shared.events import Note
from stages.shared.feature_maps import map_shapes, write_maps
from stages.shared.feature_plan import FOLDER, Decision, decide, extent, gigabytes, reserved_bytes, sizes_of
from stages.shared.step import Runtime

DIGITS = 16  # of a digest in a file's name
NAME = re.compile(rf"(\d+)-([0-9a-f]{{{DIGITS}}})-")


class FeatureStore:
    """What the first ``layers`` conv layers (None: all) make of one stage's images, as a context.

    ``maps`` are those found or built, which went through ``stored`` layers, at most so many; None where the stage goes
    without. ``facts`` are for the stage's record, ``seconds`` is what building took in this process.
    """

    def __init__(self, out: Path, conv: nn.Sequential, network: NetworkConfig, dataset: Dataset, runtime: Runtime, *,
                 precision: Precision, device: torch.device, layers: int | None = None) -> None:
        self.folder = out.parent / FOLDER
        self.conv, self.network, self.dataset, self.runtime = conv, network, dataset, runtime
        self.precision, self.device = precision, device
        self.layers = len(LAYERS[network.name]) if layers is None else layers
        self.stored = 0
        self.maps: FeatureMapFile | None = None
        self.facts: dict[str, Any] = {}
        self.seconds = 0.0
        self._weights = {name: tensor.detach() for name, tensor in conv.state_dict().items()}
        self._digests: dict[int, str] = {}

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self.maps is not None:
            self.maps.close()

    def find(self, flips: tuple[bool, ...]) -> None:
        """Take the finished store behind most layers, with mirror images or without as ``flips`` allows; build none.

        That is for stages that look at each image once.
        """
        if self.runtime.feature_store != "off":
            self._take(self._deepest(flips, self.layers))
        self._say(f"read, {self._extent(self.stored)}" if self.maps else "none read")

    def find_or_build(self, flips: bool, visits: int) -> None:
        """Take the store, or build it if that pays for so many visits of images; see ``decide``.

        Of several ranks the first one decides; they build it together, and all read it or none.
        """
        ranks = self.runtime.ranks
        if ranks.first:
            self._find_or_build(flips, visits)
            ranks.broadcast(self.stored)
            return
        while (news := ranks.broadcast(None)) == "build":
            self._write(None, flips)
        self._take(self._deepest(_covering(flips), news))

    def sample(self, id: str, *, flipped: bool = False, proposals: np.ndarray | None = None) -> Sample:
        """Return an image of the data set as ``read_sample`` does, or its stored map; from any thread."""
        if self.maps is None:
            return read_sample(self.dataset, id, self.network, flipped=flipped, proposals=proposals)
        return stored_sample(self.dataset, id, self.network, self.map_of(id, flipped), flipped=flipped,
                             proposals=proposals)

    def map_of(self, id: str, flipped: bool) -> Tensor:
        """Return the stored map of an image, ``Tensor[C, h, w]``; may be called by several threads."""
        assert self.maps is not None
        return self.maps.get(MapKey(id, flipped, 0))

    def _find_or_build(self, flips: bool, visits: int) -> None:
        wish = self.runtime.feature_store
        if wish != "off":
            self._take(self._deepest(_covering(flips), self.layers))
        if self.layers and self.stored == self.layers:
            self._say(f"read, {self._extent(self.stored)}")
            return
        decision = self._decision(flips, visits)
        if not decision.used:
            self._say_off(decision.reason)
            return
        try:
            self._build(flips, decision.reason)
        except (ResourceError, ArtifactError) as error:
            if wish == "on":
                raise
            growing_path(self._path(self.layers, flips)).unlink(missing_ok=True)
            self._say_off(str(error))

    def _say_off(self, reason: str) -> None:
        self._say(f"off: {reason}" + (f"; {self._extent(self.stored)} is read" if self.maps else ""))

    def _decision(self, flips: bool, visits: int) -> Decision:
        wish = self.runtime.feature_store
        if wish == "off":
            return decide("off", 0, 0, 0, 0)
        if not self.layers:
            return Decision(False, "the first conv layer learns")
        if not self.runtime.data_digest:
            return Decision(False, "the stage was not told the digest of its data")
        if wish == "auto" and self.device.type != "cpu" and self.layers < len(LAYERS[self.network.name]):
            return Decision(False, f"a GPU computes {self._extent(self.layers)} sooner than a disk delivers it")
        kind = (self.network, flips, self.precision, self.layers)
        sizes = sizes_of(self.dataset)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        reusable = [growing_path(self._path(self.layers, flips)), *self._outdated()]
        free = shutil.disk_usage(self.folder.parent).free + sum(_occupied(path) for path in reusable)
        return decide(wish, maps_bytes(sizes, *kind), free, visits, len(self.dataset.ids) * (2 if flips else 1),
                      reserved_bytes(sizes, *kind))

    def _digest(self, layers: int) -> str:
        """Return the digest of the weights of the first layers."""
        if layers not in self._digests:
            names = {layer.name for layer in LAYERS[self.network.name][:layers]}
            self._digests[layers] = digest({name: tensor for name, tensor in self._weights.items()
                                            if ".".join(name.split(".")[:2]) in names})
        return self._digests[layers]

    def _extent(self, layers: int) -> str:
        return extent(self.network.name, layers)

    def _attributes(self, layers: int, flips: bool) -> dict[str, Any]:
        frame = {"network": self.network.name, "short_side": self.network.short_side, "max_side": self.network.max_side}
        return {"conv": self._digest(layers), "dataset": self.runtime.data_digest, "settings": {
            **frame, "layers": layers, "flips": flips,
            "computed_by": f"torch {torch.__version__} on {self.device.type}"}}

    def _path(self, layers: int, flips: bool) -> Path:
        name = sha256_text(canonical_json([self._attributes(layers, flips), self.precision]))
        return self.folder / f"{layers:02d}-{self._digest(layers)[:DIGITS]}-{name[:DIGITS]}.h5"

    def _take(self, found: tuple[int, FeatureMapFile] | None) -> None:
        if self.maps is not None:
            self.maps.close()
        self.stored, self.maps = found or (0, None)

    def _deepest(self, flips: tuple[bool, ...], most: int) -> tuple[int, FeatureMapFile] | None:
        """Return the finished store behind the greatest number of layers up to ``most``, and that number."""
        numbers = {int(found[1]) for path in self.folder.glob("*.h5") if (found := NAME.match(path.name))}
        for layers in sorted((each for each in numbers if 0 < each <= most), reverse=True):
            for mirrored in flips:
                if maps := self._opened(layers, mirrored):
                    return layers, maps
        return None

    def _opened(self, layers: int, flips: bool) -> FeatureMapFile | None:
        """Return the finished store; None if there is none, or if it is damaged: then it is built anew."""
        path = self._path(layers, flips)
        if not path.is_file():
            return None
        try:
            maps = FeatureMapFile(path)
        except ArtifactError as error:
            self.runtime.report(Note(f"{error} (it is only a cache)"))
            return None
        wanted = self._attributes(layers, flips)
        held = {**maps.attributes, "settings": maps.settings}
        return maps if all(held.get(name) == value for name, value in wanted.items()) else None

    def _build(self, flips: bool, reason: str) -> None:
        started = time.perf_counter()
        path = self._path(self.layers, flips)
        self._remove_outdated()
        self._say(f"building {FOLDER}/{path.name}, {self._extent(self.layers)}: {reason}")
        shapes = map_shapes(self.dataset, [self.network], flips, self.layers)
        with FeatureMapWriter(path, self._attributes(self.layers, flips), shapes, self.precision) as writer:
            self.runtime.ranks.broadcast("build")
            found = self._write(writer, flips)
        self._take((self.layers, FeatureMapFile(path)))
        self.seconds = time.perf_counter() - started
        size = path.stat().st_size
        self._say(f"built: {len(shapes)} maps of {self._extent(self.layers)}, {gigabytes(size)}, in "
                  f"{self.seconds:.1f} s")
        self.facts |= {"store_seconds": round(self.seconds, 2), "store_maps": len(shapes), "store_maps_found": found,
                       "store_bytes": size}

    def _write(self, writer: FeatureMapWriter | None, flips: bool) -> int:
        shapes = map_shapes(self.dataset, [self.network], flips, self.layers)
        conv = self.conv.to(self.device).to(memory_format=torch.channels_last)
        self._take(self._deepest(_covering(flips), self.layers - 1))

        def read(key: MapKey) -> Sample:
            return self.sample(key.image_id, flipped=key.mirrored)

        return write_maps(writer, shapes, conv, read, precision=self.precision, device=self.device,
                          runtime=self.runtime, layers=self.layers)

    def _outdated(self) -> Iterator[Path]:
        """Yield the stores, finished and begun, of as many layers as these or fewer that are not these layers."""
        for path in sorted(self.folder.glob("*.h5")):
            found = NAME.match(path.name)
            layers = int(found[1]) if found else 0
            if not found or (layers <= self.layers and found[2] != self._digest(layers)[:DIGITS]):
                yield path

    def _remove_outdated(self) -> None:
        for path in list(self._outdated()):
            with contextlib.suppress(OSError):
                path.unlink()
                text = f"{FOLDER}/{path.name} is removed: other conv layers made it"
                self.runtime.report(Note(text))

    def _say(self, text: str) -> None:
        self.facts["feature_store"] = text
        self.runtime.report(Note(f"feature store: {text}"))


def _covering(flips: bool) -> tuple[bool, ...]:
    """Return with which mirror images a store has what is asked for: one that has them serves both."""
    return (True,) if flips else (False, True)


def _occupied(path: Path) -> int:
    """Return what a file takes of the disk; holes take nothing."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
