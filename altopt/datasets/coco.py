"""Data sets in COCO's format: a json file of instances and a folder of images.

A split "annotations/instances_train2017.json:train2017" is the json file and the folder that its file names start from,
both below the data root; without a folder they start from the root.

Image ids are the json's own, as strings. A box may stick out of its image by MARGIN pixels, as rounding makes it,
and is taken as it is; nothing is repaired.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

from altopt.datasets.checking import FileError, Finding, Severity
from altopt.datasets.dataset import IMAGE_SUFFIXES, Json, as_flag
from altopt.datasets.on_disk import (
    NO_AREA,
    NO_NUMBERS,
    OUTSIDE,
    UNKNOWN_CLASS,
    Fault,
    Judged,
    OnDiskDataset,
    below,
    inside,
    is_text,
    short,
)
from altopt.errors import DataError

MARGIN = 1.0
ROBOFLOW = "_annotations.coco.json"  # in each split's own folder
_LARGEST = 2**31  # of ids of categories, which are scored as whole numbers, and of an image's sides


@dataclass(frozen=True)
class Image:
    """One entry of "images" with its annotations as the json spells them; ``source`` is the json file."""

    source: Path
    folder: Path
    file_name: str
    coco_id: int | str
    size: tuple[int, int]
    annotations: list[Json]


@dataclass(frozen=True)
class Content:
    """What the json files say: category names by id, images by id, and what is wrong with other annotations."""

    categories: dict[int, str]
    images: dict[str, Image]
    strays: list[Finding]


class CocoDataset(OnDiskDataset):
    """One or several json files of instances with the same categories, all below ``root``.

    Classes are the category names in ascending order of their ids, or ``classes``, in that order; objects of other
    categories are then left out. ``look`` compares the categories with those of ``train``.
    """

    kind = "coco"

    def _called(self, split: str) -> str:
        file = split.partition(":")[0]
        folder, _, name = file.rpartition("/")
        return super()._called(folder if name == ROBOFLOW and folder else file).removesuffix(".json")

    @cached_property
    def _sources(self) -> list[tuple[Path, Path]]:
        """Each split's json file and folder of images."""
        parts = [split.partition(":") for split in self._splits]
        return [(below(self._root, file), below(self._root, folder)) for file, _, folder in parts]

    @cached_property
    def _content(self) -> Content:
        content = Content({}, {}, [])
        for source, folder in self._sources:
            _add(content, source, folder, _load(source))
        return content

    @cached_property
    def _labels(self) -> dict[int, int]:
        """Label of each category id that has one, by label."""
        id_of = {name: category_id for category_id, name in sorted(self._content.categories.items())}
        for name in self._asked:
            if name not in id_of:
                raise DataError(f'{self._sources[0][0]} has no category "{name}": name some of its own, '
                                f"{', '.join(id_of)}")
        return {id_of[name]: label for label, name in enumerate(self._asked or id_of)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when one that is asked for is no category of the json file."""
        return tuple(self._content.categories[category_id] for category_id in self._labels)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The json's category id of each class; they may have gaps."""
        return tuple(self._labels)

    @property
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the json files."""
        return tuple(self._content.images)

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the image's id as the json has it, mostly an int."""
        return self._content.images[image_id].coco_id

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height)."""
        return self._content.images[image_id].size

    def path(self, image_id: str) -> Path:
        """Return where an image lies."""
        listed = self._content.images[image_id]
        name = listed.file_name
        if "\\" in name and not (listed.folder / name).exists():  # as Windows spells paths
            name = name.replace("\\", "/")
        return inside(self._root, listed.folder, name)

    def _judged(self, image_id: str) -> Iterator[Judged]:
        listed = self._content.images[image_id]
        for annotation in listed.annotations:
            category = annotation.get("category_id")
            name = self._content.categories.get(category) if type(category) is int else None
            called = f"image {short(image_id)}, annotation {short(annotation.get('id'))} ({short(name or category)})"
            if name is None:
                yield Judged(listed.source, called, _no_category(category))
            elif category not in self._labels:
                yield Judged(listed.source, called, left_out=name)
            elif problem := _problem(annotation, listed.size):
                yield Judged(listed.source, called, problem)
            else:
                x, y, width, height = map(float, annotation["bbox"])
                area = annotation.get("area")  # mostly the mask's
                yield Judged(listed.source, called, None, _thin(width, height), (x, y, x + width, y + height),
                             self._labels[category], crowd=bool(_flag(annotation, "iscrowd")),
                             difficult=bool(_flag(annotation, "difficult") or _flag(annotation, "ignore")),
                             area=float(area) if _is_number(area) else width * height,
                             normalised=_is_normalised((x, y, width, height), listed.size))

    def files(self) -> list[Path]:
        """Return the json files and every image in the folders, whether or not a json file lists it.

        Reading the list out of the json file of COCO would take longer than most commands.
        """
        files = [source for source, _ in self._sources]
        for folder in dict.fromkeys(folder for _, folder in self._sources):
            for parent, subfolders, names in os.walk(folder):
                subfolders.sort()  # os.walk follows the order that it finds here
                files += [Path(parent) / name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]
        return files

    def _as_a_whole(self) -> Iterator[Finding]:
        severity: Severity = "warning" if self._invalid == "leave-out" else "problem"
        for stray in self._content.strays:
            yield replace(stray, severity=severity)
        if self._train is not None and not self._asked:  # labels are positions in the order of the category ids
            here, there = (dict(zip(d.category_ids, d.classes, strict=True)) for d in (self, self._train))
            if here != there:
                yield Finding("categories that differ", f"{self.name} and {self._train.name} differ in their "
                              f"categories, first in {_first_difference(here, there)}: name the classes in "
                              "data.classes, or make the json files agree")


def _load(source: Path) -> Json:
    def without_mask(entry: Json) -> Json:
        entry.pop("segmentation", None)  # the masks: nine tenths of COCO's json, and not needed
        return entry

    try:
        content = json.loads(source.read_bytes(), object_hook=without_mask)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError("unreadable annotation", source, f"{source} cannot be read as json ({error}): bring a json "
                        "file of COCO instances") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            without = key == "annotations" and isinstance(content, dict) and key not in content
            hint = ", as the image_info files of a test set without public objects have none" if without else ""
            raise FileError("unreadable annotation", source, f'{source} has no list "{key}" of objects{hint}: bring a '
                            "json file of COCO instances")
    return cast(Json, content)


def _add(content: Content, source: Path, folder: Path, loaded: Json) -> None:
    """Add what one json file says; DataError when it is malformed or contradicts those before."""
    categories = _categories(source, loaded)
    if content.categories and content.categories != categories:
        where = _first_difference(categories, content.categories)
        raise _error(source, f"it has other categories than the json before it, first {where}: make them agree")
    content.categories.update(categories)
    by_coco_id: dict[int | str, Image] = {}
    for entry in loaded["images"]:
        image = _image(source, folder, entry)
        if str(image.coco_id) in content.images:
            raise _error(source, f"image {short(image.coco_id)} occurs twice in the data set: list it once")
        content.images[str(image.coco_id)] = by_coco_id[image.coco_id] = image
    for number, annotation in enumerate(loaded["annotations"]):
        image_id = annotation.get("image_id")
        if type(image_id) in (int, str) and image_id in by_coco_id:
            by_coco_id[image_id].annotations.append(annotation)
            continue
        called = f"annotation {short(annotation.get('id', f'number {number}'))}"
        content.strays.append(Finding("annotation without image", f"{source}, {called}: "
                                      f"{_stray(image_id, by_coco_id)}", file=str(source), object=called))


def _stray(image_id: object, images: Mapping[int | str, Image]) -> str:
    """Say why an annotation belongs to no image."""
    for listed in images if isinstance(image_id, int | float | str) else ():
        if type(listed) is not type(image_id) and str(listed) == str(image_id).removesuffix(".0"):
            return (f"its image_id is {_typed(image_id)}, the image's id is {_typed(listed)}: write both as the same "
                    "type")
    return f"image {short(image_id)} is not listed: list it, or remove the annotation"


def _typed(value: object) -> str:
    return f'the text "{short(value)}"' if isinstance(value, str) else f"the number {short(value)}"


def _categories(source: Path, loaded: Json) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in _without_headings(loaded):
        category_id, name = entry.get("id"), entry.get("name")
        if type(category_id) is not int or not isinstance(name, str):
            raise _error(source, f"category {short(entry)} has no whole-number id or no name: correct it")
        if abs(category_id) >= _LARGEST:
            raise _error(source, f"category {short(category_id)} has an id beyond 32 bits: give it a smaller one")
        if not is_text(name):
            raise _error(source, f"category {category_id} has a name that is no text in Unicode, {short(name)}: "
                         "correct it")
        if category_id in categories or name in categories.values():
            raise _error(source, f'category {category_id} "{short(name)}" occurs twice: correct it')
        categories[category_id] = name
    if not categories:
        raise _error(source, "it has no categories: bring a json file of COCO instances")
    return categories


def _without_headings(loaded: Json) -> list[Json]:
    """Return the categories without those that Roboflow puts above the others, and that no annotation is of."""
    above = {entry.get("supercategory") for entry in loaded["categories"]
             if isinstance(entry.get("supercategory"), str) and entry["supercategory"] != entry.get("name")}
    used = {str(annotation.get("category_id")) for annotation in loaded["annotations"]} if above else set()
    return [entry for entry in loaded["categories"] if entry.get("supercategory") != "none"
            or str(entry.get("name")) not in above or str(entry.get("id")) in used]


def _image(source: Path, folder: Path, entry: Json) -> Image:
    coco_id, file_name = entry.get("id"), entry.get("file_name")
    width, height = entry.get("width"), entry.get("height")
    if not isinstance(coco_id, int | str) or isinstance(coco_id, bool) or not isinstance(file_name, str):
        raise _error(source, f"image {short(coco_id)} has no id or no file_name: correct it")
    if not is_text(f"{short(coco_id)}{coco_id if isinstance(coco_id, str) else ''}{file_name}"):
        raise _error(source, f"image {short(coco_id)} has an id or a file_name that is no text in Unicode: correct it")
    if type(width) is not int or type(height) is not int or not 0 < min(width, height) <= max(width, height) < _LARGEST:
        raise _error(source, f"image {short(coco_id)} has no whole-number width and height: correct it")
    return Image(source, folder, file_name, coco_id, (width, height), [])


def _error(source: Path, text: str) -> FileError:
    return FileError("unreadable annotation", source, f"{source}: {text}")


def _no_category(category: object) -> Fault:
    kind = f"its category_id is {_typed(category)}, no id of a category" if isinstance(category, str) else \
        "it is of none of the classes"
    return Fault(UNKNOWN_CLASS, kind, "list the category, or correct the annotation")


def _problem(annotation: Json, size: tuple[int, int]) -> Fault | None:
    """Say by which rule the annotation cannot be used in an image of this (width, height), if so."""
    for name in ("iscrowd", "difficult", "ignore"):
        if _flag(annotation, name) is None:
            return Fault("flag", f"its {name} must be 0 or 1 (it is {short(annotation[name])})")
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        return NO_NUMBERS._replace(text="its bbox is not four numbers")
    x, y, width, height = bbox
    shown = f"bbox [{', '.join(map(short, bbox))}]"
    if width <= 0 or height <= 0:
        return Fault(NO_AREA, f"{shown} has no area")
    if not _fits(bbox, size):
        hint = ""
        if _fits(bbox, size[::-1]):
            hint = " (it would fit with width and height swapped)"
        elif width > x and height > y and _fits([x, y, width - x, height - y], size):
            hint = " (it would fit as two corners, and COCO's are x, y, width, height)"
        return Fault(OUTSIDE, f"{shown} leaves the image of {size[0]} x {size[1]}{hint}")
    return None


def _fits(bbox: Sequence[float], size: tuple[int, int]) -> bool:
    x, y, width, height = bbox
    return min(x, y) >= -MARGIN and x + width <= size[0] + MARGIN and y + height <= size[1] + MARGIN


def _thin(width: float, height: float) -> Fault | None:
    if min(width, height) >= 1:
        return None
    return Fault("box of less than a pixel", f"its box is {width:g} x {height:g}, less than a pixel")


def _is_normalised(bbox: Sequence[float], size: tuple[int, int]) -> bool:
    return min(size) > 2 and min(bbox) >= 0 and max(bbox) <= 1 and any(value % 1 for value in bbox)


def _flag(annotation: Json, name: str) -> bool | None:
    return as_flag(annotation.get(name, 0))


def _is_number(value: object) -> TypeGuard[float]:
    try:
        return type(value) in (int, float) and math.isfinite(cast(float, value))
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _first_difference(here: dict[int, str], there: dict[int, str]) -> str:
    first = min(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    return f"id {first}: {here.get(first)} and {there.get(first)}"
