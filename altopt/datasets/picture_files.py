"""Pictures on disk: their pixels, their size, and whether all of a file is there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error)
_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096


def read_picture(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return RGB [H, W, 3] of a picture of the annotated (width, height).

    Grey, palette and CMYK pictures become RGB, transparency is dropped. EXIF orientation is ignored, because
    annotations count raw pixels. DataError when the file is missing, truncated, or of another size.
    """
    import numpy as np

    with _opened(path) as picture:
        compare_size(path, picture.size, size)
        if "transparency" in picture.info:  # straight to RGB, Pillow would warn of palettes with alpha values
            return np.array(picture.convert("RGBA").convert("RGB"))
        return np.array(picture.convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """Return (width, height) from the header; DataError when it cannot be read."""
    with _opened(path) as picture:
        return picture.size


def check_picture(path: Path) -> tuple[int, int]:
    """Return (width, height) of a picture that is all there; decodes only where the end marker is not near the end."""
    with _opened(path) as picture:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            complete = _END_MARKERS[picture.format or "JPEG"] in file.read()
        if not complete:
            picture.load()
        return picture.size


def compare_size(path: Path, actual: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Raise DataError when the picture is not of the annotated (width, height)."""
    if actual == annotated:
        return
    swapped = ", width and height swapped" if actual == annotated[::-1] else ""
    raise DataError(
        f"{path} has {actual[0]} x {actual[1]} pixels, its annotation says {annotated[0]} x {annotated[1]}{swapped}: "
        "correct the annotation, or bring the picture it was made for"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            if picture.mode[0] in "IF":
                raise DataError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
            yield picture
    except FileNotFoundError:
        raise DataError(f"{path} is missing: bring the picture, or take it off its list") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is neither a JPEG nor a PNG picture: replace it") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it") from error
