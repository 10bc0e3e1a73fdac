"""Data sets in the layout of PASCAL VOC: ImageSets/Main/<split>.txt, Annotations/<id>.xml, JPEGImages/<id>.jpg.

A split "2007_trainval" is the list trainval of the folder VOC2007, which lies in the root, in root/VOCdevkit, or is the
root; a split "train" is that list of the root itself. A list names an image a line; a second column, the flag of VOC's
per-class lists, is not read.

The files count pixels from 1 and include the last: xmin..xmax becomes [xmin - 1, xmax]. Nothing is repaired.
Objects are numbered from 1, in the order of the file.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altopt.datasets.dataset import (
    IMAGE_SUFFIXES,
    LEAVE_OUT,
    Findings,
    Objects,
    below,
    inside,
)
from altopt.datasets.image_files import check_image, compare_size, image_size, read_image
from altopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_YEAR_SPLIT = re.compile(r"(\d{4})_(.+)")
_LIST_LINE = re.compile(r"(.+?)(?:\s+(?:-1|0|1))?")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MANY_ZEROS = 3  # objects with a coordinate 0 from which on the whole data set looks 0-based


@dataclass(frozen=True)
class Object:
    """One <object> as the file spells it: corners are xmin, ymin, xmax, ymax, or None when not four numbers."""

    name: str
    corners: tuple[float, ...] | None
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """One file: (width, height), None when missing or 0 x 0, and its objects; the nested <part>s are none."""

    size: tuple[int, int] | None
    objects: tuple[Object, ...]


class VocDataset:
    """One or several splits of folders in VOC layout, all below ``root``.

    Classes are ``classes`` if given; else those of ``train``, the data set trained on; else VOC's twenty if every split
    names a year; else the sorted names found in the annotations.
    """

    def __init__(
        self,
        root: Path,
        splits: tuple[str, ...],
        *,
        classes: tuple[str, ...] = (),
        invalid: str = "error",
        train: VocDataset | None = None,
    ) -> None:
        self.name = f"VOC {'+'.join(splits)}"
        self._root, self._splits, self._asked, self._invalid, self._train = root, splits, classes, invalid, train
        self._parsed: dict[str, Annotation] = {}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when they are to be found and an annotation cannot be read or none has an object."""
        if self._asked:
            return self._asked
        if self._train is not None:
            return self._train.classes
        if self._dated:
            return VOC_CLASSES
        found = {obj.name for image_id in self.ids for obj in self._annotation(image_id).objects} - {""}
        if not found:
            raise DataError(f"{self.name} has no object at all: name its classes, or choose another split")
        return tuple(sorted(found))

    @property
    def _dated(self) -> bool:
        return all(_YEAR_SPLIT.fullmatch(split) for split in self._splits)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """1, 2, ...: VOC has no ids of its own."""
        return tuple(range(1, len(self.classes) + 1))

    @property
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the lists; DataError when an id occurs twice or a list is missing or empty."""
        return tuple(self._folder_of)

    @cached_property
    def _lists(self) -> list[tuple[Path, _Folder]]:
        """Each split's list file and the folder that it is about."""
        found = [_find_split(self._root, split) for split in self._splits]
        folders = {path: _Folder(self._root, path) for path, _ in found}
        return [(below(path / "ImageSets" / "Main", f"{name}.txt"), folders[path]) for path, name in found]

    @cached_property
    def _folder_of(self) -> dict[str, _Folder]:
        folders: dict[str, _Folder] = {}
        for path, folder in self._lists:
            for image_id in _read_list(path):
                if image_id in folders:
                    raise DataError(f"{path}: image {image_id} occurs twice in {self.name}: list it once")
                folders[image_id] = folder
        return folders

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the id itself."""
        return image_id

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height), or the image's own where the annotation has none."""
        annotated = self._annotation(image_id).size
        return annotated or image_size(self._folder_of[image_id].images[image_id])

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3]; DataError when the image is unreadable or of another size than annotated."""
        return read_image(self._folder_of[image_id].images[image_id], self.size(image_id))

    def objects(self, image_id: str) -> Objects:
        """Return the objects, without those that cannot be used if these may be left out; else DataError."""
        kept: list[Object] = []
        for label, obj, problem in self._judged(image_id, self.size(image_id)):
            if problem and self._invalid != "leave-out":
                raise DataError(f"{label}: {problem}: {LEAVE_OUT}")
            if not problem:
                kept.append(obj)
        return Objects.of(
            boxes=[_continuous(obj) for obj in kept],
            labels=[self.classes.index(obj.name) for obj in kept],
            difficult=[obj.difficult for obj in kept],
        )

    def files(self) -> list[Path]:
        """Return lists, annotations and images; also the annotations trained on where the classes are found there."""
        files = [path for path, _ in self._lists]
        for image_id, folder in self._folder_of.items():
            files += [folder.annotations[image_id], folder.images[image_id]]
        source = self._class_source()
        if source is not None and source is not self:
            files += [folder.annotations[image_id] for image_id, folder in source._folder_of.items()]
        return files

    def description(self) -> dict[str, Any]:
        """Return what defines the data set beside its files."""
        source = self._class_source()
        return {
            "kind": "voc",
            "splits": list(self._splits),
            "classes": list(self._asked) if source is None else {"found in": list(source._splits)},
            "invalid": self._invalid,
        }

    def _class_source(self) -> VocDataset | None:
        """The data set in whose annotations the classes are found; None where they are known without."""
        source = self if self._train is None else self._train
        return None if self._asked or source._dated else source

    def check(self) -> list[str]:
        """Check every image's header and every object; see ``Dataset.check``."""
        findings = Findings()
        _ = self.classes  # where they must be found, a file that cannot be parsed is reported once
        zeros = 0
        for image_id in self.ids:
            try:
                zeros += self._check(image_id, findings)
            except DataError as error:
                findings.broken.append(str(error))
        hint = f"{zeros} objects start at 0, so these files seem to count from 0: add 1 to all their coordinates"
        return findings.verdict(self.name, self._invalid, hint if zeros >= _MANY_ZEROS else "")

    def _check(self, image_id: str, findings: Findings) -> int:
        """Add what one image has to say; return how many of its objects have a coordinate 0."""
        folder, annotation = self._folder_of[image_id], self._annotation(image_id)
        size = check_image(folder.images[image_id])
        if annotation.size:
            compare_size(folder.images[image_id], size, annotation.size)
        else:
            findings.warnings.append(f"{folder.annotations[image_id]}: no size given, the image's own is taken")
        for label, obj, problem in self._judged(image_id, size):
            if problem:
                findings.unusable.append(f"{label}: {problem}")
            elif thin := _thinness(obj):
                findings.warnings.append(f"{label}: {thin}")
        return sum(obj.corners is not None and 0 in obj.corners for obj in annotation.objects)

    def _judged(self, image_id: str, size: tuple[int, int]) -> Iterator[tuple[str, Object, str | None]]:
        """Yield for each object what messages call it, itself, and why it cannot be used, if so."""
        path = self._folder_of[image_id].annotations[image_id]
        for number, obj in enumerate(self._annotation(image_id).objects, 1):
            yield f"{path}, object {number} ({obj.name})", obj, _problem(obj, size, self.classes)

    def _annotation(self, image_id: str) -> Annotation:
        if image_id not in self._parsed:
            self._parsed[image_id] = parse_annotation(self._folder_of[image_id].annotations[image_id])
        return self._parsed[image_id]


class _Files:
    """The files of one folder by image id; their extensions are of either case."""

    def __init__(self, root: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
        self._root, self._folder, self._suffixes = root, folder, suffixes

    def __getitem__(self, image_id: str) -> Path:
        found = self._names.get(image_id, [])
        if len(found) != 1:
            cause = f"{len(found)} files are called" if found else "no file is called"
            remedy = "leave one" if found else "bring it, or take the id off the list"
            raise DataError(f"{self._folder}: {cause} {image_id!r}, as a list in ImageSets/Main says: {remedy}")
        name, is_link = found[0]
        return inside(self._root, self._folder, name) if is_link else self._folder / name

    @cached_property
    def _names(self) -> dict[str, list[tuple[str, bool]]]:
        """By stem the names of files, and whether each is a link."""
        names: dict[str, list[tuple[str, bool]]] = {}
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (a Path for each takes five times longer)
                    if suffix.lower() in self._suffixes:
                        names.setdefault(stem, []).append((entry.name, entry.is_symlink()))
        except OSError as error:
            raise DataError(f"{self._folder} cannot be listed ({error.strerror}): VOC's layout needs it") from error
        return names


class _Folder:
    """One folder in VOC layout."""

    def __init__(self, root: Path, path: Path) -> None:
        self.annotations = _Files(root, path / "Annotations", (".xml",))
        self.images = _Files(root, path / "JPEGImages", IMAGE_SUFFIXES)


def parse_annotation(path: Path) -> Annotation:
    """Read one annotation file; DataError when it is not VOC's XML or declares entities of its own."""
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content.replace(b"\0", b""):  # zeros: of UTF-16; a few nested entities can fill the memory
            raise DataError(f"{path} declares XML entities, which no annotation needs: remove its DOCTYPE")
        tree = ET.fromstring(content)
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it") from error
    objects = tuple(_parse_object(node) for node in tree.findall("object"))
    return Annotation(_parse_size(path, tree.find("size")), objects)


def _parse_size(path: Path, node: ET.Element | None) -> tuple[int, int] | None:
    if node is None:
        return None
    try:
        width, height = (int(node.findtext(key, "")) for key in ("width", "height"))
    except ValueError:
        raise DataError(f"{path}: its size is not two whole numbers: correct or remove the element") from None
    return (width, height) if (width, height) != (0, 0) else None


def _parse_object(node: ET.Element) -> Object:
    """``find`` looks at direct children only, so the boxes of nested parts are not met."""
    try:
        corners = tuple(float(node.findtext(f"bndbox/{key}", "")) for key in _CORNERS)
    except ValueError:
        corners = (math.nan,)
    finite = all(math.isfinite(corner) for corner in corners)
    difficult = node.findtext("difficult", "0").strip() == "1"
    return Object(node.findtext("name", "").strip(), corners if finite else None, difficult)


def _continuous(obj: Object) -> tuple[float, ...]:
    """Return the box (x1, y1, x2, y2) of a usable object: the pixels xmin..xmax cover [xmin - 1, xmax]."""
    xmin, ymin, xmax, ymax = obj.corners or ()
    return xmin - 1, ymin - 1, xmax, ymax


def _problem(obj: Object, size: tuple[int, int], classes: tuple[str, ...]) -> str | None:
    """Say by which rule the object cannot be used in an image of this (width, height), if so."""
    if obj.name not in classes:
        near = difflib.get_close_matches(obj.name, classes, 1)
        return f'"{obj.name}" is not one of the {len(classes)} classes' + (f' (is it "{near[0]}"?)' if near else "")
    if obj.corners is None:
        return "its bndbox is not four numbers"
    xmin, ymin, xmax, ymax = obj.corners
    swapped = " (it would fit with width and height swapped)" if xmax <= size[1] and ymax <= size[0] else ""
    for axis, low, high, extent in (("x", xmin, xmax, size[0]), ("y", ymin, ymax, size[1])):
        if high < low:
            return f"{axis}max {high:g} is less than {axis}min {low:g}"
        if low < 1:
            return f"{axis}min {low:g}: VOC coordinates start at 1"
        if high > extent:
            return f"{axis}max {high:g} lies outside the image of {size[0]} x {size[1]}{swapped}"
    return None


def _thinness(obj: Object) -> str | None:
    """Say of a usable object that it is one pixel wide or high, which it is not if the file excludes the last pixel."""
    xmin, ymin, xmax, ymax = obj.corners or (0, 0, 1, 1)
    sides = (("x", xmin, xmax), ("y", ymin, ymax))
    equal = [f"{axis}min = {axis}max = {low:g}" for axis, low, high in sides if low == high]
    return f"{' and '.join(equal)}: one pixel, or nothing if the file means to exclude the last one" if equal else None


def _find_split(root: Path, split: str) -> tuple[Path, str]:
    """Return the split's folder in VOC layout and the name of its list."""
    dated = _YEAR_SPLIT.fullmatch(split)
    if dated is None:
        return root, split
    year_folder = f"VOC{dated[1]}"
    candidates = [root / "VOCdevkit" / year_folder, root / year_folder]
    if root.resolve().name == year_folder or root.name == year_folder:
        candidates.append(root)
    for path in candidates:
        if path.is_dir():
            return path, dated[2]
    raise DataError(f"{root} has no folder {year_folder}, nor VOCdevkit/{year_folder}: set the data root to its parent")


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        lists = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem)) or "none"
        raise DataError(f"{path} is not a readable list of images: choose another split (here are {lists})") from error
    ids = [match[1] for line in lines if (match := _LIST_LINE.fullmatch(line.strip()))]
    if not ids:
        raise DataError(f"{path} lists no image: fill it, or choose another split")
    return ids
