"""What data sets in files have in common: reading images, judging objects one by one, and a check of both."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Self

from altopt.datasets.dataset import DataConfig, Json, Objects
from altopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error)
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096  # of a file, in which its end marker lies even if a few bytes of something else follow
PHOTOGRAPHS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what is detected on; Pillow's names
LEAVE_OUT = 'correct the file, or set invalid = "leave-out" to do without such objects'


@dataclass(frozen=True)
class Judged:
    """An annotated object: what messages call it, and why it cannot be used; else what it is.

    ``box`` is x1, y1, x2, y2, continuous, in pixels of the original image; ``area`` is None where none is annotated.
    """

    called: str
    problem: str | None = None
    warning: str | None = None
    box: tuple[float, ...] = ()
    label: int = -1
    difficult: bool = False
    crowd: bool = False
    area: float | None = None


class OnDiskDataset(ABC):
    """One or several splits below ``root``; a format says where the images lie, and judges the objects.

    ``classes`` are those asked for, ``train`` is the data set trained on. With ``invalid`` "leave-out" objects that
    cannot be used are left out, else they are a DataError.
    """

    kind: str

    def __init__(self, root: Path, splits: tuple[str, ...], *, classes: tuple[str, ...] = (), invalid: str = "error",
                 train: Self | None = None) -> None:
        lists = (split.partition(":")[0].rpartition("/")[2].removesuffix(".json") for split in splits)
        self.name = f"{self.kind.upper()} {'+'.join(lists)}"
        self._root, self._splits, self._asked, self._invalid, self._train = root, splits, classes, invalid, train

    @classmethod
    def opened(cls, config: DataConfig, split: Literal["train", "test"], root: Path) -> Self:
        """Return the data set of one split, without reading anything yet."""
        trained = cls(root, config.train, classes=config.classes, invalid=config.invalid)
        if split == "train":
            return trained
        return cls(root, config.test, classes=config.classes, invalid=config.invalid, train=trained)

    @property
    @abstractmethod
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the lists."""

    @abstractmethod
    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height)."""

    @abstractmethod
    def _path(self, image_id: str) -> Path: ...

    @abstractmethod
    def _judged(self, image_id: str) -> Iterator[Judged]:
        """Yield every annotated object of an image."""

    def _as_a_whole(self) -> tuple[Findings, str]:
        return Findings(), ""  # what is found beside single objects and images, once they are looked at, and a hint

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3]; DataError when the image is unreadable or of another size than annotated."""
        return read_image(self._path(image_id), self.size(image_id))

    def objects(self, image_id: str) -> Objects:
        """Return the objects, without those that cannot be used if these may be left out; else DataError."""
        kept: list[Judged] = []
        for found in self._judged(image_id):
            if not found.problem:
                kept.append(found)
            elif self._invalid != "leave-out":
                raise DataError(f"{found.called}: {found.problem}: {LEAVE_OUT}")
        areas = [found.area for found in kept if found.area is not None]
        return Objects.of([found.box for found in kept], [found.label for found in kept],
                          difficult=[found.difficult for found in kept], crowd=[found.crowd for found in kept],
                          areas=areas if len(areas) == len(kept) else None)

    def description(self) -> Json:
        """Return what defines the data set beside its files."""
        return {"kind": self.kind, "splits": list(self._splits), "classes": list(self._asked), "invalid": self._invalid}

    def check(self) -> list[str]:
        """Check every image's header and every object; see ``Dataset.check``."""
        found = Findings()
        for image_id in self.ids:
            try:
                # Objects first: in an annotation without a size, the size is read from the image and fails but once.
                for each in self._judged(image_id):
                    if each.problem:
                        found.unusable.append(f"{each.called}: {each.problem}")
                    elif each.warning:
                        found.warnings.append(f"{each.called}: {each.warning}")
                path = self._path(image_id)
                compare_size(path, check_image(path), self.size(image_id))
            except DataError as error:
                found.broken.append(str(error))
        whole, hint = self._as_a_whole()
        found.unusable[:0], found.warnings[:0] = whole.unusable, whole.warnings
        return found.verdict(self.name, self._invalid, hint)


@dataclass
class Findings:
    """What a check has found so far: files that cannot be read, objects that cannot be used, and mere warnings."""

    broken: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def verdict(self, name: str, invalid: str, hint: str = "") -> list[str]:
        """Return the warnings, or raise the first problem with the number of others; ``hint`` is about the objects."""
        if invalid == "leave-out":
            left_out = [f"{problem}; the object is left out" for problem in self.unusable]
            hints = [f"{name}: {hint}"] if hint else []
            problems, warnings = self.broken, hints + left_out + self.warnings
        else:
            advice = f" ({hint})" if hint else ""
            problems = self.broken + [f"{problem}{advice}: {LEAVE_OUT}" for problem in self.unusable]
            warnings = self.warnings
        if not problems:
            return warnings
        others = len(problems) - 1  # one line names the first; who corrects it will be told the next
        raise DataError(problems[0] + (f"; {others} more problem{'s'[: others > 1]} in {name}" if others else ""))


def below(folder: Path, name: str) -> Path:
    """Return folder / name; DataError when the spelling of the name leads out of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(f"{name!r} leads out of {folder}: name a file below that folder")
    return folder / name


def inside(root: Path, folder: Path, name: str) -> Path:
    """Return folder / name for a name that a file gives; DataError when it leads out, be it through a link.

    What it leads to must lie in the folder or in the data root. These two may themselves be links.
    """
    path = below(folder, name)
    # Only a link between the two can lead out, and few paths have any: the others are not resolved.
    steps = [path, *path.parents][: len(path.parts) - len(folder.parts)]
    if not any(step.is_symlink() for step in steps):
        return path
    real = path.resolve()
    if not (real.is_relative_to(folder.resolve()) or real.is_relative_to(root.resolve())):
        raise DataError(f"{path} leads out of the data root to {real}: put the file itself there")
    return path


def read_image(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return RGB [H, W, 3] of an image of the annotated (width, height).

    Grey, palette and CMYK images become RGB, transparency is dropped. EXIF orientation is ignored, because
    annotations count raw pixels. DataError when the file is missing, truncated, or of another size.
    """
    with _opened(path) as image:
        compare_size(path, image.size, size)
        return _rgb(image)


def read_upright(path: Path) -> NDArray[np.uint8]:
    """Return RGB [H, W, 3] of any image, as it is displayed: turned as its EXIF orientation says.

    Colours are those of ``read_image``. DataError when the file is missing, truncated or of another format.
    """
    from PIL import ImageOps

    with _opened(path, PHOTOGRAPHS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    import numpy as np

    if "transparency" in image.info:  # straight to RGB, Pillow would warn of palettes with alpha values
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))  # (H, W, 3)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) from the header; DataError when it cannot be read."""
    with _opened(path) as image:
        return image.size


def check_image(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image that is all there; decodes only where the end marker is not near the end."""
    with _opened(path) as image:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            complete = _END_MARKERS[image.format or "JPEG"] in file.read()
        if not complete:  # cut off, or followed by bytes of something else: decoding tells
            image.load()
        return image.size


def compare_size(path: Path, actual: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Raise DataError when the image is not of the annotated (width, height)."""
    if actual == annotated:
        return
    swapped = ", width and height swapped" if actual == annotated[::-1] else ""
    raise DataError(f"{path} has {actual[0]} x {actual[1]} pixels, its annotation says {annotated[0]} x {annotated[1]}"
                    f"{swapped}: correct the annotation, or bring the image it was made for")


@contextmanager
def _opened(path: Path, formats: tuple[str, ...] = ("JPEG", "PNG")) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=formats) as image:
            if image.mode[0] in "IF":
                raise DataError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
            yield image
    except FileNotFoundError:
        raise DataError(f"{path} is missing: bring the image, or take it off its list") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is neither a {' nor a '.join(formats)} image: replace it") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it") from error
