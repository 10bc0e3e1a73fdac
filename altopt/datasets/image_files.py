"""Images on disk: their pixels, their size, and whether all of a file is there."""

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


def read_image(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return RGB [H, W, 3] of an image of the annotated (width, height).

    Grey, palette and CMYK images become RGB, transparency is dropped. EXIF orientation is ignored, because
    annotations count raw pixels. DataError when the file is missing, truncated, or of another size.
    """
    import numpy as np

    with _opened(path) as image:
        compare_size(path, image.size, size)
        if "transparency" in image.info:  # straight to RGB, Pillow would warn of palettes with alpha values
            return np.array(image.convert("RGBA").convert("RGB"))
        return np.array(image.convert("RGB"))


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
        if not complete:
            image.load()
        return image.size


def compare_size(path: Path, actual: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Raise DataError when the image is not of the annotated (width, height)."""
    if actual == annotated:
        return
    swapped = ", width and height swapped" if actual == annotated[::-1] else ""
    raise DataError(
        f"{path} has {actual[0]} x {actual[1]} pixels, its annotation says {annotated[0]} x {annotated[1]}{swapped}: "
        "correct the annotation, or bring the image it was made for"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.mode[0] in "IF":
                raise DataError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
            yield image
    except FileNotFoundError:
        raise DataError(f"{path} is missing: bring the image, or take it off its list") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is neither a JPEG nor a PNG image: replace it") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it") from error
