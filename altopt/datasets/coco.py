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
from typing import TYPE_CHECKING, Any

from altopt.datasets.dataset import (
    IMAGE_SUFFIXES,
    LEAVE_OUT,
    Findings,
    Objects,
    below,
    inside,
)
from altopt.datasets.image_files import check_image, compare_size, read_image
from altopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MARGIN = 1.0


@dataclass(frozen=True)
class Image:
    """One entry of "images" with its annotations as the json spells them; ``source`` is the json file."""

    source: Path
    folder: Path
    file_name: str
    coco_id: int | str
    size: tuple[int, int]
    annotations: list[dict[str, Any]]


@dataclass(frozen=True)
class Content:
    """What the json files say: category names by id, images by id, and annotations that belong to no image."""

    categories: dict[int, str]
    images: dict[str, Image]
    strays: list[str]


class CocoDataset:
    """One or several json files of instances with the same categories, all below ``root``.

    Classes are the category names in ascending order of their ids, or ``classes``, in that order; objects of other
    categories then cannot be used. ``train`` is the data set trained on: ``check`` compares the categories with it.
    """

    def __init__(
        self,
        root: Path,
        splits: tuple[str, ...],
        *,
        classes: tuple[str, ...] = (),
        invalid: str = "error",
        train: CocoDataset | None = None,
    ) -> None:
        self.name = f"COCO {'+'.join(Path(split.partition(':')[0]).stem for split in splits)}"
        self._root, self._splits, self._asked, self._invalid, self._train = root, splits, classes, invalid, train

    @cached_property
    def _content(self) -> Content:
        content = Content({}, {}, [])
        for source, folder in self._sources:
            _add(content, source, folder, _load(source))
        return content

    @cached_property
    def _sources(self) -> list[tuple[Path, Path]]:
        """Each split's json file and folder of images."""
        parts = [split.partition(":") for split in self._splits]
        return [(below(self._root, file), below(self._root, folder)) for file, _, folder in parts]

    @cached_property
    def _labels(self) -> dict[int, int]:
        """Label of each category id that has one, by label."""
        id_of = {name: category_id for category_id, name in sorted(self._content.categories.items())}
        for name in self._asked:
            if name not in id_of:
                known = ", ".join(id_of)
                raise DataError(f'{self._sources[0][0]} has no category "{name}": name some of its own, {known}')
        return {id_of[name]: label for label, name in enumerate(self._asked or id_of)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; DataError when one that is asked for is no category of the json file."""
        return tuple(self._content.categories[category_id] for category_id in self._labels)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The json's category id of each class; they may have gaps."""
        return tuple(self._labels)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the json files."""
        return tuple(self._content.images)

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the image's id as the json has it, mostly an int."""
        return self._content.images[image_id].coco_id

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height)."""
        return self._content.images[image_id].size

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3]; DataError when the image is unreadable or of another size than annotated."""
        return read_image(self._path(image_id), self.size(image_id))

    def _path(self, image_id: str) -> Path:
        listed = self._content.images[image_id]
        return inside(self._root, listed.folder, listed.file_name)

    def objects(self, image_id: str) -> Objects:
        """Return the objects, without those that cannot be used if these may be left out; else DataError."""
        kept = []
        for label, annotation, problem in self._judged(image_id):
            if problem and self._invalid != "leave-out":
                raise DataError(f"{label}: {problem}: {LEAVE_OUT}")
            if not problem:
                kept.append(annotation)
        return Objects.of(
            boxes=[_corners(annotation) for annotation in kept],
            labels=[self._labels[annotation["category_id"]] for annotation in kept],
            crowd=[bool(annotation.get("iscrowd", 0)) for annotation in kept],
            areas=[_area(annotation) for annotation in kept],
        )

    def _judged(self, image_id: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """Yield for each annotation what messages call it, itself, and why it cannot be used, if so."""
        listed = self._content.images[image_id]
        for annotation in listed.annotations:
            category = annotation.get("category_id")
            name = self._content.categories.get(category) if isinstance(category, int) else None
            label = f"{listed.source}, image {image_id}, annotation {annotation.get('id')} ({name or category})"
            known = name is not None and category in self._labels
            yield label, annotation, _problem(annotation, listed.size) if known else "it is of none of the classes"

    def files(self) -> list[Path]:
        """Return the json files and every image in the folders, whether or not a json file lists it.

        Reading the list out of the json file of COCO would take longer than most commands.
        """
        jsons = [source for source, _ in self._sources]
        folders = dict.fromkeys(folder for _, folder in self._sources)
        return jsons + [path for folder in folders for path in _images_below(folder)]

    def description(self) -> dict[str, Any]:
        """Return what defines the data set beside its files."""
        return {
            "kind": "coco",
            "splits": list(self._splits),
            "classes": list(self._asked),
            "invalid": self._invalid,
        }

    def check(self) -> list[str]:
        """Check every image's header and every object; see ``Dataset.check``."""
        self._compare_categories()
        findings = Findings(unusable=list(self._content.strays))
        for image_id in self.ids:
            try:
                path = self._path(image_id)
                compare_size(path, check_image(path), self.size(image_id))
            except DataError as error:
                findings.broken.append(str(error))
            for label, annotation, problem in self._judged(image_id):
                if problem:
                    findings.unusable.append(f"{label}: {problem}")
                elif thin := _thinness(annotation):
                    findings.warnings.append(f"{label}: {thin}")
        return findings.verdict(self.name, self._invalid)

    def _compare_categories(self) -> None:
        if self._train is None or self._asked:
            return
        here, there = (dict(zip(d.category_ids, d.classes, strict=True)) for d in (self, self._train))
        if here != there:
            raise DataError(
                f"{self.name} and {self._train.name} differ in their categories, first in "
                f"{_first_difference(here, there)}: name the classes, or make the json files agree"
            )


def _load(source: Path) -> dict[str, Any]:
    """Read a json file without its masks, which are nine tenths of COCO's."""

    def without_mask(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)
        return entry

    try:
        content = json.loads(source.read_bytes(), object_hook=without_mask)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read as json ({error}): bring a json file of COCO instances") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'{source} has no list "{key}" of objects: bring a json file of COCO instances')
    return content  # type: ignore[no-any-return]


def _add(content: Content, source: Path, folder: Path, loaded: dict[str, Any]) -> None:
    """Add what one json file says; DataError when it is malformed or contradicts those before."""
    categories = _categories(source, loaded["categories"])
    if content.categories and content.categories != categories:
        where = _first_difference(categories, content.categories)
        raise DataError(f"{source} has other categories than the json before it, first {where}: make them agree")
    content.categories.update(categories)
    by_coco_id: dict[Any, Image] = {}
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


def _categories(source: Path, entries: list[dict[str, Any]]) -> dict[int, str]:
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


def _image(source: Path, folder: Path, entry: dict[str, Any]) -> Image:
    coco_id, file_name = entry.get("id"), entry.get("file_name")
    width, height = entry.get("width"), entry.get("height")
    if type(coco_id) not in (int, str) or not isinstance(file_name, str):
        raise DataError(f"{source}: image {coco_id!r} has no id or no file_name: correct it")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise DataError(f"{source}: image {coco_id!r} has no whole-number width and height: correct it")
    return Image(source, folder, file_name, coco_id, (width, height), [])  # type: ignore[arg-type]


def _problem(annotation: dict[str, Any], size: tuple[int, int]) -> str | None:
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _corners(annotation: dict[str, Any]) -> tuple[float, ...]:
    """Return the box (x1, y1, x2, y2)."""
    x, y, width, height = map(float, annotation["bbox"])
    return x, y, x + width, y + height


def _area(annotation: dict[str, Any]) -> float:
    """The annotated area, mostly the mask's; else the box's."""
    _, _, width, height = annotation["bbox"]
    area = annotation.get("area")
    return float(area if _is_number(area) else width * height)  # type: ignore[arg-type]


def _thinness(annotation: dict[str, Any]) -> str | None:
    width, height = annotation["bbox"][2:]
    return f"its box is {width:g} x {height:g}, less than a pixel" if min(width, height) < 1 else None


def _first_difference(here: dict[int, str], there: dict[int, str]) -> str:
    first = min(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    return f"id {first}: {here.get(first)} and {there.get(first)}"


def _images_below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and its subfolders, sorted."""
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        here = Path(parent)
        yield from (here / name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES))
