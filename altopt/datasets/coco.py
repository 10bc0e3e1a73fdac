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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

from altopt.datasets.dataset import IMAGE_SUFFIXES, Json
from altopt.datasets.on_disk import Findings, Judged, OnDiskDataset, below, inside
from altopt.errors import DataError

MARGIN = 1.0


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
    """What the json files say: category names by id, images by id, and annotations that belong to no image."""

    categories: dict[int, str]
    images: dict[str, Image]
    strays: list[str]


class CocoDataset(OnDiskDataset):
    """One or several json files of instances with the same categories, all below ``root``.

    Classes are the category names in ascending order of their ids, or ``classes``, in that order; objects of other
    categories then cannot be used. ``check`` compares the categories with those of ``train``.
    """

    kind = "coco"

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

    def _path(self, image_id: str) -> Path:
        listed = self._content.images[image_id]
        return inside(self._root, listed.folder, listed.file_name)

    def _judged(self, image_id: str) -> Iterator[Judged]:
        listed = self._content.images[image_id]
        for annotation in listed.annotations:
            category = annotation.get("category_id")
            name = self._content.categories.get(category) if isinstance(category, int) else None
            called = f"{listed.source}, image {image_id}, annotation {annotation.get('id')} ({name or category})"
            if name is None or category not in self._labels:
                yield Judged(called, "it is of none of the classes")
            elif problem := _problem(annotation, listed.size):
                yield Judged(called, problem)
            else:
                x, y, width, height = map(float, annotation["bbox"])
                area = annotation.get("area")  # mostly the mask's
                thin = f"its box is {width:g} x {height:g}, less than a pixel" if min(width, height) < 1 else None
                yield Judged(called, None, thin, (x, y, x + width, y + height), self._labels[category],
                             crowd=bool(annotation.get("iscrowd", 0)),
                             area=float(area) if _is_number(area) else width * height)

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

    def _as_a_whole(self) -> tuple[Findings, str]:
        return Findings(unusable=list(self._content.strays)), ""

    def check(self) -> list[str]:
        """Check every image's header and every object; see ``Dataset.check``."""
        if self._train is not None and not self._asked:  # labels are positions in the order of the category ids
            here, there = (dict(zip(d.category_ids, d.classes, strict=True)) for d in (self, self._train))
            if here != there:
                raise DataError(f"{self.name} and {self._train.name} differ in their categories, first in "
                                f"{_first_difference(here, there)}: name the classes, or make the json files agree")
        return super().check()


def _load(source: Path) -> Json:
    def without_mask(entry: Json) -> Json:
        entry.pop("segmentation", None)  # the masks: nine tenths of COCO's json, and not needed
        return entry

    try:
        content = json.loads(source.read_bytes(), object_hook=without_mask)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read as json ({error}): bring a json file of COCO instances") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'{source} has no list "{key}" of objects: bring a json file of COCO instances')
    return cast(Json, content)


def _add(content: Content, source: Path, folder: Path, loaded: Json) -> None:
    """Add what one json file says; DataError when it is malformed or contradicts those before."""
    categories = _categories(source, loaded["categories"])
    if content.categories and content.categories != categories:
        where = _first_difference(categories, content.categories)
        raise DataError(f"{source} has other categories than the json before it, first {where}: make them agree")
    content.categories.update(categories)
    by_coco_id: dict[int | str, Image] = {}
    for entry in loaded["images"]:
        image = _image(source, folder, entry)
        if str(image.coco_id) in content.images:
            raise DataError(f"{source}: image {image.coco_id} occurs twice in the data set: list it once")
        content.images[str(image.coco_id)] = by_coco_id[image.coco_id] = image
    for annotation in loaded["annotations"]:
        image_id = annotation.get("image_id")
        if isinstance(image_id, int | str) and image_id in by_coco_id:
            by_coco_id[image_id].annotations.append(annotation)
        else:
            content.strays.append(f"{source}, annotation {annotation.get('id')}: image {image_id} is not listed")


def _categories(source: Path, entries: list[Json]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        category_id, name = entry.get("id"), entry.get("name")
        if type(category_id) is not int or not isinstance(name, str):
            raise DataError(f"{source}: category {entry} has no whole-number id or no name: correct it")
        if category_id in categories or name in categories.values():
            raise DataError(f'{source}: category {category_id} "{name}" occurs twice: correct it')
        categories[category_id] = name
    if not categories:
        raise DataError(f"{source} has no categories: bring a json file of COCO instances")
    return categories


def _image(source: Path, folder: Path, entry: Json) -> Image:
    coco_id, file_name = entry.get("id"), entry.get("file_name")
    width, height = entry.get("width"), entry.get("height")
    if type(coco_id) not in (int, str) or not isinstance(file_name, str):
        raise DataError(f"{source}: image {coco_id!r} has no id or no file_name: correct it")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise DataError(f"{source}: image {coco_id!r} has no whole-number width and height: correct it")
    return Image(source, folder, file_name, coco_id, (width, height), [])  # type: ignore[arg-type]


def _problem(annotation: Json, size: tuple[int, int]) -> str | None:
    """Say by which rule the annotation cannot be used in an image of this (width, height), if so."""
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        return "its bbox is not four numbers"
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        return f"bbox {bbox} has no area"
    if min(x, y) < -MARGIN or x + width > size[0] + MARGIN or y + height > size[1] + MARGIN:
        swapped = max(x + width - size[1], y + height - size[0]) <= MARGIN and min(x, y) >= -MARGIN
        hint = " (it would fit with width and height swapped)" if swapped else ""
        return f"bbox {bbox} leaves the image of {size[0]} x {size[1]}{hint}"
    return None


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def _first_difference(here: dict[int, str], there: dict[int, str]) -> str:
    first = min(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    return f"id {first}: {here.get(first)} and {there.get(first)}"
