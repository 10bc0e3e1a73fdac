"""Whether a store of feature maps pays and fits: decided from sizes, before anything is computed. No torch here."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from altopt.datasets.dataset import DataConfig, Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import AltoptError
from altopt.extents import maps_bytes
from altopt.layers import LAYERS, names_matching
from cache.files import canonical_json, sha256_text, write_text_atomic
from stages.shared.stage_config import StageConfig, Trains

SPARE_SHARE, SPARE_BYTES = 10, 2**30  # what a store must leave free: a tenth of its size, and at least a GiB
FOLDER, SIZES = "features", ".sizes.json"
Sizes = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Decision:
    """Whether maps are stored, and why, in words."""

    used: bool
    reason: str


class Foreseen(TypedDict):
    """What a store will come to; JSON-able."""

    bytes: int  # on disk
    used: bool  # whether "auto" makes one
    reason: str


def freezes_all(config: StageConfig) -> bool:
    """Return whether a stage can read stored maps: all conv layers are frozen. ``UsageError`` for unknown layers."""
    if not isinstance(config, Trains) or not config.stores_maps or config.scales:
        return False
    weighted = [name for layer in LAYERS[config.network.name] for name in layer.weights]
    return names_matching(weighted, config.freeze) == weighted


def decide(wish: str, needed: int, free: int, visits: int, entries: int) -> Decision:
    """Return what ``--feature-store`` comes to: a store of ``needed`` bytes on a disk with ``free`` ones.

    The stage looks at ``entries`` images, mirror images counted, ``visits`` times in all.
    """
    # One look at each is enough, since later stages read the store as well. Asked for with "on", it is made whatever it
    # costs.
    if wish == "off":
        return Decision(False, "not wanted (--feature-store off)")
    if wish == "on":
        return Decision(True, f"asked for, {gigabytes(needed)}")
    if visits < entries:
        return Decision(False, f"{visits} visits see only part of {entries} images, caching would not pay")
    # Nobody thanks a cache for the last byte of a disk, on which checkpoints are still to be written.
    spare = max(needed // SPARE_SHARE, SPARE_BYTES)
    if needed + spare > free:
        return Decision(False, f"{gigabytes(needed)} do not fit: {gigabytes(free)} are free, and {gigabytes(spare)} of "
                               "them stay so")
    return Decision(True, f"{gigabytes(needed)}, {visits / max(entries, 1):.1f} visits of each image")


def gigabytes(size: int) -> str:
    """Return a size as people say it, in powers of 1000: 46 MB, 37.6 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 999_500_000 else f"{size / 1e6:.0f} MB"


def sizes_of(dataset: Dataset) -> Sizes:
    """Return (width, height, how many) of a data set's images."""
    return counted(dataset.size(id) for id in dataset.ids)


def counted(sizes: Iterable[tuple[int, int]]) -> Sizes:
    """Return each (width, height) with how many there are of it."""
    counts = Counter(sizes)
    return [(width, height, count) for (width, height), count in sorted(counts.items())]


def remember_sizes(folder: Path, config: DataConfig, sizes: Iterable[tuple[int, int]], root: Path | None) -> None:
    """Keep the sizes of a training split, just looked at, for ``altopt plan``, which has no time to look."""
    write_text_atomic(folder / SIZES, json.dumps({"key": _key(config, root), "sizes": counted(sizes)}))


def known_sizes(folder: Path, config: DataConfig, root: Path | None) -> Sizes | None:
    """Return the sizes of the training split's images if they are known without reading annotations."""
    try:
        kept = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        if kept["key"] == _key(config, root):
            return [(int(width), int(height), int(count)) for width, height, count in kept["sizes"]]
    except (OSError, ValueError, TypeError, KeyError):
        pass  # it only saves looking
    return sizes_of(open_dataset(config, "train", root)) if config.format == "shapes" else None


def foreseen(folder: Path, config: StageConfig, root: Path | None) -> Foreseen | None:
    """Return what the store of a stage with that config will take."""
    # None: the stage stores nothing, or nobody has looked at its images yet.
    if not isinstance(config, Trains):
        return None
    try:
        sizes = known_sizes(folder, config.data, root) if freezes_all(config) else None
    except AltoptError:
        return None  # the stage itself will say what is wrong
    if sizes is None:
        return None
    needed = maps_bytes(sizes, config.network, config.flips, config.precision)
    images = sum(count for *_, count in sizes)
    entries = images * (2 if config.flips else 1)
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    visits = config.for_images(images).iterations * config.images_per_batch
    decision = decide("auto", needed, shutil.disk_usage(existing).free, visits, entries)
    return {"bytes": needed, "used": decision.used, "reason": decision.reason}


def store_line(output: str, what: Foreseen) -> str:
    """Return what ``foreseen`` says as a line of the plan."""
    return f"{output}: feature store {'on' if what['used'] else 'off'}: {what['reason']}"


def _key(config: DataConfig, root: Path | None) -> str:
    settings = {name: value for name, value in asdict(config).items() if name != "test"}
    return sha256_text(canonical_json([settings, str(root.absolute()) if root else None]))
