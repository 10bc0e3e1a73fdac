"""What data sets in files have in common: reading images, judging objects one by one, and a look at both."""

from __future__ import annotations

import difflib
import os
import re
import stat
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from altopt.datasets.checking import OTHER_CLASSES, FileError, Finding, Look, Severity, found
from altopt.datasets.dataset import DataConfig, Exif, Json, Objects, VocBoxes
from altopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error)
_ORIENTATION = 0x0112
_TURNS = {
    2: ("FLIP_LEFT_RIGHT", "mirrored"), 3: ("ROTATE_180", "upside down"),
    4: ("FLIP_TOP_BOTTOM", "mirrored top to bottom"),
    5: ("TRANSPOSE", "mirrored, on its side"), 6: ("ROTATE_270", "on its side"),
    7: ("TRANSVERSE", "mirrored, on its side"), 8: ("ROTATE_90", "on its side"),
}  # of EXIF's orientations, how the stored pixels become what is shown
_SIDEWAYS = (5, 6, 7, 8)
_BACK = {6: 8, 8: 6}  # what undoes an orientation, where that is another one
_DEEP = re.compile(r";16[A-Z]")  # Pillow's names of layouts with 16 bits a channel: RGB;16B and the like
_LONGEST = 60  # characters of a value that a message shows
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096  # of a file, in which its end marker lies even if a few bytes of something else follow
OUTSIDE, UNKNOWN_CLASS, NO_AREA = "box outside the image", "unknown class", "box without area"
IMAGE_FORMATS = "JPEG, PNG, WebP, BMP or TIFF"
LEAVE_OUT = 'correct the file, or set data.invalid = "leave-out" to do without such objects'


class Fault(NamedTuple):
    """What is wrong with an object: the kind, by which findings are grouped, the rest in words, and what helps."""

    kind: str
    text: str
    remedy: str = LEAVE_OUT


NO_NUMBERS = Fault("box that is not four numbers", "its box is not four numbers")


@dataclass(frozen=True)
class Judged:
    """An annotated object: its file, what messages call it there, and why it cannot be used; else what it is.

    ``box`` is x1, y1, x2, y2, continuous, in pixels of the image; ``area`` is None where none is annotated.
    ``left_out`` is the name of a class that is not asked for. ``normalised``: the annotation counts in shares of the
    image, in a format that counts in pixels.
    """

    file: Path
    called: str
    problem: Fault | None = None
    warning: Fault | None = None
    box: tuple[float, ...] = ()
    label: int = -1
    difficult: bool = False
    crowd: bool = False
    area: float | None = None
    left_out: str | None = None
    normalised: bool = False

    def finding(self, fault: Fault, severity: Severity, remedy: str = "") -> Finding:
        """Return what is wrong with it as a finding."""
        return Finding(fault.kind, f"{self.file}, {self.called}: {fault.text}{remedy}", severity, str(self.file),
                       self.called)


class OnDiskDataset(ABC):
    """One or several splits below ``root``; a format says where the images lie, and judges the objects.

    ``config`` is how the files are read, ``train`` the data set trained on. With ``invalid`` "leave-out" objects that
    cannot be used are left out, else they are a DataError.
    """

    kind: str

    def __init__(self, root: Path, splits: tuple[str, ...], *, classes: tuple[str, ...] = (), invalid: str = "error",
                 exif: Exif = "error", box_format: VocBoxes = "inclusive-1", train: Self | None = None) -> None:
        self.name = f"{self.kind.upper()} {'+'.join(map(self._called, splits))}"
        self._root, self._splits, self._asked, self._invalid, self._train = root, splits, classes, invalid, train
        self._exif, self._box_format = exif, box_format

    @classmethod
    def opened(cls, config: DataConfig, split: Literal["train", "test"], root: Path) -> Self:
        """Return the data set of one split, without reading anything yet."""
        trained = cls(root, config.train, classes=config.classes, invalid=config.invalid, exif=config.exif,
                      box_format=config.box_format)
        if split == "train":
            return trained
        return cls(root, config.test, classes=config.classes, invalid=config.invalid, exif=config.exif,
                   box_format=config.box_format, train=trained)

    def _called(self, split: str) -> str:
        """Return what messages call a split."""
        return split.strip("./").rpartition("/")[2] or "images"

    @property
    @abstractmethod
    def ids(self) -> tuple[str, ...]:
        """Image ids in the order of the lists."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names without background."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """1, 2, ... where a format has no ids of its own, or begins with 0."""
        return tuple(range(1, len(self.classes) + 1))

    def coco_image_id(self, image_id: str) -> int | str:
        """Return the id itself, where a format has no other."""
        return image_id

    @abstractmethod
    def size(self, image_id: str) -> tuple[int, int]:
        """Return the annotated (width, height), or the image's own where none is annotated."""

    @abstractmethod
    def path(self, image_id: str) -> Path:
        """Return where an image lies."""

    @abstractmethod
    def _judged(self, image_id: str) -> Iterator[Judged]:
        """Yield every annotated object of an image."""

    @property
    def _known(self) -> tuple[str, ...]:
        """The classes, also where an annotation that cannot be read keeps ``classes`` from being known."""
        return self.classes

    def _as_a_whole(self) -> Iterator[Finding]:
        """Yield what is found beside single objects and images, once they are looked at."""
        yield from ()

    def _hints(self) -> dict[str, str]:
        """Return what explains faults, by their kind, once all objects are looked at."""
        return {}

    def image(self, image_id: str) -> NDArray[np.uint8]:
        """Return RGB [H, W, 3]; DataError when the image is unreadable or of another size than annotated."""
        return read_image(self.path(image_id), self.size(image_id), self._exif)

    def objects(self, image_id: str) -> Objects:
        """Return the objects, without those that cannot be used if these may be left out; else DataError."""
        kept: list[Judged] = []
        for each in self._judged(image_id):
            if each.problem is None:
                kept += [each] if each.left_out is None else []
            elif self._invalid != "leave-out":
                raise DataError(f"{each.file}, {each.called}: {each.problem.text}: {each.problem.remedy}")
        areas = [each.area for each in kept if each.area is not None]
        return Objects.of([each.box for each in kept], [each.label for each in kept],
                          difficult=[each.difficult for each in kept], crowd=[each.crowd for each in kept],
                          areas=areas if len(areas) == len(kept) else None)

    def description(self) -> Json:
        """Return what defines the data set beside its files."""
        how = {name: value for name, value, usual in (
            ("exif", self._exif, "error"), ("box_format", self._box_format, "inclusive-1")) if value != usual}
        return {"kind": self.kind, "splits": list(self._splits), "classes": list(self._asked),
                "invalid": self._invalid, **how}

    def check(self) -> list[str]:
        """Look at every image and object; return warnings, raise one DataError that names the first problem."""
        return self.look().verdict()

    def look(self) -> Look:
        """Look at every image's header and every object."""
        look = Look(self.name)
        try:
            ids, known = self.ids, self._known
        except DataError as error:
            look.findings.append(found(error))
            return look
        survey = _Survey(look, known)
        for image_id in ids:
            try:
                # Objects first: in an annotation without a size, the size is read from the image and fails but once.
                survey.add_objects(list(self._judged(image_id)))
                path = self.path(image_id)
                header = check_image(path, self._exif, self.size(image_id))
            except DataError as error:
                survey.broken.append(found(error))
                continue
            look.paths[image_id], look.size_of[image_id] = path, header.size
            if header.frames > 1:
                survey.warnings.append(Finding("several images in a file", f"{path} holds {header.frames} images: the "
                                               "first is taken", "warning", str(path)))
        whole = list(self._as_a_whole())
        look.findings += [each for each in whole if each.severity == "problem"]
        look.findings += survey.findings(self._hints(), self._invalid == "leave-out")
        look.findings += [each for each in whole if each.severity == "warning"]
        look.images = len(ids)
        return look


class _Survey:
    """What is found image by image."""

    def __init__(self, look: Look, known: tuple[str, ...]) -> None:
        self._look, self._known = look, known
        self.broken: list[Finding] = []  # files that cannot be used
        self.warnings: list[Finding] = []
        self._unusable: list[tuple[Judged, Fault]] = []
        self._normalised: list[Judged] = []
        self._left_out: Counter[str] = Counter()
        self._labels: Counter[int] = Counter()
        self._seen = 0

    def add_objects(self, objects: list[Judged]) -> None:
        """Take in the objects of one image."""
        places: dict[tuple[int, tuple[float, ...]], str] = {}
        used = 0
        for each in objects:
            if each.left_out is not None:
                self._left_out[each.left_out] += 1
                continue
            self._seen += 1
            if each.normalised:
                self._normalised.append(each)
            if each.problem is not None:
                self._unusable.append((each, each.problem))
                continue
            if each.warning is not None:
                self.warnings.append(each.finding(each.warning, "warning"))
            used += 1
            self._labels[each.label] += 1
            self._look.crowd += each.crowd
            self._look.difficult += each.difficult and not each.crowd
            first = places.setdefault((each.label, each.box), each.called)
            if first is not each.called:
                self.warnings.append(each.finding(Fault("repeated object", f"it is {first} again: leave one"),
                                                  "warning"))
        self._look.empty += not used

    def findings(self, hints: dict[str, str], leave_out: bool) -> list[Finding]:
        """Return what was found, problems first; ``hints`` explain faults of a kind."""
        self._look.classes = {name: self._labels[label] for label, name in enumerate(self._known)}
        name = self._look.name
        problems, warnings = self.broken, self.warnings
        in_shares = {(each.file, each.called) for each in self._normalised}
        if 2 * len(in_shares) >= self._seen > 0:
            first = self._normalised[0]
            problems = [*problems, Finding(
                "normalised boxes", f"{first.file}, {first.called}: the boxes of {len(in_shares)} of {self._seen} "
                f"objects in {name} lie between 0 and 1, as shares of the image: write them in pixels", "problem",
                str(first.file), first.called)]
            warnings = [each for each in warnings if (Path(each.file), each.object) not in in_shares]
        else:
            in_shares = set()
        unusable: list[Finding] = []
        for each, fault in self._unusable:
            if (each.file, each.called) in in_shares:
                continue
            if leave_out:
                unusable.append(each.finding(fault, "warning", "; the object is left out"))
            else:
                advice = f" ({hints[fault.kind]})" if fault.kind in hints else ""
                unusable.append(each.finding(fault, "problem", f"{advice}: {fault.remedy}"))
        if leave_out:
            kinds = dict.fromkeys(each.kind for each in unusable)
            general = [Finding(kind, f"{name}: {hints[kind]}", "warning") for kind in kinds if kind in hints]
            warnings = [*general, *unusable, *warnings]
        else:
            problems = [*problems, *unusable]
        if self._left_out:
            counts = ", ".join(f"{other} {number}{near(other, self._known)}"
                               for other, number in self._left_out.most_common())
            warnings = [Finding(OTHER_CLASSES, f"{name}: {self._left_out.total()} objects of classes that "
                                f"data.classes does not name are left out: {counts}", "warning"), *warnings]
        return [*problems, *warnings]


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
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: what Python makes of links in a circle
        raise DataError(f"{path} is a link that leads nowhere: put the file itself there") from None
    if not (real.is_relative_to(folder.resolve()) or real.is_relative_to(root.resolve())):
        raise DataError(f"{path} leads out of the data root to {real}: put the file itself there")
    return path


def read_text(path: Path) -> str:
    """Return a text file in UTF-8, or in UTF-16 as Windows PowerShell writes; DataError when it is in neither."""
    try:
        content = path.read_bytes()
        utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except OSError as error:
        raise FileError("unreadable file", path, f"{path} cannot be read ({error.strerror}): bring it") from error
    except UnicodeDecodeError as error:
        raise FileError("unreadable file", path, f"{path} is not a text in UTF-8 ({error.reason} at byte "
                        f"{error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise FileError("unreadable file", path, f"{path} is not a text in UTF-8, it holds zeros: save it as UTF-8")
    return text


def read_image(path: Path, size: tuple[int, int] | None, exif: Exif = "error") -> NDArray[np.uint8]:
    """Return RGB [H, W, 3] of an image of the annotated (width, height), or of any with None.

    Grey, palette and CMYK images become RGB, transparency is dropped; of several images in a file the first is taken.
    An image whose EXIF orientation turns it is turned with ``exif`` "apply", left as stored with "ignore", and
    otherwise a DataError, as is one that is missing, truncated, or of another size.
    """
    import numpy as np

    with _opened(path) as image:
        if image.format == "PNG":  # whose EXIF may stand behind the pixels
            image.load()
        turn = _turn(path, image, exif, size)
        # Straight to RGB, Pillow would warn of palettes with alpha values.
        rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        if turn is not None:
            rgb = rgb.transpose(turn)
        return np.array(rgb)  # (H, W, 3)


def image_size(path: Path, exif: Exif = "error") -> tuple[int, int]:
    """Return (width, height) from the header, turned as ``exif`` says; DataError when it cannot be read."""
    with _opened(path) as image:
        return _size(image, exif, _orientation(image))


class Header(NamedTuple):
    """What is known of an image without its pixels: (width, height), and how many images the file holds."""

    size: tuple[int, int]
    frames: int


def check_image(path: Path, exif: Exif = "error", annotated: tuple[int, int] | None = None) -> Header:
    """Return the header of an image that is all there; decodes only where the file's end does not tell.

    DataError as ``read_image``'s.
    """
    with _opened(path) as image:
        complete = _complete(path, image.format or "")
        if not complete and image.format == "PNG":
            image.load()
        _turn(path, image, exif, annotated)
        size, frames = _size(image, exif, _orientation(image)), getattr(image, "n_frames", 1)
        if not complete:  # cut off, or followed by bytes of something else: decoding tells
            image.load()
        return Header(size, 1 if image.format == "MPO" else frames)  # a camera's further images are the same one again


def _complete(path: Path, form: str) -> bool:
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        if form == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= length
        file.seek(max(0, length - _TAIL_BYTES))
        tail = file.read()
    # Where EXIF stands behind the pixels of a PNG, only decoding finds it.
    return form in _END_MARKERS and _END_MARKERS[form] in tail and not (form == "PNG" and b"eXIf" in tail)


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation of an image, 1 where none is said that has a meaning."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION)
    except (*_UNREADABLE, struct.error, LookupError, TypeError):
        return 1  # who shows the image cannot read it either
    return value if isinstance(value, int) and value in _TURNS else 1


def _size(image: Image.Image, exif: Exif, orientation: int) -> tuple[int, int]:
    width, height = image.size
    # Pillow itself turns TIFF files, and says their size so.
    if orientation in _SIDEWAYS and (image.format == "TIFF") != (exif == "apply"):
        return height, width
    return width, height


def _turn(path: Path, image: Image.Image, exif: Exif, annotated: tuple[int, int] | None) -> Image.Transpose | None:
    """Return how decoded pixels are to be turned; DataError when EXIF turns the image, or for a size not annotated."""
    orientation = _orientation(image)
    stored = _size(image, "ignore", orientation)
    shown = stored[::-1] if orientation in _SIDEWAYS else stored
    if orientation == 1 or exif != "error":
        compare_size(path, shown if exif == "apply" else stored, annotated, orientation)
        if orientation == 1 or (exif == "apply") == (image.format == "TIFF"):
            return None
        return _turns()[orientation if exif == "apply" else _BACK.get(orientation, orientation)]
    how = f"{path} has EXIF orientation {orientation} ({_TURNS[orientation][1]})"
    choice = ('set data.exif = "apply" if boxes were drawn on the image as it is shown, as annotation tools do, '
              '"ignore" if they count the stored pixels')
    if shown != stored and annotated == shown:
        choice = ('the annotation gives the size that is shown: set data.exif = "apply" ("ignore" takes the pixels as '
                  "they are stored)")
    elif shown != stored and annotated == stored:
        choice = f"the annotation gives the size that is stored: {choice}"
    raise FileError("EXIF orientation", path, f"{how}, stored {stored[0]} x {stored[1]}, shown {shown[0]} x "
                    f"{shown[1]}: {choice}")


def _turns() -> dict[int, Image.Transpose]:
    from PIL import Image

    return {orientation: Image.Transpose[name] for orientation, (name, _) in _TURNS.items()}


def compare_size(path: Path, actual: tuple[int, int], annotated: tuple[int, int] | None, orientation: int = 1) -> None:
    """Raise DataError when the image is not of the annotated (width, height)."""
    if annotated is None or actual == annotated:
        return
    swapped = ", width and height swapped" if actual == annotated[::-1] else ""
    if swapped and orientation in _SIDEWAYS:
        swapped += f", as EXIF orientation {orientation} does (data.exif)"
    says = " x ".join(map(short, annotated))
    raise FileError("image of another size", path, f"{path} has {actual[0]} x {actual[1]} pixels, its annotation says "
                    f"{says}{swapped}: correct the annotation, or bring the image it was made for")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise FileError("unreadable image", path, f"{path} is not a file: bring the image")
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF")) as image:
            # Of colour images Pillow keeps 8 bits without a word; what the file has stands in how it is decoded.
            if image.mode[0] in "IF" or any(_DEEP.search(str(tile[3])) for tile in image.tile):
                raise FileError("unreadable image", path, f"{path} has more than 8 bits a channel: convert it to 8 "
                                "bits")
            yield image
    except FileNotFoundError:
        raise FileError("missing file", path, f"{path} is missing: bring the image, or take it off its list") from None
    except UnidentifiedImageError:
        raise FileError("unreadable image", path, f"{path} is not a {IMAGE_FORMATS} image: replace it") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise FileError("unreadable image", path, f"{path} cannot be read ({error}): replace it") from error


def short(value: object) -> str:
    """Return a value of a file as messages show it: in a line, and cut where it is long."""
    text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else repr(value)
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_LONGEST])
    return text if len(text) < _LONGEST else f"{text[: _LONGEST - 3]}..."


def is_text(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON, and names of files that are none, hold half characters."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def near(name: str, known: tuple[str, ...]) -> str:
    """Return a hint at a class that a name may be meant for."""
    close = [each for each in known if each.casefold() == name.casefold()]
    close = close or difflib.get_close_matches(name, known, 1)
    return f' (is it "{close[0]}"?)' if close else ""
