"""voc07-mini: 1,600 photographs of VOC 2007's *test* archive at shorter side 300, with a split of their own.

Their annotations are scaled with them. The lists of ids are in ``voc07_mini.txt``.
"""

import io
import xml.etree.ElementTree as ET
from pathlib import Path

from altopt.errors import DataError

SHORT_SIDE = 300
QUALITY = 85  # of JPEG
LISTS = Path(__file__).with_suffix(".txt")


def lists() -> dict[str, list[str]]:
    """Return {list: image ids}: train, val, trainval, test; each in the ids' order."""
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for line in LISTS.read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        found[name] += [f"{int(number):06d}" for number in numbers.split()]
    return found | {"trainval": sorted(found["train"] + found["val"])}


def ids() -> set[str]:
    """Return the ids of all its images."""
    return {image_id for members in lists().values() for image_id in members}


def shrink(folder: Path) -> None:
    """Make an unpacked VOC2007 folder, which holds the images of all lists, the small one; raise DataError."""
    for image_id in sorted(ids()):
        annotation = folder / f"Annotations/{image_id}.xml"
        try:
            size, new_size = _shrink_image(folder / f"JPEGImages/{image_id}.jpg")
            annotation.write_bytes(_scale_annotation(annotation.read_bytes(), size, new_size))
        except (OSError, ET.ParseError, ValueError) as error:
            raise DataError(f"image {image_id} of voc07-mini cannot be made from the archive ({error}): bring VOC "
                            "2007's official test archive") from error
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    for name, members in lists().items():
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{image_id}\n" for image_id in members))


def _shrink_image(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Replace an image by the small one; return (width, height) before and after."""
    from PIL import Image  # heavy for commands that fetch nothing

    content = io.BytesIO()
    with Image.open(path) as image:
        size, scale = image.size, SHORT_SIDE / min(image.size)
        new_size = (round(size[0] * scale), round(size[1] * scale))
        small = image.convert("RGB").resize(new_size, Image.Resampling.BICUBIC)
    small.save(content, "JPEG", quality=QUALITY, optimize=True)
    path.write_bytes(content.getvalue())
    return size, new_size


def _scale_annotation(content: bytes, size: tuple[int, int], new_size: tuple[int, int]) -> bytes:
    """Return an annotation with its size and every box, parts included, in the small image's pixels.

    Pixels are counted from 1 and inclusive: the left edge of pixel v lies at v - 1, its right one at v. Edges are
    scaled by their axis and rounded (half to even), and counted as before.
    """
    root = ET.fromstring(content)
    for side, value in zip(("width", "height"), new_size, strict=True):
        _element(root, f"size/{side}").text = str(value)
    for box in root.iter("bndbox"):
        for axis, before, after in zip("xy", size, new_size, strict=True):
            scale = after / before
            low, high = _element(box, f"{axis}min"), _element(box, f"{axis}max")
            low.text = str(round((float(low.text or "") - 1) * scale) + 1)
            high.text = str(round(float(high.text or "") * scale))
    return ET.tostring(root)


def _element(parent: ET.Element, path: str) -> ET.Element:
    found = parent.find(path)
    if found is None:
        raise ValueError(f"no {path} in its annotation")
    return found

