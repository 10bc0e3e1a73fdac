"""What ``altopt export`` writes for other programs: a network, detections, or the data set.

None of it is an artifact of a run, and what is there already stays unless the user says otherwise.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from altopt.datasets.dataset import Dataset, Json, to_coco
from altopt.datasets.on_disk import OnDiskDataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, UsageError
from altopt.evaluation.detections import read_detections
from altopt.evaluation.voc import comp4_lines
from cache.files import atomic_path, write_json_atomic, write_text_atomic
from stages.pipeline.run import Run, versions
from stages.shared.stage_config import Split

FORMATS = {"a network": ("torchvision", "onnx"), "detections": ("coco", "voc-comp4"), "the data set": ("coco",)}
SPLITS: tuple[Split, ...] = ("train", "test")


class Exported(TypedDict):
    """What was written, in which format, and to which files."""

    exported: str
    format: str
    files: list[str]


def export(what: str, form: str, *, open_run: Callable[[], Run], sets: Sequence[str] = (), out: Path | None = None,
           force: bool = False) -> Exported:
    """Write a network (M5, or what ``load_detector`` takes), detections (D5) or both splits (``data``) in a format.

    ``out`` is a file or, where a format has several, their folder; by default both are named after what is exported.
    Raises ``UsageError`` for what a format cannot hold and, unless ``force``, for a file that is there.
    """
    detections = re.fullmatch(r"[Dd]\d+", what)
    kind = "the data set" if what == "data" else "detections" if detections else "a network"
    if form not in FORMATS[kind]:
        raise UsageError(f"{what} is {kind}, and there is no {form} of that: choose --format "
                         f"{' or '.join(FORMATS[kind])}")
    if kind == "a network":
        files = _export_network(what, form, open_run, sets, out, force)
    elif kind == "detections":
        files = _export_detections(open_run(), what.upper(), form, out, force)
    else:
        files = _export_data(open_run(), out or Path("data-coco"), force)
    return {"exported": what, "format": form, "files": [str(path) for path in files]}


def _export_network(what: str, form: str, open_run: Callable[[], Run], sets: Sequence[str], out: Path | None,
                    force: bool) -> list[Path]:
    if "+" in what and not Path(what).exists():
        raise UsageError(f"{what} are two networks, and an export holds one: name one with RPN and head, such as M5")
    if form == "onnx" and find_spec("onnx") is None:
        raise UsageError("ONNX files are written by onnx, which is not installed: install it with pip install -e "
                         "'.[onnx]'")
    in_run = re.fullmatch(r"[Mm]\d+", what)
    name = what.upper() if in_run else Path(what).stem
    if form == "onnx":
        files = [out / f"{name}.onnx" if out and out.is_dir() else out or Path(f"{name}.onnx")]
    else:
        folder = out or Path(f"{name}-torchvision")
        files = [folder / each for each in ("weights.pth", "detector.json", "altopt_detector.py")]
    _require_free(files, force)

    import torch

    from altopt.models import exported_detector
    from altopt.models.torchvision_export import as_torchvision
    from stages.pipeline.detector import load_detector

    # In full precision, whatever the run detects with.
    loaded = load_detector(what, run=str(open_run().folder.relative_to("runs")) if in_run else None,
                           sets=(*sets, "detect.precision=float32"), device="cpu")
    detector, settings = as_torchvision(loaded.rpn, loaded.network, loaded.classes, loaded.settings)
    if form == "onnx":
        import onnx

        from altopt.models.onnx_export import onnx_model

        model = onnx_model(detector, settings, notes={"source": name, "altopt": versions()["altopt"]})
        with atomic_path(files[0]) as temporary:
            onnx.save(model, temporary)
        return files
    with atomic_path(files[0]) as temporary, temporary.open("wb") as file:  # open: else the name goes into the file
        torch.save(detector.state_dict(), file)
    write_text_atomic(files[1], json.dumps(settings, indent=1) + "\n")
    write_text_atomic(files[2], Path(exported_detector.__file__).read_text(encoding="utf-8"))
    return files


def _export_detections(run: Run, artifact: str, form: str, out: Path | None, force: bool) -> list[Path]:
    source = run.path(artifact)
    if not source.is_file():
        raise ArtifactError(f"{artifact} is not in {run.folder}: make it with altopt evaluate")
    if form == "coco":  # which is what a run keeps
        name = f"{artifact}.coco.json"
        target = out / name if out and out.is_dir() else out or Path(name)
        _require_free([target], force)
        with atomic_path(target) as temporary:
            temporary.write_bytes(source.read_bytes())
        return [target]
    dataset = open_dataset(run.recipe.data, "test", run.runtime.data_root)
    folder = out or Path(f"{artifact}-voc-comp4")
    files = {folder / f"comp4_det_test_{name}.txt": label for label, name in enumerate(dataset.classes)}
    _require_free(list(files), force)
    if wrong := next((name for name in dataset.classes if "/" in name or "\0" in name), None):
        raise UsageError(f"class {wrong!r} cannot be part of a file's name: export D as coco")
    if wrong := next((image_id for image_id in dataset.ids if re.search(r"\s", image_id)), None):
        raise UsageError(f"image {wrong!r} has a space in its name, at which the devkit parts lines: export D as coco")
    found = read_detections(source, dataset.ids, dataset.category_ids)
    for path, label in files.items():
        write_text_atomic(path, "".join(comp4_lines(found, label)))
    return list(files)


def _export_data(run: Run, folder: Path, force: bool) -> list[Path]:
    files = {folder / f"{split}.json": open_dataset(run.recipe.data, split, run.runtime.data_root) for split in SPLITS}
    drawn = folder / "images"  # where those go that lie nowhere
    on_disk = all(isinstance(dataset, OnDiskDataset) for dataset in files.values())
    _require_free([*files, *(() if on_disk else (drawn,))], force)
    for path, dataset in files.items():
        place = dataset.path if isinstance(dataset, OnDiskDataset) else partial(_written, dataset, drawn)
        write_json_atomic(path, _with_files(dataset, place))
    return list(files)


def _with_files(dataset: Dataset, place: Callable[[str], Path]) -> Json:
    # Absolute: then an image is found whatever folder a viewer takes for that of the images.
    return to_coco(dataset, lambda image_id: str(place(image_id).absolute()))


def _written(dataset: Dataset, folder: Path, image_id: str) -> Path:
    """Write an image that is drawn on the spot, and return where."""
    from PIL import Image

    path = folder / f"{image_id}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(dataset.image(image_id)).save(temporary, "PNG")
    return path


def _require_free(files: Sequence[Path], force: bool) -> None:
    there = next((path for path in files if path.exists()), None)
    if there is not None and not force:
        raise UsageError(f"{there} is there already: name another place with --out, or write over it with --force")
