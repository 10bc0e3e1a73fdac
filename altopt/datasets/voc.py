"""Data sets with PASCAL VOC's annotations: an XML file for each image, with lists of the images or without.

A split "2007_trainval" is the list trainval of the folder VOC2007, which lies in the root, in root/VOCdevkit, or is the
root; a split "train" is that list of the root itself, ImageSets/Main/train.txt, and "cats/train" that of the folder
cats. A list names an image a line. A second
column, the flag of VOC's per-class lists, is not read: a line is taken for an id and a flag where only the id without
the flag has files.

A split that ends in "/" is a folder without a list ("train/", "./" for the root): every image there that has an XML
file. Images lie in JPEGImages, in images, or in the folder itself; XML files in Annotations, in annotations, or beside
the images, or in annotations/train for images/train.

VOC counts pixels from 1 and includes the last: xmin..xmax becomes [xmin - 1, xmax]. Files may count otherwise
(``box_format``). Nothing is repaired. Objects are numbered from 1, in the order of the file.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from altopt.datasets.checking import FileError, Finding, some
from altopt.datasets.dataset import IMAGE_SUFFIXES, Json, as_flag
from altopt.datasets.folders import FilesById
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
    near,
    read_text,
    short,
)
from altopt.errors import DataError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IMAGE_FOLDERS, XML_FOLDERS = ("JPEGImages", "images", "Images"), ("Annotations", "annotations")
LISTS = Path("ImageSets", "Main")

_YEAR_SPLIT = re.compile(r"(\d{4})_(.+)")
_FLAGGED = re.compile(r"(.+?)\s+(?:-1|0|1)")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_TAGS = {"object", "name", "bndbox", "difficult", "size", "width", "height", *_CORNERS}
_LARGEST = 2**31  # pixels: more is no size of an image
# What first and last pixels, counted from 0 or 1, are in continuous coordinates.
_SHIFTS = {"inclusive-1": (-1, 0), "inclusive-0": (0, 1), "xyxy": (0, 0)}
_FORMATS = {"inclusive-1": "count pixels from 1", "inclusive-0": "count pixels from 0", "xyxy": "are continuous"}
ADD_CLASS = "correct the name, or name the classes that you want in data.classes, which leaves others out"


@dataclass(frozen=True)
class Object:
    """One <object> as the file spells it: corners are xmin, ymin, xmax, ymax, or None when not four numbers.

    ``difficult`` is None when it is no flag.
    """

    name: str
    corners: tuple[float, ...] | None
    difficult: bool | None


@dataclass(frozen=True)
class Annotation:
    """One file: (width, height), None when missing or 0 x 0, and its objects; the nested <part>s are none."""

    size: tuple[int, int] | None
    objects: tuple[Object, ...]


class _Folder(NamedTuple):
    annotations: FilesById
    images: FilesById


class _Split(NamedTuple):
    """The list of a split, or None where it is a whole folder, and where its files lie."""

    listed: Path | None
    folder: _Folder
    prefix: str  # of ids


class VocDataset(OnDiskDataset):
    """One or several splits of folders with VOC's XML files, all below ``root``.

    Classes are ``classes`` if given; else those of ``train``, the data set trained on; else VOC's twenty if every split
    names a year; else the sorted names found in the annotations.
    """

    kind = "voc"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when they are to be found and an annotation cannot be read or none has an object."""
        source = self._class_source
        if source is not None:
            for image_id in source.ids:
                source._annotation(image_id)
            if not self._known:
                raise DataError(f"{source.name} has no object at all: name its classes, or choose another split")
        return self._known

    @cached_property
    def _known(self) -> tuple[str, ...]:
        source = self._class_source
        if source is None:
            return self._asked or VOC_CLASSES
        if source is not self:
            return source._known
        found: set[str] = set()
        for image_id in self.ids:
            try:
                found.update(obj.name for obj in self._annotation(image_id).objects)
            except DataError:  # who asks for the classes is told, and a look names each such file
                continue
        return tuple(sorted(found - {""}))

    @property
    def _class_source(self) -> VocDataset | None:
        """The data set in whose annotations the classes are found; None where they are known without."""
        source = self._train or self
        dated = all(_YEAR_SPLIT.fullmatch(split) for split in source._splits)
        return None if self._asked or dated else source

    @property
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the lists; DataError when an id occurs twice or a list is missing or empty."""
        return tuple(self._places)

    @cached_property
    def _found_splits(self) -> list[_Split]:
        found = [_find_split(self._root, split) for split in self._splits]
        # One for each folder, however many lists are about it: it is read from the disk but once.
        folders = {path: self._folder(path) for path, _ in found}
        several = len(self._splits) > 1
        return [_Split(_list_file(path, name), folders[path], "") if name else
                _Split(None, folders[path], f"{path.relative_to(self._root).as_posix()}/" if several else "")
                for path, name in found]

    def _folder(self, path: Path) -> _Folder:
        images, xml = layout(self._root, path)
        return _Folder(FilesById(self._root, xml, (".xml",)), FilesById(self._root, images, IMAGE_SUFFIXES))

    @cached_property
    def _places(self) -> dict[str, tuple[_Folder, str]]:
        """Where each image's files lie, and what they are called there."""
        places: dict[str, tuple[_Folder, str]] = {}
        for listed, folder, prefix in self._found_splits:
            names = folder.images.names.keys() & folder.annotations.names.keys()
            for name in sorted(names) if listed is None else _read_list(listed, folder):
                if (image_id := prefix + name) in places:
                    raise DataError(f"{listed or folder.images.folder}: image {image_id} occurs twice in {self.name}: "
                                    "list it once")
                places[image_id] = folder, name
            if listed is None and not names:
                raise DataError(_nothing_there(folder))
        return places

    @cached_property
    def _parsed(self) -> dict[str, Annotation]:
        return {}

    def _annotation(self, image_id: str) -> Annotation:
        parsed = self._parsed.get(image_id)
        if parsed is None:
            parsed = self._parsed[image_id] = parse_annotation(self._xml(image_id))
        return parsed

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height), or the image's own where the annotation has none."""
        return self._annotation(image_id).size or image_size(self.path(image_id), self._exif)

    def path(self, image_id: str) -> Path:
        """Return where an image lies."""
        folder, name = self._places[image_id]
        return folder.images[name]

    def _xml(self, image_id: str) -> Path:
        folder, name = self._places[image_id]
        return folder.annotations[name]

    def _judged(self, image_id: str) -> Iterator[Judged]:
        path, annotation = self._xml(image_id), self._annotation(image_id)
        if not annotation.objects:
            return
        size = self.size(image_id)
        for number, obj in enumerate(annotation.objects, 1):
            called = f"object {number} ({short(obj.name)})"
            normalised = _is_normalised(obj, size)
            if self._asked and obj.name not in self._known:
                yield Judged(path, called, left_out=obj.name)
            elif problem := self._problem(obj, size):
                yield Judged(path, called, problem, normalised=normalised)
            else:
                first, last = _SHIFTS[self._box_format]
                xmin, ymin, xmax, ymax = obj.corners or ()
                box = (xmin + first, ymin + first, xmax + last, ymax + last)
                yield Judged(path, called, None, self._thin(obj), box, self._known.index(obj.name),
                             bool(obj.difficult), normalised=normalised)

    def _thin(self, obj: Object) -> Fault | None:
        xmin, ymin, xmax, ymax = obj.corners or ()
        if self._box_format == "xyxy" and min(xmax - xmin, ymax - ymin) < 1:
            return Fault("box of less than a pixel", f"its box is {xmax - xmin:g} x {ymax - ymin:g}, less than a pixel")
        # A file that excludes the last pixel looks like this too, and then the object is nothing at all.
        thin = [f"{axis}min = {axis}max = {low:g}" for axis, low, high in (("x", xmin, xmax), ("y", ymin, ymax))
                if low == high]
        if not thin:
            return None
        return Fault("box of one pixel", f"{' and '.join(thin)}: one pixel, or nothing if the file means to exclude "
                     "the last one")

    def _problem(self, obj: Object, size: tuple[int, int]) -> Fault | None:
        """Say by which rule the object cannot be used in an image of this (width, height), if so."""
        if obj.name not in self._known:
            source = self._class_source
            why = f" of {source.name}" if source is not None and source is not self else ""
            return Fault(UNKNOWN_CLASS, f'"{short(obj.name)}" is not one of the {len(self._known)} classes{why}'
                         f"{near(obj.name, self._known)}", ADD_CLASS)
        if obj.difficult is None:
            return Fault("flag", "its difficult is not 0 or 1")
        if obj.corners is None:
            return NO_NUMBERS._replace(text="its bndbox is not four numbers")
        first, last = _SHIFTS[self._box_format]
        xmin, ymin, xmax, ymax = obj.corners
        swapped = " (it would fit with width and height swapped)" if xmax <= size[1] and ymax <= size[0] else ""
        for axis, low, high, extent in (("x", xmin, xmax, size[0]), ("y", ymin, ymax, size[1])):
            if high < low:
                return Fault(NO_AREA, f"{axis}max {high:g} is less than {axis}min {low:g}")
            if high + last <= low + first:
                return Fault(NO_AREA, f"{axis}max {high:g} is {axis}min")
            if low + first < 0:
                start = "VOC coordinates start at 1" if self._box_format == "inclusive-1" else "it must be at least 0"
                return Fault(OUTSIDE, f"{axis}min {low:g}: {start}")
            if high + last > extent:
                return Fault(OUTSIDE, f"{axis}max {high:g} lies outside the image of {size[0]} x {size[1]}{swapped}")
        return None

    def files(self) -> list[Path]:
        """Return lists, annotations and images; also the annotations trained on where the classes are found there."""
        files = [split.listed for split in self._found_splits if split.listed is not None]
        for folder, name in self._places.values():
            files += [folder.annotations[name], folder.images[name]]
        source = self._class_source
        if source is not None and source is not self:
            files += [source._xml(image_id) for image_id in source.ids]
        return files

    def description(self) -> Json:
        """Return what defines the data set beside its files."""
        source = self._class_source
        classes = list(self._asked) if source is None else {"found in": list(source._splits)}
        return super().description() | {"classes": classes}

    def _as_a_whole(self) -> Iterator[Finding]:
        for listed, folder, _ in self._found_splits:
            if listed is None:
                yield from _without_partner(folder)
        if missing := [image_id for image_id, annotation in self._parsed.items() if annotation.size is None]:
            yield Finding("no size", f"{self._xml(missing[0])}: no size given, the image's own is taken"
                          + (f"; so it is in {len(missing) - 1} other files" if len(missing) > 1 else ""), "warning",
                          str(self._xml(missing[0])))
        fractional = sum(any(value % 1 for value in obj.corners) for obj in self._boxes)
        if self._box_format != "xyxy" and 2 * fractional > len(self._boxes):
            yield Finding("fractions of pixels", f"{self.name}: {fractional} of {len(self._boxes)} objects have "
                          "fractions of pixels, as continuous coordinates have: if they are, set "
                          'data.box_format = "xyxy"', "warning")

    @property
    def _boxes(self) -> list[_Box]:
        """Every object with its four numbers and its image's size."""
        return [_Box(obj.corners, annotation.size) for annotation in self._parsed.values()
                for obj in annotation.objects if obj.corners is not None and annotation.size is not None]

    def _hints(self) -> dict[str, str]:
        hints = {}
        boxes = self._boxes
        zeros = sum(0 in box.corners[:2] for box in boxes)
        ones = sum(1 in box.corners[:2] for box in boxes)
        ends = sum(box.corners[2] == box.size[0] or box.corners[3] == box.size[1] for box in boxes)
        fractional = sum(any(value % 1 for value in box.corners) for box in boxes)
        likely = "inclusive-1" if zeros <= ones else "xyxy" if ends or fractional else "inclusive-0"
        if likely != self._box_format and zeros + ones:
            hints[OUTSIDE] = (f"of {len(boxes)} objects {zeros} start at 0, {ones} at 1, and {ends} end at the image's "
                              f'width or height: if the files {_FORMATS[likely]}, set data.box_format = "{likely}"')
        names = sorted({obj.name for annotation in self._parsed.values() for obj in annotation.objects} - {""})
        if self._class_source is None and names:
            hints[UNKNOWN_CLASS] = ("if the data set has classes of its own, set data.classes = "
                                    f"[{', '.join(map(_quoted, names))}]")
        return hints


def layout(root: Path, folder: Path) -> tuple[Path, Path]:
    """Return where the images and the XML files of a folder below the root lie."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder)
    candidates = [folder / name for name in XML_FOLDERS]
    parts = folder.relative_to(root).parts
    for place, part in enumerate(parts):
        if part in IMAGE_FOLDERS:  # images/train has its files in annotations/train
            candidates += [root.joinpath(*parts[:place], name, *parts[place + 1:]) for name in XML_FOLDERS]
    return images, next((path for path in candidates if path.is_dir()), images)


class _Box(NamedTuple):
    corners: tuple[float, ...]
    size: tuple[int, int]


def _quoted(name: str) -> str:
    return f'"{short(name)}"'


def _nothing_there(folder: _Folder) -> str:
    images, xml = folder.images, folder.annotations
    return (f"{images.folder} holds no image with an xml file: images are looked for there, and xml files in "
            f"{xml.folder} (found: {len(images.names)} images, {len(xml.names)} xml files): choose another split")


def _without_partner(folder: _Folder) -> Iterator[Finding]:
    """Yield what is found of the images and XML files of a folder that belong to nothing."""
    images, xml = folder.images, folder.annotations
    if alone := sorted(images.names.keys() - xml.names.keys()):
        yield Finding("image without xml", f"{images.folder}: {len(alone)} images have no xml file and are left out: "
                      f"{some(alone)}", "warning", str(images.folder))
    for name in sorted(xml.names.keys() - images.names.keys()):
        try:
            images[name]
        except DataError as error:
            yield Finding("xml without image", str(error), "problem", str(xml.folder / f"{name}.xml"))


def _is_normalised(obj: Object, size: tuple[int, int]) -> bool:
    corners = obj.corners
    return (corners is not None and min(size) > 2 and min(corners) >= 0 and max(corners) <= 1
            and any(value % 1 for value in corners))


def parse_annotation(path: Path) -> Annotation:
    """Read one annotation file; DataError when it is not VOC's XML or declares entities of its own."""
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content.replace(b"\0", b""):  # zeros: of UTF-16; a few nested entities can fill the memory
            raise _error(path, f"{path} declares XML entities, which no annotation needs: remove its DOCTYPE")
        tree = ET.fromstring(content)
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise _error(path, f"{path} cannot be read ({error}): replace it") from error
    _check_tags(path, tree)
    size = tree.find("size")
    try:
        shape = None if size is None else (int(size.findtext("width", "")), int(size.findtext("height", "")))
    except ValueError:
        raise _error(path, f"{path}: its size is not two whole numbers: correct or remove the element") from None
    if shape == (0, 0):  # how some tools write that they do not know
        shape = None
    if shape is not None and not 0 < min(shape) <= max(shape) < _LARGEST:
        raise _error(path, f"{path}: its size {' x '.join(map(short, shape))} is no image's: correct or remove the "
                     "element")
    return Annotation(shape, tuple(_parse_object(node) for node in tree.findall("object")))


def _check_tags(path: Path, tree: ET.Element) -> None:
    """Raise DataError for tags that would be passed over: VOC's in capitals, and objects in another place."""
    # Else what they hold would be background, without a word.
    objects = tree.findall("object")
    if not objects and tree.tag.rpartition("}")[2].lower() != "annotation":
        raise _error(path, f"{path} is XML of another kind, <{short(tree.tag)}> in place of VOC's <annotation>: bring "
                     "VOC's")
    for node in (tree, *tree, *(child for obj in objects for child in obj.iter())):
        local = node.tag.rpartition("}")[2]
        if local != node.tag and local.lower() in _TAGS:
            raise _error(path, f"{path} has its elements in a namespace of XML, VOC's are in none: remove the xmlns")
        if local != local.lower() and local.lower() in _TAGS:
            raise _error(path, f"{path} has <{short(local)}> in place of VOC's <{local.lower()}>: correct the tag")
    if len(objects) != len(list(tree.iter("object"))):
        raise _error(path, f"{path} has objects in another element than VOC's <annotation>: move them there")
    known = {box for obj in objects for box in obj.iter("bndbox")}
    for parent in tree.iter():
        if any(child.tag == "bndbox" and child not in known for child in parent):
            raise _error(path, f"{path} has a <bndbox> in <{short(parent.tag)}>, which is not VOC's <object>: correct "
                         "the tag")


def _error(path: Path, text: str) -> FileError:
    return FileError("unreadable annotation", path, text)


def _parse_object(node: ET.Element) -> Object:
    try:
        corners = tuple(float(node.findtext(f"bndbox/{key}", "")) for key in _CORNERS)  # not those of nested parts
    except ValueError:
        corners = (math.nan,)
    finite = all(math.isfinite(corner) for corner in corners)
    return Object(node.findtext("name", "").strip(), corners if finite else None,
                  as_flag(node.findtext("difficult", "0")))


def _find_split(root: Path, split: str) -> tuple[Path, str]:
    """Return the folder that a split is about and the name of its list there; empty for a folder without one."""
    if split.endswith("/") or split in ("", "."):
        folder = below(root, split)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: a split that ends in / names one with images and xml files")
        return folder, ""
    dated = _YEAR_SPLIT.fullmatch(split)
    if dated is None:
        inner, _, name = split.rpartition("/")
        return below(root, inner), name
    year_folder = f"VOC{dated[1]}"
    candidates = [root / "VOCdevkit" / year_folder, root / year_folder]
    if root.resolve().name == year_folder or root.name == year_folder:
        candidates.append(root)
    for path in candidates:
        if path.is_dir():
            return path, dated[2]
    raise DataError(f"{root} has no folder {year_folder}, nor VOCdevkit/{year_folder}: set the data root to its parent")


def _list_file(folder: Path, name: str) -> Path:
    return below(folder / LISTS, f"{name}.txt")


def _read_list(path: Path, folder: _Folder) -> list[str]:
    if not path.is_file():
        lists = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt") if "_" not in other.stem))
        here = f"(here are {lists})" if lists else \
            '(here are none; altopt split makes some, and "./" is the split of a whole folder)'
        raise FileError("missing list", path, f"{path} is not a readable list of images: choose another split {here}")
    ids = [_listed(line.strip(), folder) for line in read_text(path).splitlines() if line.strip()]
    if not ids:
        raise FileError("empty list", path, f"{path} lists no image: fill it, or choose another split")
    return ids


def _listed(line: str, folder: _Folder) -> str:
    """Return the id of a list's line, which may have a flag behind it, or the ending of the image's name."""
    match = _FLAGGED.fullmatch(line)
    for spelled in (line, match[1] if match else line):
        stem, dot, suffix = spelled.rpartition(".")
        for name in (spelled, stem if f"{dot}{suffix}".lower() in IMAGE_SUFFIXES else spelled):
            if name in folder.images.names or name in folder.annotations.names:
                return name
    return match[1] if match and "  " in line else line
