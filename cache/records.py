"""What an artifact was made from: the record beside it, which decides whether it is still valid."""
# A record is written after its artifact. An artifact without one, or with one that cannot be read, is made again.

import dataclasses
import json
import logging
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from cache.files import write_json_atomic

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

logger = logging.getLogger("altopt")

FORMAT = "altopt record"
FORMAT_VERSION = 1
SHA256_DIGITS = 64

# Names that settings and facts had in earlier versions: what those wrote is read under today's names.
RENAMED = {
    "per_picture": "per_image", "norm_pictures": "norm_images", "pictures": "images",
    "pictures_found": "images_found", "pictures_without_rois": "images_without_rois",
    "seconds_per_picture": "seconds_per_image", "proposals_per_picture": "proposals_per_image",
}
RENAMED_VALUES = {("outputs", "draw-anew"): "re-initialise"}  # by name: a text such as a folder may be like an old word
# Settings that earlier versions did not have, with what they did.
ADDED: dict[str, JSON] = {"visits": 0.0, "data.exif": "error", "data.box_format": "inclusive-1"}


def plain(value: object) -> Any:
    """Return ``value`` in the types that JSON gives back, so that what is written equals what is read.

    Dataclasses and mappings become dicts, tuples lists, numpy scalars numbers, paths and non-finite floats text.
    Raises TypeError for anything else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{type(key).__name__} cannot be recorded as a name: {key!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} cannot be recorded: {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Where an artifact comes from; ``config`` and ``metrics`` are made ``plain``."""

    artifact: str  # "M1"
    stage: str  # the name of the function that made it
    version: int  # of that stage's code
    inputs: dict[str, str]  # artifact -> SHA-256
    config: Mapping[str, JSON]
    sha256: str  # of the artifact itself
    size: int  # bytes
    seconds: float  # what it took
    versions: dict[str, str]  # package -> version
    data: str | None = None  # digest of the data set, where the stage reads one
    given: str | None = None  # where the artifact came from, when no stage of this run made it
    metrics: Mapping[str, JSON] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", plain(self.config))
        object.__setattr__(self, "metrics", plain(self.metrics))


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` to ``path`` at once and for good (see ``files.atomic_path``)."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **fields})


def read_record(path: Path) -> Record | None:
    """Return the record at ``path``, or None when there is none or, with a line in the log, when it is not a record."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError("another kind of file")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this altopt reads {FORMAT_VERSION}")
        # Looked at one by one: a record may come from another machine, or from someone's editor.
        for name, kinds in _KINDS.items():
            if name in values and not isinstance(values[name], kinds):
                raise ValueError(f"{name} is {values[name]!r}")
        record = Record(**values | {name: renamed(values[name]) for name in ("config", "metrics") if name in values})
        if not all(isinstance(text, str) for text in [*record.inputs.values(), *record.versions.values()]):
            raise ValueError("an input or a version is not a text")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not a record (%s): its artifact counts as not made", path, error)
        return None


def renamed(values: JSON) -> Any:
    """Return what an earlier version wrote with the names of today, in nested mappings too (see ``RENAMED``)."""
    if not isinstance(values, Mapping):
        return values
    # What stands below "classes" are names of the data set's own.
    return {RENAMED.get(name, name): value if name == "classes" else
            RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else renamed(value)
            for name, value in values.items()}


def differences(old: Mapping[str, JSON], new: Mapping[str, JSON]) -> list[str]:
    """Return in words what tells ``new`` from ``old``, nested mappings as dotted names; empty when they are equal."""
    # As ``plain`` values, as they are read back: a tuple equals a list, 1 equals 1.0, but True does not equal 1.
    before, after = dict(_flat(plain(old))), dict(_flat(plain(new)))
    lines = []
    for name, value in after.items():
        if name not in before and name in ADDED and _same(ADDED[name], value):
            continue
        if name not in before:
            lines.append(f"{name} is new ({_words(value)})")
        elif not _same(before[name], value):
            lines.append(f"{name} was {_words(before[name])}, is {_words(value)}")
    return lines + [f"{name} was dropped (it was {_words(before[name])})" for name in before if name not in after]


_KINDS: dict[str, type | types.UnionType] = {
    **dict.fromkeys(("artifact", "stage", "sha256"), str),
    **dict.fromkeys(("version", "size"), int),
    **dict.fromkeys(("inputs", "config", "versions", "metrics"), dict),
    **dict.fromkeys(("data", "given"), str | None),
    "seconds": int | float,
}


def _flat(values: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _same(old: JSON, new: JSON) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def _words(value: JSON) -> str:
    if isinstance(value, str) and len(value) == SHA256_DIGITS and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}..."
    return json.dumps(value, ensure_ascii=False)
