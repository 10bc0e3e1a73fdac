"""The store of frozen conv features: stages 4 to 6 see the same maps again and again, so they are computed once.

A store is a file of runs/NAME/features/, named by a digest of all that its maps depend on: the weights of the conv
layers, the frame, the data, the precision, and what computed them. M2, M3 and M4 share their conv layers, so they share
a store. It is a cache and no artifact: it has no record, nothing depends on whether it is there, and a stage computes
the same bytes with and without it (altopt/frozen.py says why).

It is built when a stage first needs it, and filled on after an interruption. Before that, the stores of other conv
layers in the folder are removed: they are large, and stage 4 no longer starts from those.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.errors import ArtifactError, ResourceError
from altopt.extents import maps_bytes
from cache.checkpoints import digest
from cache.features import FeatureMapFile, FeatureMapWriter, MapKey, Precision
from cache.files import canonical_json, sha256_text
from cache.preallocated import growing_path
from stages.feature_maps import map_shapes, write_maps
from stages.feature_plan import FOLDER, Decision, decide, gigabytes, sizes_of
from stages.step import Runtime

DIGITS = 16  # of the digest in a file's name


class FeatureStore:
    """The stored maps of one stage's pictures, as a context; ``maps`` is None where the stage goes without.

    ``facts`` are for the stage's record, ``seconds`` is what building took in this process.
    """

    def __init__(self, out: Path, conv: nn.Sequential, network: NetworkConfig, dataset: Dataset, runtime: Runtime, *,
                 precision: Precision, device: torch.device) -> None:
        self.folder = out.parent / FOLDER
        self.conv, self.network, self.dataset, self.runtime = conv, network, dataset, runtime
        self.precision, self.device = precision, device
        self.maps: FeatureMapFile | None = None
        self.facts: dict[str, Any] = {}
        self.seconds = 0.0
        self._digest = digest({name: tensor.detach() for name, tensor in conv.state_dict().items()})

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        if self.maps is not None:
            self.maps.close()

    def find(self, flips: tuple[bool, ...]) -> None:
        """Take a finished store if there is one, with mirror images or without as ``flips`` allows; build none.

        That is for stages that look at each picture once.
        """
        if self.runtime.feature_store != "off":
            found = filter(None, (self._opened(each) for each in flips))
            self.maps = next(found, None)
        self._say("read" if self.maps else "none read")

    def find_or_build(self, flips: bool, visits: int) -> None:
        """Take the store, or build it if that pays for so many visits of pictures; see ``decide``.

        Of several ranks the first one decides; they build it together, and all read it or none.
        """
        ranks = self.runtime.ranks
        if ranks.first:
            self._find_or_build(flips, visits)
            ranks.same("read" if self.maps else "none")
            return
        while (news := ranks.same(None)) == "build":
            self._write(None, flips)
        self.maps = self._opened(flips) if news == "read" else None

    def _find_or_build(self, flips: bool, visits: int) -> None:
        wish = self.runtime.feature_store
        self.maps = self._opened(flips) if wish != "off" else None
        if self.maps is not None:
            self._say("read")
            return
        decision = self._decision(flips, visits)
        if not decision.used:
            self._say(f"off: {decision.reason}")
            return
        try:
            self._build(flips, decision.reason)
        except (ResourceError, ArtifactError) as error:
            if wish == "on":
                raise
            growing_path(self._path(flips)).unlink(missing_ok=True)
            self._say(f"off: {error}")

    def _decision(self, flips: bool, visits: int) -> Decision:
        if not self.runtime.data_digest:
            return Decision(False, "the stage was not told the digest of its data")
        if self.runtime.feature_store == "off":
            return decide("off", 0, 0, 0, 0)
        needed = maps_bytes(sizes_of(self.dataset), self.network, flips, self.precision)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        reusable = [growing_path(self._path(flips)), *self._outdated()]
        free = shutil.disk_usage(self.folder.parent).free + sum(_occupied(path) for path in reusable)
        return decide(self.runtime.feature_store, needed, free, visits, len(self.dataset.ids) * (2 if flips else 1))

    def _attributes(self, flips: bool) -> dict[str, Any]:
        frame = {"network": self.network.name, "short_side": self.network.short_side, "max_side": self.network.max_side}
        return {"conv": self._digest, "dataset": self.runtime.data_digest, "settings": {
            **frame, "flips": flips, "computed_by": f"torch {torch.__version__} on {self.device.type}"}}

    def _path(self, flips: bool) -> Path:
        name = sha256_text(canonical_json([self._attributes(flips), self.precision]))
        return self.folder / f"{self._digest[:DIGITS]}-{name[:DIGITS]}.h5"

    def _opened(self, flips: bool) -> FeatureMapFile | None:
        """Return the finished store; None if there is none, or if it is damaged: then it is built anew."""
        path = self._path(flips)
        if not path.is_file():
            return None
        try:
            maps = FeatureMapFile(path)
        except ArtifactError as error:
            self.runtime.report({"event": "note", "text": f"{error} (it is only a cache)"})
            return None
        wanted = self._attributes(flips)
        held = {**maps.attributes, "settings": maps.settings}
        return maps if all(held.get(name) == value for name, value in wanted.items()) else None

    def _build(self, flips: bool, reason: str) -> None:
        started = time.perf_counter()
        path = self._path(flips)
        self._remove_outdated()
        self._say(f"building {FOLDER}/{path.name}: {reason}")
        shapes = map_shapes(self.dataset, [self.network], flips)
        with FeatureMapWriter(path, self._attributes(flips), shapes, self.precision) as writer:
            self.runtime.ranks.same("build")
            found = self._write(writer, flips)
        self.maps = FeatureMapFile(path)
        self.seconds = time.perf_counter() - started
        self._say(f"built: {len(shapes)} maps, {gigabytes(path.stat().st_size)}, in {self.seconds:.1f} s")
        self.facts |= {"store_seconds": round(self.seconds, 2), "store_maps": len(shapes), "store_maps_found": found,
                       "store_bytes": path.stat().st_size}

    def _write(self, writer: FeatureMapWriter | None, flips: bool) -> int:
        shapes = map_shapes(self.dataset, [self.network], flips)
        conv = self.conv.to(self.device).to(memory_format=torch.channels_last)
        return write_maps(writer, shapes, conv, self.dataset, [self.network], precision=self.precision,
                          device=self.device, runtime=self.runtime)

    def _outdated(self) -> Iterator[Path]:
        """Yield the stores of other conv layers, finished and begun."""
        for path in sorted(self.folder.glob("*.h5")):
            if not path.name.startswith(self._digest[:DIGITS]):
                yield path

    def _remove_outdated(self) -> None:
        for path in list(self._outdated()):
            with contextlib.suppress(OSError):
                path.unlink()
                text = f"{FOLDER}/{path.name} is removed: other conv layers made it"
                self.runtime.report({"event": "note", "text": text})

    def _say(self, text: str) -> None:
        self.facts["feature_store"] = text
        self.runtime.report({"event": "note", "text": f"feature store: {text}"})

    def map_of(self, id: str, flipped: bool) -> Tensor:
        """Return the stored map of a picture, ``Tensor[C, h, w]``; may be called by several threads."""
        assert self.maps is not None
        return self.maps.get(MapKey(id, flipped, 0))


def _occupied(path: Path) -> int:
    """Return what a file takes of the disk; holes take nothing."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
