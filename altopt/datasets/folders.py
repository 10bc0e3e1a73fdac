"""The files of a folder by image id."""

import os
import unicodedata
from functools import cached_property
from pathlib import Path

from altopt.datasets.checking import FileError
from altopt.datasets.dataset import IMAGE_SUFFIXES
from altopt.datasets.on_disk import IMAGE_FORMATS, inside, short

# What an image may be called that is not read: a hint at it is better than that it is missing.
OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".cr2", ".nef", ".dng", ".psd")


class FilesById:
    """The files of one folder by image id, which is their name without the ending; endings are of either case."""

    def __init__(self, root: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
        self._root, self.folder, self._suffixes = root, folder, suffixes

    def __getitem__(self, image_id: str) -> Path:
        found = self.names.get(image_id, [])
        if len(found) != 1:
            raise FileError("missing or doubled file", self.folder, self._why(image_id, len(found)))
        name, is_link = found[0]
        return inside(self._root, self.folder, name) if is_link else self.folder / name

    def _why(self, image_id: str, number: int) -> str:
        if number:
            return f"{self.folder}: {number} files are called {image_id!r}: leave one"
        if self._suffixes == IMAGE_SUFFIXES and (others := [
                name for suffix in OTHER_SUFFIXES for name in (image_id + suffix, image_id + suffix.upper())
                if (self.folder / name).is_file()]):
            return f"{self.folder / others[0]} is not a {IMAGE_FORMATS} image by its name: convert it"
        sort = "image" if self._suffixes == IMAGE_SUFFIXES else f"{self._suffixes[0][1:]} file"
        alike = self._by_folded_name.get(_folded(image_id))
        hint = "" if alike is None else f" ({short(alike)!r} differs in capitals or in how accents are spelled)"
        return (f"{self.folder}: no {sort} is called {short(image_id)!r}{hint}, as is asked for: bring it, or take the "
                "id off its list")

    @cached_property
    def _by_folded_name(self) -> dict[str, str]:
        return {_folded(name): name for name in self.names}

    @cached_property
    def names(self) -> dict[str, list[tuple[str, bool]]]:
        """By id the names of files, and whether each is a link."""
        names: dict[str, list[tuple[str, bool]]] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (a Path for each takes five times longer)
                    if suffix.lower() in self._suffixes and not entry.name.startswith("."):
                        names.setdefault(stem, []).append((entry.name, entry.is_symlink()))
        except OSError as error:
            raise FileError("missing folder", self.folder, f"{self.folder} cannot be listed ({error.strerror}): bring "
                            "it, or correct the data root") from error
        return names


def _folded(name: str) -> str:
    """Return a name without what tells equal-looking ones apart: capitals, and accents in one character or in two."""
    return unicodedata.normalize("NFC", name).casefold()
