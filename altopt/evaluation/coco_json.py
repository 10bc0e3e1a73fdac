"""Checked reading of COCO json: the fields that ground truth and detections have in common.

Image and category ids may be whole numbers or texts; they are compared as texts, so 7 and "7" are the same id.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from altopt.datasets.dataset import Json, as_flag
from altopt.errors import AltoptError

JsonId = int | str
LARGEST_COORDINATE = 1e9  # far beyond any image, and small enough for areas to stay finite


@dataclass(frozen=True)
class JsonFile:
    """A json file, and the class of error that a problem in it raises: one line with file, entry and cause."""

    path: Path
    error: type[AltoptError]

    def load(self) -> object:
        """The parsed document. Raises ``error`` when the file cannot be read or is not JSON."""
        try:
            return json.loads(self.path.read_bytes())
        except OSError as cause:
            raise self.error(f"{self.path} cannot be read ({cause.strerror}): check the path") from cause
        except (ValueError, RecursionError) as cause:
            raise self.error(f"{self.path} is not JSON ({cause}): export it again") from cause

    def entries(self, entries: object, name: str) -> Iterator[tuple[str, Json]]:
        """Each entry of a list of objects with its place in the file, such as ``annotations[3]``."""
        if not isinstance(entries, list):
            raise self.error(f"{self.path}: {name} is missing or not a list: COCO json expects a list of objects")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self.problem(f"{name}[{index}]", f"is {reprlib.repr(entry)}: COCO json expects an object")
            yield f"{name}[{index}]", entry

    def key(self, place: str, entry: Json, field: str) -> str:
        """An id as text."""
        value = entry.get(field)
        if isinstance(value, bool) or not isinstance(value, int | str):  # to Python, true is the whole number 1
            raise self.problem(place, f"has {field} {reprlib.repr(value)}: it must be a whole number or a text")
        return str(value)

    def known(self, place: str, entry: Json, field: str, known: Mapping[str, int]) -> str:
        """An id as text that is a key of ``known``."""
        key = self.key(place, entry, field)
        if key not in known:
            raise self.problem(place, f"names {field} {reprlib.repr(entry[field])}, which the ground truth does not "
                                      "list: remove the entry, or use the ground truth that it belongs to")
        return key

    def number(self, place: str, entry: Json, field: str) -> float:
        """A finite number."""
        value = _number(entry.get(field))
        if not math.isfinite(value):
            raise self.problem(place, f"has {field} {reprlib.repr(entry.get(field))}: it must be a finite number")
        return value

    def flag(self, place: str, entry: Json, field: str) -> bool:
        """0 or 1, also as a text or a boolean; a missing field is 0."""
        flag = as_flag(entry.get(field, 0))
        if flag is None:
            raise self.problem(place, f"has {field} {reprlib.repr(entry[field])}: it must be 0 or 1")
        return flag

    def box(self, place: str, entry: Json) -> tuple[float, float, float, float]:
        """The entry's ``bbox`` [x, y, width, height] as xyxy."""
        values = entry.get("bbox")
        has = f"has bbox {reprlib.repr(values)}"
        if not isinstance(values, list) or len(values) != 4:
            raise self.problem(place, f"{has}: it must be [x, y, width, height]")
        x, y, width, height = map(_number, values)
        if not all(abs(value) <= LARGEST_COORDINATE for value in (x, y, width, height)):  # NaN is not below it either
            raise self.problem(place, f"{has}: it must hold finite pixel coordinates")
        if width < 0 or height < 0:
            raise self.problem(place, f"{has} of negative size: it must be [x, y, width, height], not two corners in "
                                      "the wrong order")
        return x, y, x + width, y + height

    def problem(self, place: str, cause: str) -> AltoptError:
        """The error to raise about one entry."""
        return self.error(f"{self.path}: {place} {cause}")


def json_id(key: str) -> JsonId:
    """The id as JSON should hold it: "139" is written as the number 139, "000005" stays a text."""
    try:
        return int(key) if str(int(key)) == key else key
    except ValueError:
        return key


def _number(value: object) -> float:
    """The float of a JSON number, NaN for anything else, infinity for a whole number too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
