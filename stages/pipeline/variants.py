"""What a comparison compares: schemes as they are, or with settings of their own, from a TOML file.

    [from-fc6]                                            the name: of the table's row, and of the run folders
    scheme = "fast-rcnn"
    set = ['train_fast_rcnn.freeze=["conv*"]']            each as --set takes it; none is needed
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from altopt.errors import UsageError
from stages.pipeline.recipe import check_scheme, nearest

KEYS = ("scheme", "set")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Variant:
    """A scheme, and the settings in which it differs from the recipe; ``name`` is the scheme's where none does."""

    name: str
    scheme: str
    sets: tuple[str, ...] = ()


def plain_variants(schemes: Sequence[str]) -> list[Variant]:
    """Return the schemes as they are, each once. Raises ``UsageError`` for one that there is not."""
    return [Variant(name, check_scheme(name)) for name in dict.fromkeys(schemes)]


def read_variants(path: Path) -> list[Variant]:
    """Return the variants of a file, in its order. Raises ``UsageError``."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    if not content:
        raise UsageError(f"{path} names nothing to compare: give it tables such as [mine] with scheme = \"fast-rcnn\"")
    return [_variant(f"{path}: [{name}]", name, table) for name, table in content.items()]


def _variant(where: str, name: str, table: object) -> Variant:
    if not isinstance(table, dict):
        raise UsageError(f"{where} stands outside of a table: a file of variants has only tables")
    if not NAME.fullmatch(name):
        raise UsageError(f"{where} must be the name of a folder: use letters, digits, '-', '_' and '.'")
    for key in table:
        if key not in KEYS:
            raise UsageError(f"{where} has no field {key!r}{nearest(key, KEYS)}; its fields are {', '.join(KEYS)}")
    scheme, sets = table.get("scheme"), table.get("set", [])
    if not isinstance(scheme, str):
        raise UsageError(f'{where} does not say of which scheme it is one: add scheme = "fast-rcnn" or the like')
    if not isinstance(sets, list) or not all(isinstance(each, str) for each in sets):
        raise UsageError(f"{where}: set must be a list of texts, such as ['train_fast_rcnn.lr=0.01']")
    return Variant(name, check_scheme(scheme), tuple(sets))
