"""Data sets in YOLO's format: a folder of images, and beside it one of labels with a text file for each image.

A split is a folder of images ("images/train", "train/images"), with all folders in it; a list of image paths
("train.txt"); or an entry of a yaml file ("data.yaml:train"), which names such a folder or list. Paths in yaml files
and lists are taken below the file's own folder and the data root only: "../train/images", as Roboflow writes it, and
"/content/data/train/images" are both the train/images that lies there.

Labels lie where "labels" stands in place of the last "images" of the path, else in a folder labels beside or in the
images' one, else beside the images. A line is a class number and either x y width height of the box, from its centre,
or the corners of a polygon, whose box is taken; all of them are shares of the image. An image without such a file has
no objects. Names of classes come from the yaml file, else from a classes.txt.

An image's id is its path in the folder without the ending. Nothing is repaired; a box may stick out of its image by
MARGIN pixels, as rounding makes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from altopt.datasets.checking import FileError, Finding, some
from altopt.datasets.dataset import IMAGE_SUFFIXES
from altopt.datasets.on_disk import (
    NO_AREA,
    NO_NUMBERS,
    OUTSIDE,
    UNKNOWN_CLASS,
    Fault,
    Judged,
    OnDiskDataset,
    below,
    image_size,
    inside,
    read_text,
    short,
)
from altopt.errors import DataError

MARGIN = 1.0
IMAGES, LABELS = "images", "labels"
YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "labels/classes.txt", "obj.names")
_MOST_BYTES = 2**20  # of a yaml file that says where a data set lies
_MOST_CLASSES = 10_000  # without names: a greater number is a mistake
_ROUNDING = 1e-3  # of a share of the image


@dataclass(frozen=True)
class Source:
    """What a yaml file says: names of classes, splits as lists of paths, and how many numbers come before keypoints."""

    file: Path
    names: tuple[str, ...] | None
    splits: dict[str, list[str]]
    keypoints: bool


@dataclass(frozen=True)
class _Place:
    """Where an image and its label file lie, each below a folder that links may not lead out of."""

    folder: Path
    image: str
    labels: Path
    label: str


class YoloDataset(OnDiskDataset):
    """One or several folders or lists of images with YOLO's label files, all below ``root``.

    Classes are those that the yaml file or classes.txt names, or ``classes``, in that order; without any names the
    numbers 0, 1, ... up to the greatest that the labels of ``train``, the data set trained on, hold.
    """

    kind = "yolo"

    def _called(self, split: str) -> str:
        file, colon, key = split.partition(":")
        return key if colon else super()._called(file.rstrip("/").removesuffix(f"/{IMAGES}")).removesuffix(".txt")

    @cached_property
    def _source(self) -> Source | None:
        """The yaml file that a split names, else the one that lies in the root."""
        named = [split.partition(":")[0] for split in self._splits if ":" in split]
        path = below(self._root, named[0]) if named else find_yaml(self._root)
        return None if path is None else read_yaml(path)

    @cached_property
    def _names(self) -> tuple[str, ...] | None:
        """The names of classes by their numbers; None where there are none."""
        if self._source is not None and self._source.names is not None:
            return self._source.names
        return None if self._name_list is None else _read_names(self._name_list)

    @cached_property
    def _name_list(self) -> Path | None:
        """The classes.txt of the root, or the one that LabelImg leaves among the labels."""
        names = [self._root / name for name in NAME_LISTS]
        names += [labels_of(images_of(target), self._root) / NAME_LISTS[0] for target, _ in self._targets
                  if target.suffix != ".txt"]
        found = next((path for path in names if path.is_file()), None)
        return self._train._name_list if found is None and self._train is not None else found

    @cached_property
    def _numbered(self) -> tuple[str, ...]:
        """The names, or the numbers that the labels trained on hold."""
        if self._names is not None:
            return self._names
        if self._train is not None:
            return self._train._numbered
        numbers = [int(float(line.split()[0])) for image_id in self.ids
                   for _, line in _lines(self._label(image_id)) if _is_number(line.split()[0])]
        return tuple(map(str, range(max((number for number in numbers if number < _MOST_CLASSES), default=-1) + 1)))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when one that is asked for is none of the data set's."""
        for name in self._asked:
            if name not in self._numbered:
                raise DataError(f'{self.name} has no class "{short(name)}": name some of its own, '
                                f"{', '.join(map(short, self._numbered))}")
        return self._asked or self._numbered

    @property
    def ids(self) -> tuple[str, ...]:
        """Image ids, in the order of the folders or lists."""
        return tuple(self._places)

    @cached_property
    def _targets(self) -> list[tuple[Path, str]]:
        """Each split's folders and lists, with what stands before the ids of its images."""
        targets: list[tuple[Path, str]] = []
        for split in self._splits:
            file, colon, key = split.partition(":")
            found = self._from_yaml(below(self._root, file), key) if colon else [below(self._root, split)]
            targets += [(path, "") for path in found]
        if len(targets) < 2:
            return targets
        return [(path, f"{path.relative_to(self._root).as_posix().removesuffix('.txt')}/") for path, _ in targets]

    def _from_yaml(self, file: Path, key: str) -> list[Path]:
        source = self._source
        assert source is not None
        if source.file != file:
            raise DataError(f"{self.name} names two yaml files, {source.file} and {file}: name one")
        if key not in source.splits:
            raise DataError(f'{file} has no split "{short(key)}": choose one of {", ".join(source.splits) or "none"}')
        return [locate(self._root, file, path) for path in source.splits[key]]

    @cached_property
    def _places(self) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for target, prefix in self._targets:
            for image_id, place in self._of_list(target) if target.suffix == ".txt" else self._of_folder(target):
                image_id = prefix + image_id
                if image_id in places:
                    raise DataError(f"{target}: two images have the id {short(image_id)} in {self.name}: rename one")
                places[image_id] = place
        return places

    def _of_folder(self, folder: Path) -> Iterator[tuple[str, _Place]]:
        folder = images_of(folder)
        names = list(image_names(folder))
        if not names:
            raise FileError("no images", folder, f"{folder} holds no image: choose another split")
        labels = labels_of(folder, self._root)
        for name in names:
            stem = os.path.splitext(name)[0]  # noqa: PTH122 - of paths with folders, thousands of them
            yield stem, _Place(folder, name, labels, f"{stem}.txt")

    def _of_list(self, file: Path) -> Iterator[tuple[str, _Place]]:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if not lines:
            raise FileError("empty list", file, f"{file} lists no image: fill it, or choose another split")
        labels_in: dict[Path, Path] = {}
        for line in lines:
            path = locate(self._root, file, line)
            if path.parent not in labels_in:
                labels_in[path.parent] = labels_of(path.parent, self._root)
            labels = labels_in[path.parent]
            name = path.relative_to(self._root).as_posix()
            stem = os.path.splitext(name)[0]  # noqa: PTH122
            yield stem, _Place(self._root, name, labels, f"{path.stem}.txt")

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        return {}

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the image's own (width, height)."""
        size = self._sizes.get(image_id)
        if size is None:
            size = self._sizes[image_id] = image_size(self.path(image_id), self._exif)
        return size

    def path(self, image_id: str) -> Path:
        """Return where an image lies."""
        place = self._places[image_id]
        return inside(self._root, place.folder, place.image)

    def _label(self, image_id: str) -> Path:
        place = self._places[image_id]
        return inside(self._root, place.labels, place.label)

    def _judged(self, image_id: str) -> Iterator[Judged]:
        label = self._label(image_id)
        labels = {name: index for index, name in enumerate(self.classes)}
        for number, line in _lines(label):
            row, fault = _row(line, self._source is not None and self._source.keypoints)
            if row is None:
                yield Judged(label, f"line {number}", fault)
                continue
            index, corners = row
            name = self._numbered[index] if 0 <= index < len(self._numbered) else None
            called = f"line {number} ({short(name or index)})"
            if name is None:
                yield Judged(label, called, Fault(
                    UNKNOWN_CLASS, f"class {index} is none of the {len(self._numbered)} classes, 0 to "
                    f"{len(self._numbered) - 1}", "correct the line, or name the class"))
            elif name not in labels:
                yield Judged(label, called, left_out=name)
            else:
                width, height = self.size(image_id)
                box = (corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height)
                yield Judged(label, called, fault or _problem(box, (width, height)), _thin(box), box, labels[name])

    def files(self) -> list[Path]:
        """Return images and labels, lists, and what names the classes."""
        files = [path for path, _ in self._targets if path.suffix == ".txt"]
        files += [self.path(image_id) for image_id in self.ids] + self._labels_there()
        if self._source is not None:
            files.append(self._source.file)
        if self._name_list is not None:
            files.append(self._name_list)
        if self._names is None and self._train is not None:
            files += self._train._labels_there()
        return files

    def _labels_there(self) -> list[Path]:
        return [path for image_id in self.ids if (path := self._label(image_id)).is_file()]

    def _as_a_whole(self) -> Iterator[Finding]:
        if self._names is None and self._train is None:
            where = f"{self._root} has neither a yaml file with names nor a classes.txt"
            yield Finding("classes without names", f"{where}: classes are called by their numbers", "warning")
        for target, _ in self._targets:
            if target.suffix != ".txt":
                yield from self._lonely(images_of(target))

    def _lonely(self, images: Path) -> Iterator[Finding]:
        """Yield what is found of label files without image, or of images that none has a label file."""
        labels = labels_of(images, self._root)
        named = {os.path.splitext(name)[0] for name in image_names(images)}  # noqa: PTH122
        there = set(_names_below(labels, (".txt",)))
        alone = sorted(name for name in there if name.removesuffix(".txt") not in named and name != "classes.txt")
        if any(f"{name}.txt" in there for name in named):
            if alone and labels != self._root:  # where lists lie too
                yield Finding("label without image", f"{labels}: {len(alone)} label files have no image in {images}: "
                              f"bring the images, or remove them: {some(alone)}", "warning", str(labels))
        else:
            yield Finding("no labels", f"{images}: none of the {len(named)} images has a label file; they are "
                          f"looked for in {labels}", "warning", str(images))


def images_of(folder: Path) -> Path:
    """Return where the images of a split's folder lie: in itself, or in its folder images."""
    return folder / IMAGES if (folder / IMAGES).is_dir() else folder


def image_names(folder: Path) -> Iterator[str]:
    """Yield the path of every image in a folder and in the folders in it, from there, sorted."""
    return _names_below(folder, IMAGE_SUFFIXES)


def _names_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        start = os.path.relpath(parent, folder)
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield name if start == "." else f"{start}/{name}"


def labels_of(images: Path, root: Path) -> Path:
    """Return the folder of the labels of a folder of images."""
    parts = list(images.relative_to(root).parts)
    candidates = []
    if IMAGES in parts:
        last = len(parts) - 1 - parts[::-1].index(IMAGES)
        candidates.append(root.joinpath(*parts[:last], LABELS, *parts[last + 1:]))
    candidates.append(images / LABELS)
    if images != root:
        candidates.append(images.parent / LABELS / images.name)
        if not any(images.glob("*.txt")):
            candidates.append(images.parent / LABELS)
    return next((path for path in candidates if path.is_dir()), images)


def locate(root: Path, file: Path, written: str) -> Path:
    """Return what a path in a file means: the longest end of it that lies below the file's folder, or the root."""
    # So that nothing leads out: paths of other machines and "../" lose what they begin with.
    parts = [part for part in PurePosixPath(written.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    for start in range(len(parts)):
        for base in dict.fromkeys((file.parent, root)):
            if base.joinpath(*parts[start:]).exists():
                return inside(root, base, "/".join(parts[start:]))
    if not parts:
        return file.parent
    raise FileError("missing file", file, f"{file} names {short(written)}, and nothing of that name lies below "
                    f"{file.parent}: bring it, or correct the path")


def find_yaml(root: Path) -> Path | None:
    """Return the yaml file that describes the data set in a folder: by its name, or the only one."""
    named = next((root / name for name in YAMLS if (root / name).is_file()), None)
    others = [path for path in sorted(root.glob("*.y*ml")) if path.suffix in (".yaml", ".yml")]
    return named or (others[0] if len(others) == 1 else None)


def read_yaml(path: Path) -> Source:
    """Return what a yaml file says of a data set; DataError when it is not YAML, or names no classes properly."""
    import yaml

    def error(cause: str) -> FileError:
        return FileError("unreadable yaml", path, f"{path}: {cause}")

    text = read_text(path)
    if len(text) > _MOST_BYTES:
        raise error("it is longer than what describes a data set: bring another file")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as cause:
        raise error(f"it is not YAML ({short(' '.join(str(cause).split()))}): correct it") from cause
    if not isinstance(content, dict):
        raise error("it must be a mapping with names, train and val: correct it")
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        try:
            by_number = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError):
            raise error("its names must have the numbers of classes as keys: correct it") from None
        if sorted(by_number) != list(range(len(by_number))):
            raise error(f"its names must have the keys 0 to {len(by_number) - 1}: correct them")
        names = [by_number[number] for number in range(len(by_number))]
    if names is None and type(count) is int and 0 < count < _MOST_BYTES:
        names = [str(number) for number in range(count)]
    if names is not None and not isinstance(names, list):
        raise error("its names must be a list, or a mapping from numbers: correct them")
    if isinstance(names, list) and type(count) is int and count != len(names):
        raise error(f"it has nc {short(count)} and {len(names)} names: make them agree")
    start = content.get("path")
    splits = {key: [_joined(start, each) for each in (value if isinstance(value, list) else [value])
                    if isinstance(each, str)]
              for key in ("train", "val", "valid", "test") if (value := content.get(key))}
    return Source(path, None if names is None else _checked(names, error), splits, "kpt_shape" in content)


def _joined(start: object, path: str) -> str:
    return f"{start}/{path}" if isinstance(start, str) and not path.startswith("/") else path


def _checked(names: list[object], error: Callable[[str], FileError]) -> tuple[str, ...]:
    """Return class names as texts; raises what ``error`` makes of the cause when one is none, or occurs twice."""
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            # Lists of aliases of lists grow beyond all bounds when they are written out.
            shown = name if isinstance(name, bool) else f"a {type(name).__name__}"
            raise error(f"a name is {shown}, which is no text in YAML: put it in quotes")
        if any("\ud800" <= char <= "\udfff" for char in str(name)):
            raise error(f"the name {short(str(name))} is no text in Unicode: correct it")
    texts = tuple(str(name).strip() for name in names)
    if doubled := [name for name in texts if texts.count(name) > 1]:
        raise error(f'the name "{short(doubled[0])}" occurs twice: name each class once')
    return texts


def _read_names(path: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    return _checked([line for line in lines if line], lambda cause: FileError("unreadable file", path,
                                                                             f"{path}: {cause}"))


def _lines(label: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a label file that are not empty, with their numbers; none of a file that is not there."""
    if label.is_file():
        for number, line in enumerate(read_text(label).splitlines(), 1):
            if line.strip():
                yield number, line


def _row(line: str, keypoints: bool) -> tuple[tuple[int, tuple[float, ...]] | None, Fault | None]:
    """Return the class number and the corners x1, y1, x2, y2 as shares of the image, and what is wrong with a line."""
    words = line.split()
    if not all(map(_is_number, words)) or float(words[0]) % 1:
        return None, NO_NUMBERS._replace(text=f'"{short(line.strip())}" must be a whole class number and shares of the '
                                         "image")
    number, values = int(float(words[0])), [float(word) for word in words[1:]]
    if keypoints and len(values) > 4:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return None, Fault("number of columns", f"it has {len(words)} columns: a class and x y width height are 5, a "
                           "polygon has an odd number from 7 on")
    fault = None
    if min(values) < -_ROUNDING or max(values) > 1 + _ROUNDING:
        worst = min(values) if min(values) < -_ROUNDING else max(values)
        fault = Fault(OUTSIDE, f"{worst:g} is not between 0 and 1, as shares of the image are")
    if len(values) == 4:
        x, y, width, height = values
        if not min(width, height) > 0:
            return None, Fault(NO_AREA, f"its box of {width:g} x {height:g} has no area")
        return (number, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)), fault
    xs, ys = values[::2], values[1::2]
    return (number, (min(xs), min(ys), max(xs), max(ys))), fault


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _problem(box: tuple[float, ...], size: tuple[int, int]) -> Fault | None:
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return Fault(NO_AREA, "its polygon has no area")
    if min(x1, y1) < -MARGIN or x2 > size[0] + MARGIN or y2 > size[1] + MARGIN:
        return Fault(OUTSIDE, f"its box {x1:g} {y1:g} {x2:g} {y2:g} leaves the image of {size[0]} x {size[1]}")
    return None


def _thin(box: tuple[float, ...]) -> Fault | None:
    width, height = box[2] - box[0], box[3] - box[1]
    if min(width, height) >= 1:
        return None
    return Fault("box of less than a pixel", f"its box is {width:g} x {height:g}, less than a pixel")
