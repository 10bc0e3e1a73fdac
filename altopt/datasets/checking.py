"""What a look at a data set finds, and what is made of it: one error, a list of everything, a line for each split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from altopt.config import NetworkConfig
from altopt.errors import DataError
from altopt.extents import input_size, scale_of, shortest_side

Severity = Literal["problem", "warning"]
NAMED = 3  # files or classes that one line names; it counts the others
LEAKS = "images in both splits"
OTHER_CLASSES = "objects of other classes"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong: ``text`` names it, the cause and the remedy in one line.

    ``kind`` is the rule, by which a list is grouped; ``file`` and ``object`` say where, as far as there is one place.
    """

    kind: str
    text: str
    severity: Severity = "problem"
    file: str = ""
    object: str = ""


class FileError(DataError):
    """A file that cannot be used, with the kind of what is wrong with it."""

    def __init__(self, kind: str, file: Path, text: str) -> None:
        super().__init__(text)
        self.kind, self.file = kind, file


def found(error: DataError) -> Finding:
    """Return an error as a finding."""
    if isinstance(error, FileError):
        return Finding(error.kind, str(error), file=str(error.file))
    return Finding("data set", str(error))


@dataclass
class Look:
    """What a look at every image and object of a split has found; objects are those that can be used."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    images: int = 0
    empty: int = 0  # images without any object
    size_of: dict[str, tuple[int, int]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)  # of images, by id, where they lie in files
    classes: dict[str, int] | None = field(default_factory=dict)  # with their objects; None: nobody has counted them
    difficult: int = 0
    crowd: int = 0

    @property
    def objects(self) -> int:
        """How many objects there are, difficult and crowd ones too."""
        return sum((self.classes or {}).values())

    @property
    def counted(self) -> int:
        """How many objects train a network and are asked for in scoring."""
        return self.objects - self.difficult - self.crowd

    @property
    def problems(self) -> list[Finding]:
        """What keeps the split from being used."""
        return [each for each in self.findings if each.severity == "problem"]

    def verdict(self) -> list[str]:
        """Return the warnings, or raise the first problem with the number of others in one DataError."""
        if problems := self.problems:
            others = len(problems) - 1
            more = f"; {others} more problem{'s'[: others > 1]} in {self.name} (altopt check-data lists all)"
            raise DataError(problems[0].text + (more if others else ""))
        return [each.text for each in self.findings]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers, JSON-able."""
        widths, heights = zip(*self.size_of.values(), strict=True) if self.size_of else ((), ())
        return {
            "name": self.name, "images": self.images, "images_without_objects": self.empty, "objects": self.objects,
            "classes": self.classes, "difficult": self.difficult, "crowd": self.crowd,
            "width": [min(widths), max(widths)] if widths else None,
            "height": [min(heights), max(heights)] if heights else None,
        }

    def line(self) -> str:
        """Return the numbers as one line."""
        parts = [f"{self.name}: {_count(self.images, 'image')}"]
        if self.size_of:
            widths, heights = zip(*self.size_of.values(), strict=True)
            parts[0] += f" of {_range(widths)} x {_range(heights)}"
        if self.classes is not None:
            by_class = ", ".join(f"{name} {number}" for name, number in self.classes.items() if number)
            parts.append(_count(self.objects, "object") + (f" ({by_class})" if by_class else ""))
            parts += [f"{number} {what}" for number, what in (
                (self.difficult, "difficult"), (self.crowd, "crowd")) if number]
            parts += [f"{_count(self.empty, 'image')} without any"] if self.empty else []
        return ", ".join(parts)


def look_deeper(look: Look, split: Literal["train", "test"], frames: Sequence[NetworkConfig]) -> None:
    """Add what is found of a split as a whole: nothing to learn from or to score, images that no network can take.

    ``frames`` are the network in each frame that a stage sees the images in.
    """
    look.findings += too_thin(look, frames)
    if look.classes is None or look.problems:
        return
    if not look.counted:
        why = f"{look.objects} objects, all of them difficult or crowds" if look.objects else "no object"
        if not look.objects and any(each.kind == OTHER_CLASSES for each in look.findings):
            why += " of the classes that data.classes names"
        if split == "train":
            look.findings.append(Finding("nothing to train on", f"{look.name} has nothing to train on, {why}: "
                                         "annotate some, or choose another split"))
        else:
            look.findings.append(Finding("nothing to score", f"{look.name} has nothing that scoring asks for, {why}: "
                                         "every score will be undefined (-)", "warning"))
    elif without := [name for name, number in look.classes.items() if not number]:
        what = "to learn from" if split == "train" else "to score"
        look.findings.append(Finding("classes without objects", f"{look.name} has no object {what} of "
                                     f"{some(without)}", "warning"))


def too_thin(look: Look, frames: Sequence[NetworkConfig]) -> list[Finding]:
    """Return a problem for each image that is too small for the network in one of ``frames``."""
    def scaled_to(frame: NetworkConfig, size: tuple[int, int]) -> tuple[int, int]:
        return input_size(size, scale_of(size, frame.short_side, frame.max_side))

    findings = []
    thin = {size: frame for size in set(look.size_of.values()) for frame in frames
            if min(scaled_to(frame, size)) < shortest_side(frame.name)}
    for image_id, size in look.size_of.items():
        if size in thin:
            frame, where = thin[size], look.paths.get(image_id, image_id)
            scaled = scaled_to(frame, size)
            findings.append(Finding(
                "image too thin for the network", f"{where} has {size[0]} x {size[1]} pixels, scaled {scaled[0]} x "
                f"{scaled[1]}, and {frame.name} takes no side below {shortest_side(frame.name)}: crop it, take it off "
                "its list, or raise network.max_side", file=str(where)))
    return findings


def compare_splits(train: Look, test: Look, digest: Callable[[Path], str]) -> list[Finding]:
    """Return what is found when both splits are known: images in both, and names of classes that look alike.

    ``digest`` gives the hash of a file; it is asked for only where files of both splits are equally long.
    """
    names = Counter(train.classes or {})
    names.update(test.classes or {})
    return [*_leaks(train, test, digest), *_alike(names)]


def _leaks(train: Look, test: Look, digest: Callable[[Path], str]) -> list[Finding]:
    paths = {path.resolve() for path in train.paths.values()}
    by_length: dict[int, list[Path]] = defaultdict(list)
    for path in train.paths.values():
        if path.is_file():
            by_length[path.stat().st_size].append(path)
    leaks: list[tuple[Path, Path]] = []
    for path in test.paths.values():
        if path.resolve() in paths:
            leaks.append((path, path))
        elif path.is_file() and (equally_long := by_length.get(path.stat().st_size)):
            mine = digest(path)
            leaks += [(path, other) for other in equally_long if digest(other) == mine][:1]
    if not leaks:
        return []
    path, other = leaks[0]
    first = f"{path}" if path == other else f"{path}, the same bytes as {other}"
    return [Finding(LEAKS, f"{len(leaks)} of {test.images} test images are training images too, the first is {first}: "
                    "scores will say little about new images; take them out of one split", "warning", str(path))]


def _alike(names: Counter[str]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups["".join(filter(str.isalnum, name.casefold())) or name].append(name)
    return [Finding("class names that differ by case only", "the classes "
                    + " and ".join(f'"{name}" ({_count(names[name], "object")})' for name in group)
                    + " differ by case or spacing only: spell them alike if they are one", "warning")
            for group in groups.values() if len(group) > 1]


def some(names: Sequence[object], number: int = NAMED) -> str:
    """Return the first names, and how many others there are."""
    others = len(names) - number
    return ", ".join(map(str, names[:number])) + (f" and {others} more" if others > 0 else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s'[: number != 1]}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
