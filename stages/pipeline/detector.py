"""A trained network to detect with, on images of any origin: no data set, no run folder that one could write to.

    detector = load_detector("M5", run="mine")
    found = detector.detect("photo.jpg")
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from altopt.batches.samples import Sample, image_sample, make_batch
from altopt.config import DetectionSettings, NetworkConfig
from altopt.datasets.on_disk import read_image
from altopt.errors import ArtifactError, DataError, UsageError
from altopt.evaluation.detections import Detections
from altopt.extents import map_shape
from altopt.models.detector import FasterRCNN
from cache.checkpoints import load_checkpoint
from stages.pipeline.evaluation import networks
from stages.pipeline.recipe import Recipe, check_run_name, detection_settings, read_recipe
from stages.shared.detection import detected
from stages.shared.inference import autocast, fill_parts, prepare, require_same_pixels
from stages.shared.step import Kind, Runtime, file_name
from stages.shared.training import device_of

Image = NDArray[np.uint8]  # RGB, [H, W, 3]
PARTS = {"rpn": "an RPN", "fc": "fc layers", "head": "a head"}
FORMS = "give M5 or M1+M2 of a run (--run), a .safetensors file, or a run's folder"


class Prepared(NamedTuple):
    """An image, upright as it is displayed, and as the network sees it."""

    image: Image
    sample: Sample


class Detector:
    """RPN and Fast R-CNN, in one network or in two that share nothing, and how scores and boxes become detections.

    ``rpn`` and ``detector`` are one network or two, ``classes`` are the names that labels index, ``network`` is the
    frame in which images are seen, ``settings`` are the thresholds.
    """

    def __init__(self, rpn: FasterRCNN, detector: FasterRCNN, *, classes: tuple[str, ...], network: NetworkConfig,
                 settings: DetectionSettings, device: torch.device) -> None:
        self.classes, self.network, self.settings, self.device = classes, network, settings, device
        self.rpn, self.detector = rpn, detector

    def detect(self, image: Image | str | Path) -> Detections:
        """Return what is found in an image: an array, uint8 RGB [H, W, 3], or a file, turned as its EXIF data says.

        Boxes are continuous xyxy in pixels of the image as it is displayed, best first. Raises DataError for a file
        that cannot be used, ValueError for another kind of array.
        """
        return self.detect_prepared(self.prepare(image))

    def prepare(self, image: Image | str | Path) -> Prepared:
        """Return an image read and resized, which threads can do ahead of detection; errors as ``detect``."""
        name = "the image" if isinstance(image, np.ndarray) else str(image)
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image), None, "apply")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"an image is uint8 [H, W, 3], and this is {pixels.dtype} {list(pixels.shape)}")
        height, width = pixels.shape[:2]
        if 0 in map_shape(self.network, (width, height)):
            raise DataError(f"{name} has {width} x {height} pixels, too narrow for the network: cut a part out of it")
        return Prepared(pixels, image_sample(name, pixels, self.network))

    def detect_prepared(self, prepared: Prepared) -> Detections:
        """Return what ``detect`` does, for an image that is prepared."""
        height, width = prepared.image.shape[:2]
        with torch.inference_mode(), autocast(self.device, self.settings.precision):
            batch = make_batch([prepared.sample], self.device, pixels=self.rpn.pixels)
            return detected(self.rpn, self.detector, batch, [(width, height)], self.settings)[0].detections


def load_detector(network: str | Path, *, run: str | None = None, sets: Sequence[str] = (),
                  device: str = "auto") -> Detector:
    """Return the detector that ``network`` names, on a device; nothing is written.

    It is an artifact of runs/``run`` (by default runs/shapes), such as M5, or M1+M2 for the RPN of M1 and the detector
    of M2; or a .safetensors file, or two in the same way; or a run's folder or name, for its final network. Where a
    file lies in a run, detection's settings are those of the run's recipe, else the defaults; ``sets`` puts others in
    their place, such as ``detect.nms=0.5``. Raises ArtifactError for a network that lacks RPN or head, and UsageError.
    """
    files = network_files(str(network), run)
    kept = files[-1].parent / "recipe.toml"
    settings = detection_settings(kept if kept.is_file() else None, sets)
    target = device_of(Runtime(device=device))
    loaded = [load_checkpoint(path) for path in files]
    parts = [("conv", "rpn"), ("conv", "fc", "head")] if len(files) == 2 else [("conv", "rpn", "fc", "head")]
    for path, (tensors, _), needed in zip(files, loaded, parts, strict=True):
        _require_parts(path, tensors, needed)
    config = _network_of(files[0], loaded[0][1])  # the RPN's: its anchors, and the frame that they are in
    classes = _classes_of(files[-1], loaded[-1][1])
    if (other := loaded[-1][1].get("network", {}).get("name")) != config.name:
        raise ArtifactError(f"{files[0]} holds {config.name} and {files[-1]} {other}: give two networks of one run")
    made = []
    for path, (tensors, description), needed in zip(files, loaded, parts, strict=True):
        made.append(FasterRCNN(config, len(classes)))
        # A file of half its size may hold them rounded; the network computes in float32, or rounds by itself.
        full = {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}
        fill_parts(made[-1], path, full, description, needed)
        prepare(made[-1], target, settings.precision)
    require_same_pixels(dict(zip(map(str, files), made, strict=True)))
    return Detector(made[0], made[-1], classes=classes, network=config, settings=settings, device=target)


def network_files(network: str, run: str | None) -> list[Path]:
    """Return the files that ``load_detector`` reads, one or two. Raises ``UsageError`` and ``ArtifactError``."""
    folder = Path("runs") / check_run_name(run or "shapes")
    words = [network] if Path(network).exists() else network.split("+")
    if not all(re.fullmatch(r"[Mm]\d+", word) for word in words):
        if run is not None:
            raise UsageError(f"{network!r} is not a network of the run {run}: give M5 or M1+M2, or leave --run out")
        of_run = next((each for each in (Path(network), Path("runs") / network) if each.is_dir()), None)
        if of_run is not None:
            kept = of_run / "recipe.toml"
            if not kept.is_file():
                raise UsageError(f"{of_run} is not a run's folder, it has no recipe.toml: {FORMS}")
            folder, words = of_run, networks(read_recipe(str(kept)).detections[-1]).split("+")
    if len(words) > 2:
        raise UsageError(f"{network} names {len(words)} networks: give one, or an RPN's and a detector's")
    return [_network_file(word, folder) for word in words]


def _network_file(word: str, folder: Path) -> Path:
    if re.fullmatch(r"[Mm]\d+", word):
        path = folder / file_name(word.upper())
        if not path.is_file():
            raise ArtifactError(f"{path.stem} is not in {folder}: make it with altopt stage {path.stem}, or name "
                                "another run with --run")
        return path
    path = Path(word)
    if path.suffix == Kind.NETWORK.suffix and path.is_file():
        return path
    if path.is_file():
        raise ArtifactError(f"{path} is not a .safetensors file of altopt's, which alone says its anchors and classes: "
                            "train it in a run, from such weights with altopt run-all --from M0=FILE")
    raise UsageError(f"there is no network {word!r}: {FORMS}")


def _require_parts(path: Path, tensors: Mapping[str, Any], parts: Sequence[str]) -> None:
    held = {name.partition(".")[0] for name in tensors}
    if missing := [PARTS[part] for part in parts if part in PARTS and part not in held]:
        raise ArtifactError(f"{path} does not hold {' or '.join(missing)}: give a network with RPN and head, such as "
                            "M5 (predict also takes one with each, such as M1+M2)")


def _network_of(path: Path, description: Mapping[str, Any]) -> NetworkConfig:
    """Return the network that a checkpoint says it holds. Raises ``ArtifactError`` if it does not, or cannot."""
    held = description.get("network")
    if not isinstance(held, dict) or "name" not in held:
        raise ArtifactError(f"{path} holds no network known to altopt: {FORMS}")
    try:
        return Recipe(path.name, {}, {"network": held}, "", frozenset()).network
    except UsageError as error:
        raise ArtifactError(f"{path} describes a network that cannot be: {error}: make it again") from None


def _classes_of(path: Path, description: Mapping[str, Any]) -> tuple[str, ...]:
    held = description.get("classes")
    if not isinstance(held, list) or not held or not all(isinstance(name, str) for name in held):
        raise ArtifactError(f"{path} does not say its classes: {FORMS}")
    return tuple(held)
