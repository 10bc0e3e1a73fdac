"""What ``altopt predict`` does: detect on photographs, draw what is found, and write it down for other programs."""

import csv
import io
import json
import math
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from altopt.batches.reading import Prefetcher
from altopt.datasets.dataset import IMAGE_SUFFIXES
from altopt.datasets.on_disk import is_text, read_text
from altopt.drawing.boxes import class_colour, draw_boxes
from altopt.errors import DataError, UsageError
from altopt.evaluation.detections import Detections, Result, to_coco_results
from altopt.machine.allocation import keep_freed_memory
from cache.files import atomic_path, write_json_atomic, write_text_atomic
from stages.pipeline.detector import Detector, Prepared, load_detector
from stages.shared.events import Caution, Finished, ImagesDone, Started
from stages.shared.step import Runtime

MANIFEST = "predict.json"  # what a folder of predictions holds, so that it alone is written over


class NamedResult(Result):
    """An entry of COCO results json, with the name of its class beside it."""

    category: str


@dataclass(frozen=True)
class Found:
    """What was found in an image, of the score asked for and above, best first."""

    name: str
    prepared: Prepared
    detections: Detections

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image as it is displayed."""
        return self.prepared.image.shape[1], self.prepared.image.shape[0]


@dataclass(frozen=True)
class Predictions:
    """What was found in all images, by name, and which images could not be used, and why."""

    folder: Path
    classes: tuple[str, ...]
    found: dict[str, Detections]
    unusable: dict[str, str]

    def results(self) -> list[NamedResult]:
        """Return COCO results: images go by their names, categories are numbered from 1."""
        plain = to_coco_results(self.found, range(1, len(self.classes) + 1), str)
        return [NamedResult(**each, category=self.classes[int(each["category_id"]) - 1]) for each in plain]

    def text(self) -> str:
        """Return the number of objects of each class, a line for each image, and where the images are drawn."""
        lines = []
        for name, detections in self.found.items():
            counts = Counter(detections.labels.tolist())
            words = [f"{count} {self.classes[label]}" for label, count in sorted(counts.items())]
            lines.append(f"{name}: {', '.join(words) or 'nothing'}")
        return "\n".join([*lines, f"drawn in {self.folder}"])

    def csv(self) -> str:
        """Return a table with a line for each detection; boxes are continuous x1, y1, x2, y2 in pixels."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("image", "class", "score", "x1", "y1", "x2", "y2"))
        for name, each in self.found.items():
            for box, score, label in zip(each.boxes.tolist(), each.scores.tolist(), each.labels, strict=True):
                writer.writerow((name, self.classes[label], f"{score:.4f}", *(f"{side:.2f}" for side in box)))
        return table.getvalue()


def predict(network: str, inputs: Sequence[Path], *, run: str | None, sets: Sequence[str], out: Path, score: float,
            as_csv: bool, as_yolo: bool, runtime: Runtime) -> Predictions:
    """Detect on images, folders and lists with the network that ``load_detector`` finds; write the folder ``out``.

    Images that cannot be used are reported, and the others go on. Raises UsageError, before anything is written, where
    a file would be written over that is not predict's own; DataError where there are no images.
    """
    if math.isnan(score):  # which click takes for a number between 0 and 1
        raise UsageError("--score nan is no score: give a number from 0 to 1")
    everything = find_images(inputs)
    images = {name: path for name, path in everything.items() if _named(name)}
    labels = _label_files(images) if as_yolo else {}
    others = [MANIFEST, "results.json", *(["results.csv"] if as_csv else []), *(["classes.txt"] if as_yolo else [])]
    files = _reserved(out, [*images, *labels.values(), *others])
    detector = load_detector(network, run=run, sets=sets, device=runtime.device)
    if score < detector.settings.score:
        raise UsageError(f"--score {score} is below detect.score, {detector.settings.score}, under which nothing is "
                         f"kept: lower that too, --set detect.score={score}")
    runtime.report(Started(f"{len(images)} image{'s'[: len(images) != 1]}", (network,), artifact="predict"))
    started = time.perf_counter()
    keep_freed_memory()
    settings = {"network": network, "classes": detector.classes, "score": score, "detect": asdict(detector.settings)}
    write_json_atomic(out / MANIFEST, settings | {"files": files})  # first: a run that is stopped can be repeated
    predictions = Predictions(out, detector.classes, {}, {})
    for name in everything.keys() - images.keys():
        predictions.unusable[name] = f"the name of the image {name!r} cannot be written down: rename it"
        runtime.report(Caution(predictions.unusable[name]))

    def write(found: Found | DataError) -> Found | DataError:
        if isinstance(found, Found):
            _draw(found, detector.classes, out)
            if as_yolo:
                write_text_atomic(out / labels[found.name], yolo_lines(found))
        return found

    def read(path: Path) -> Prepared | DataError:
        try:
            return detector.prepare(path)
        except DataError as error:
            return error

    with Prefetcher(read, images.values(), runtime.readers) as ahead, \
            Prefetcher(write, _detected(detector, images, ahead, score), runtime.readers) as written:
        for done, (name, each) in enumerate(zip(images, written, strict=True), start=1):
            if isinstance(each, DataError):
                predictions.unusable[name] = str(each)
                runtime.report(Caution(str(each)))
            else:
                predictions.found[name] = each.detections
            runtime.report(ImagesDone(done, len(images), artifact="predict"))
    write_json_atomic(out / "results.json", predictions.results())
    if as_csv:
        write_text_atomic(out / "results.csv", predictions.csv())
    if as_yolo:
        write_text_atomic(out / "classes.txt", "".join(f"{name}\n" for name in detector.classes))
    runtime.report(Finished({}, time.perf_counter() - started, artifact="predict"))
    return predictions


def _detected(detector: Detector, images: Iterable[str], ahead: Iterable[Prepared | DataError],
              score: float) -> Iterator[Found | DataError]:
    for name, prepared in zip(images, ahead, strict=True):
        if isinstance(prepared, DataError):
            yield prepared
            continue
        every = detector.detect_prepared(prepared)
        kept = every.scores >= score
        yield Found(name, prepared, Detections(every.boxes[kept], every.scores[kept], every.labels[kept]))


def _draw(found: Found, classes: Sequence[str], out: Path) -> None:
    """Write the image with what was found; in the format of its suffix, else as JPEG."""
    detections = found.detections
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(detections.labels, detections.scores, strict=True)]
    colours = [class_colour(int(label)) for label in detections.labels]
    drawn = draw_boxes(found.prepared.image, detections.boxes, texts, colours)
    path = out / found.name
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        drawn.save(file, Image.registered_extensions().get(path.suffix.lower(), "JPEG"), quality=92, compress_level=1)


def yolo_lines(found: Found) -> str:
    """Return a line for each detection, class from 0, then centre, width and height as shares of the image's."""
    boxes = found.detections.boxes.astype(np.float64) / [*found.size, *found.size]  # (N, 4)
    rows = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)  # (N, 4)
    return "".join(f"{label} {' '.join(f'{value:.6f}' for value in row)}\n"
                   for label, row in zip(found.detections.labels, rows.tolist(), strict=True))


def find_images(inputs: Sequence[Path]) -> dict[str, Path]:
    """Return {name: file} of all images: of a folder and those below, of a list's lines, or a file by itself.

    A name is the path below the folder that holds all inputs. Folders that predict has written are left out. Raises
    DataError where there is none, or a list cannot be read.
    """
    paths: list[Path] = []
    roots: list[Path] = []
    for given in inputs:
        if given.is_dir():
            found = [Path(folder) / name for folder, names in _walk(given) for name in names
                     if name.lower().endswith(IMAGE_SUFFIXES)]
            roots.append(given)
        else:
            found = [given] if given.suffix.lower() in IMAGE_SUFFIXES else _listed(given)
            roots += [each.parent for each in found]
        if not found:
            raise DataError(f"{given} holds no images ({', '.join(IMAGE_SUFFIXES)}): give images, folders of images or "
                            "lists of them")
        paths += found
    top = os.path.commonpath([_absolute(root) for root in roots])
    return {_absolute(path).relative_to(top).as_posix(): path for path in paths}


def _named(name: str) -> bool:
    """Return whether a name can stand in a line of a table; macOS puts narrow spaces into those of screenshots."""
    return is_text(name) and not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in name)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - without "..", and without following links


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and its files, in order, but for hidden ones and those that predict has written."""
    for folder, below, names in os.walk(top):
        if MANIFEST in names:
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield folder, sorted(name for name in names if not name.startswith("."))


def _listed(path: Path) -> list[Path]:
    """Return the files that a list names, a line each; relative ones start from the list's own folder."""
    try:
        lines = read_text(path).splitlines()
    except DataError as error:
        raise DataError(f"{error}, or give an image ({', '.join(IMAGE_SUFFIXES)}) in its place") from None
    return [path.parent / line.strip() for line in lines if line.strip()]


def _label_files(images: Iterable[str]) -> dict[str, str]:
    """Return {image: file of its YOLO labels}. Raises ``UsageError`` where two images would share one."""
    owners: dict[str, str] = {}
    for name in images:
        label = (Path("labels") / name).with_suffix(".txt").as_posix()
        if label in owners:
            raise UsageError(f"{owners[label]} and {name} would share {label}: rename one, or leave --yolo out")
        owners[label] = name
    return {name: label for label, name in owners.items()}


def _reserved(out: Path, names: Sequence[str]) -> list[str]:
    """Return the files that predict has written in a folder or will. Raises ``UsageError`` where one is another's."""
    try:
        held = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        own = {str(name) for name in held}
    except (OSError, ValueError, TypeError, KeyError):
        own = set()
    for name in names:
        if name not in own and os.path.lexists(out / name):
            raise UsageError(f"{out / name} is there and was not written by altopt predict: give another folder with "
                             "--out")
    return sorted(own | set(names))
