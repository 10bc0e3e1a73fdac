"""Small data sets in files for tests: images of one colour, and their objects as people's tools write them."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Box = tuple[str, int, int, int, int]  # name, xmin, ymin, xmax, ymax as VOC counts
BOXES: tuple[Box, ...] = (("cat", 3, 3, 20, 18), ("dog", 5, 5, 30, 20))
SIZE = (60, 40)


def save_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> Path:
    """An image of a colour of its own, with an EXIF orientation if it is not 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(hash_of(path.stem) >> shift & 255 for shift in (0, 8, 16))
    image = Image.new("RGB", size, colour)
    if orientation == 1:
        image.save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
    return path


def hash_of(text: str) -> int:
    return sum(ord(char) * 7919 ** (place + 1) for place, char in enumerate(text))


def xml(boxes: tuple[Box, ...] = BOXES, size: tuple[int, int] | None = SIZE, rest: str = "") -> str:
    """VOC's annotation of an image."""
    objects = "".join(
        f"<object><name>{name}</name>{rest}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>" for name, x1, y1, x2, y2 in boxes)
    words = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{words}{objects}</annotation>"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding)
    return path


def photographs(root: Path, **lists: Iterable[str]) -> Path:
    """A folder in VOC layout with a list for each word, of images called by its letters."""
    for name, ids in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{image_id}\n" for image_id in ids))
        for image_id in ids:
            save_image(root / "JPEGImages" / f"{image_id}.jpg")
            write(root / "Annotations" / f"{image_id}.xml", xml())
    return root


def beside(folder: Path, ids: str) -> Path:
    """A folder as LabelImg leaves it: each image with its XML file beside it."""
    for image_id in ids:
        save_image(folder / f"{image_id}.jpg")
        write(folder / f"{image_id}.xml", xml())
    return folder


def yolo(images: Path, labels: Path, ids: str, lines: str = "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.1 0.1\n") -> None:
    """Images and YOLO's labels."""
    for image_id in ids:
        save_image(images / f"{image_id}.jpg")
        write(labels / f"{image_id}.txt", lines)
