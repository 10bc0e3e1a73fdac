"""What a data set is: images, the objects in them, and a check of both.

Boxes are continuous xyxy in pixels of the original image: an object covers [x1, x2] x [y1, y2] and its width is
x2 - x1. N is the number of objects in one image.

numpy and Pillow are imported by what first makes an array or reads an image: to say which files a data set consists
of needs neither, so ``altopt plan`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from altopt.config import Bounds, setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from altopt.datasets.checking import Look

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FLAGS = {"": False, **dict.fromkeys(("0", "false", "no"), False), **dict.fromkeys(("1", "true", "yes"), True)}
Json = dict[str, Any]  # an object of a json file, whose fields may hold anything


@dataclass(frozen=True, eq=False)
class Objects:
    """The annotated objects of one image, in the order of its annotation.

    boxes float32 [N, 4] xyxy; labels int64 [N], indices into the data set's classes; difficult and crowd bool [N].
    areas float32 [N] is what COCO's size ranges go by (the area of the mask where one is annotated); None: the boxes'.
    Read from a file of ground truth to be scored against, boxes and areas are float64.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.floating] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, boxes: Sequence[Sequence[float]], labels: Sequence[int], *, difficult: Sequence[bool] = (),
           crowd: Sequence[bool] = (), areas: Sequence[float] | None = None) -> Objects:
        """Return the objects from lists; no object is difficult or a crowd where such a list is left out."""
        import numpy as np

        none = [False] * len(labels)
        return cls(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),  # (N, 4), of no objects too
            labels=np.array(labels, np.int64),
            difficult=np.array(difficult or none, np.bool_),
            crowd=np.array(crowd or none, np.bool_),
            areas=None if areas is None else np.array(areas, np.float32),
        )

    @property
    def counted(self) -> NDArray[np.bool_]:
        """bool [N]: what training may use and scoring asks for, neither difficult nor a crowd."""
        return ~(self.difficult | self.crowd)

    def usable(self) -> Objects:
        """Return the objects that are counted."""
        keep = self.counted
        areas = None if self.areas is None else self.areas[keep]
        return Objects(self.boxes[keep], self.labels[keep], self.difficult[keep], self.crowd[keep], areas)


class Dataset(Protocol):
    """Images and their objects by image id. Nothing is read before it is asked for; every method is thread-safe."""

    @property
    def name(self) -> str:
        """Format and splits, for messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names without background; a label is an index into them."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """COCO category id of each class; index + 1 where the format has none."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Image ids, in order."""

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the id that the image bears in COCO json."""

    def size(self, image_id: str) -> tuple[int, int]:
        """Return (width, height) in pixels."""

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return the pixels, RGB [H, W, 3]. DataError when unreadable."""

    def objects(self, image_id: str) -> Objects:
        """Return the objects, in arrays of the caller's own; DataError when one cannot be used nor be left out."""

    def files(self) -> list[Path]:
        """Return every file whose content defines the data set, without parsing annotations."""

    def description(self) -> Json:
        """Return, JSON-able, what defines the data set beside its files."""

    def look(self) -> Look:
        """Look at every image and object; return all that is found, problems too, and the numbers."""

    def check(self) -> list[str]:
        """Look at every image and object; return warnings, raise one DataError that names the first problem."""


Format = Literal["voc", "coco", "yolo", "shapes", "auto"]
Exif = Literal["error", "apply", "ignore"]
VocBoxes = Literal["inclusive-1", "inclusive-0", "xyxy"]  # named as the formats of proposals are
NAMES = Bounds(non_empty=True, distinct=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data set; the spelling of a split is explained in the module of its format.

    Format, train and test may be "auto" in a recipe: a run puts in what it finds in its data root.
    """

    format: Format
    train: tuple[str, ...] = field(metadata={"bounds": NAMES})
    test: tuple[str, ...] = field(metadata={"bounds": NAMES})
    classes: tuple[str, ...] = setting((), "the format's own rule", distinct=True)
    invalid: Literal["error", "leave-out"] = setting("error", "an object that cannot be used is an error")
    exif: Literal["error", "apply", "ignore"] = setting(
        "error", "boxes on an image that EXIF turns may count either way")
    box_format: Literal["inclusive-1", "inclusive-0", "xyxy"] = setting(
        "inclusive-1", "of voc only: as the devkit counts")
    width: int = setting(320, "of shapes only", at_least=16)
    height: int = setting(240, "of shapes only", at_least=16)
    seed: int = setting(0, "of shapes only", at_least=0)


def as_flag(value: object) -> bool | None:
    """Return a flag of an annotation, be it a number, a text, or a boolean; None for what is none of these."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def to_coco(dataset: Dataset, file_name: Callable[[str], str] | None = None) -> Json:
    """Return the ground truth as the content of a COCO json file, with "difficult" 0 or 1 as an extension.

    Boxes are [x, y, width, height], continuous; image ids are ``coco_image_id``'s. ``file_name`` says where an image
    lies; without it the json names no files.
    """
    images: list[Json] = []
    annotations: list[Json] = []
    for image_id in dataset.ids:
        (width, height), objects = dataset.size(image_id), dataset.objects(image_id)
        coco_id = dataset.coco_image_id(image_id)
        named = {} if file_name is None else {"file_name": file_name(image_id)}
        images.append({"id": coco_id, "width": width, "height": height, **named})
        for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            annotations.append({
                "id": len(annotations) + 1,  # from 1: pycocotools takes a match with id 0 for none
                "image_id": coco_id,
                "category_id": dataset.category_ids[objects.labels[i]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1) if objects.areas is None else float(objects.areas[i]),
                "iscrowd": int(objects.crowd[i]),
                "difficult": int(objects.difficult[i]),
            })
    categories = [{"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.classes, strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}
