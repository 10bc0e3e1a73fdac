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
from typing import NamedTuple

from altopt.datasets.dataset import IMAGE_SUFFIXES, Json
from altopt.datasets.on_disk import Findings, Judged, OnDiskDataset, below, image_size, inside
from altopt.errors import DataError

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


class VocDataset(OnDiskDataset):
    """One or several splits of folders in VOC layout, all below ``root``.

    Classes are ``classes`` if given; else those of ``train``, the data set trained on; else VOC's twenty if every split
    names a year; else the sorted names found in the annotations.
    """

    kind = "voc"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when they are to be found and an annotation cannot be read or none has an object."""
        if self._asked:
            return self._asked
        if self._train is not None:
            return self._train.classes
        if self._class_source is None:
            return VOC_CLASSES
        found = {obj.name for image_id in self.ids for obj in self._annotation(image_id).objects} - {""}
        if not found:
            raise DataError(f"{self.name} has no object at all: name its classes, or choose another split")
        return tuple(sorted(found))

    @property
    def _class_source(self) -> VocDataset | None:
        """The data set in whose annotations the classes are found; None where they are known without."""
        source = self._train or self
        dated = all(_YEAR_SPLIT.fullmatch(split) for split in source._splits)
        return None if self._asked or dated else source

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
        # One for each folder, however many lists are about it: it is read from the disk but once.
        folders = {path: _Folder(_Files(self._root, path / "Annotations", (".xml",)),
                                 _Files(self._root, path / "JPEGImages", IMAGE_SUFFIXES)) for path, _ in found}
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

    @cached_property
    def _parsed(self) -> dict[str, Annotation]:
        return {}

    def _annotation(self, image_id: str) -> Annotation:
        parsed = self._parsed.get(image_id)
        if parsed is None:
            parsed = self._parsed[image_id] = parse_annotation(self._folder_of[image_id].annotations[image_id])
        return parsed

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the id itself."""
        return image_id

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height), or the image's own where the annotation has none."""
        return self._annotation(image_id).size or image_size(self._path(image_id))

    def _path(self, image_id: str) -> Path:
        return self._folder_of[image_id].images[image_id]

    def _judged(self, image_id: str) -> Iterator[Judged]:
        size, path = self.size(image_id), self._folder_of[image_id].annotations[image_id]
        for number, obj in enumerate(self._annotation(image_id).objects, 1):
            called = f"{path}, object {number} ({obj.name})"
            if problem := _problem(obj, size, self.classes):
                yield Judged(called, problem)
                continue
            xmin, ymin, xmax, ymax = obj.corners or ()
            # A file that excludes the last pixel looks like this too, and then the object is nothing at all.
            thin = [f"{axis}min = {axis}max = {low:g}" for axis, low, high in (("x", xmin, xmax), ("y", ymin, ymax))
                    if low == high]
            warning = f"{' and '.join(thin)}: one pixel, or nothing if the file means to exclude the last one"
            # The pixels xmin..xmax, counted from 1, cover [xmin - 1, xmax].
            yield Judged(called, None, warning if thin else None, (xmin - 1, ymin - 1, xmax, ymax),
                         self.classes.index(obj.name), obj.difficult)

    def files(self) -> list[Path]:
        """Return lists, annotations and images; also the annotations trained on where the classes are found there."""
        files = [path for path, _ in self._lists]
        for image_id, folder in self._folder_of.items():
            files += [folder.annotations[image_id], folder.images[image_id]]
        source = self._class_source
        if source is not None and source is not self:
            files += [folder.annotations[image_id] for image_id, folder in source._folder_of.items()]
        return files

    def description(self) -> Json:
        """Return what defines the data set beside its files."""
        source = self._class_source
        classes = list(self._asked) if source is None else {"found in": list(source._splits)}
        return super().description() | {"classes": classes}

    def check(self) -> list[str]:
        """Check every image's header and every object; see ``Dataset.check``."""
        _ = self.classes  # where they must be found, a file that cannot be parsed is reported once
        return super().check()

    def _as_a_whole(self) -> tuple[Findings, str]:
        missing = [f"{self._folder_of[image_id].annotations[image_id]}: no size given, the image's own is taken"
                   for image_id, annotation in self._parsed.items() if annotation.size is None]
        zeros = sum(obj.corners is not None and 0 in obj.corners
                    for annotation in self._parsed.values() for obj in annotation.objects)
        hint = f"{zeros} objects start at 0, so these files seem to count from 0: add 1 to all their coordinates"
        return Findings(warnings=missing), hint if zeros >= _MANY_ZEROS else ""


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


class _Folder(NamedTuple):
    annotations: _Files
    images: _Files


def parse_annotation(path: Path) -> Annotation:
    """Read one annotation file; DataError when it is not VOC's XML or declares entities of its own."""
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content.replace(b"\0", b""):  # zeros: of UTF-16; a few nested entities can fill the memory
            raise DataError(f"{path} declares XML entities, which no annotation needs: remove its DOCTYPE")
        tree = ET.fromstring(content)
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it") from error
    size = tree.find("size")
    try:
        shape = None if size is None else (int(size.findtext("width", "")), int(size.findtext("height", "")))
    except ValueError:
        raise DataError(f"{path}: its size is not two whole numbers: correct or remove the element") from None
    if shape == (0, 0):  # how some tools write that they do not know
        shape = None
    return Annotation(shape, tuple(_parse_object(node) for node in tree.findall("object")))


def _parse_object(node: ET.Element) -> Object:
    try:
        corners = tuple(float(node.findtext(f"bndbox/{key}", "")) for key in _CORNERS)  # not those of nested parts
    except ValueError:
        corners = (math.nan,)
    finite = all(math.isfinite(corner) for corner in corners)
    difficult = node.findtext("difficult", "0").strip() == "1"
    return Object(node.findtext("name", "").strip(), corners if finite else None, difficult)


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
