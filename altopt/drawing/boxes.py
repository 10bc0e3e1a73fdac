"""Boxes with labels on an image: detections, proposals, ground truth, whatever a caller has. It knows none of them.

Boxes are continuous xyxy in pixels of the image. N is the number of boxes.
"""

import colorsys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]  # RGB
Area = tuple[float, float, float, float]  # x1, y1, x2, y2

HUES = 24
SHADES = ((0.95, 0.95), (0.5, 1.0), (0.95, 0.55))  # saturation and value: strong, light, dark
CHANNELS = np.sqrt((2, 4, 3))  # how much a difference in red, green, blue is seen, about
FONT_SHARE, LINE_SHARE = 1 / 45, 1 / 300  # of the image's longer side: what a screen shows of it is about one size
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # of the system; Pillow's own has few letters
SMALLEST_FONT = 11  # pixels; below that letters cannot be told apart


class Field(NamedTuple):
    """A label as it is drawn: where, what of it, and the colour behind it."""

    area: Area
    text: str
    colour: Colour


def class_colour(index: int) -> Colour:
    """Return the colour of a class by its index: always the same, and unlike those of all classes before it."""
    palette = _palette()
    return palette[index % len(palette)]


@cache
def _palette() -> list[Colour]:
    """Return colours, each as far as can be from the nearest of those before it."""
    every = np.array([colorsys.hsv_to_rgb(hue / HUES, *shade) for shade in SHADES for hue in range(HUES)])  # (C, 3)
    seen = every * CHANNELS
    order = [0]
    nearest = np.full(len(every), np.inf)  # (C,) distance to the nearest of those that are chosen
    while len(order) < len(every):
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[order[-1]], axis=1))
        order.append(int(nearest.argmax()))
    return [(red, green, blue) for red, green, blue in (every[order] * 255).round().astype(int).tolist()]


def draw_boxes(image: NDArray[np.uint8], boxes: NDArray[np.floating], labels: Sequence[str],
               colours: Sequence[Colour]) -> Image.Image:
    """Return a copy of an image, uint8 RGB [H, W, 3], with boxes [N, 4] drawn on it, the first on top.

    Each has its colour, and its label in a field of that colour; an empty label has no field. Lines and letters grow
    with the image. A label stands above its box if there is room, and never leaves the image: one that is wider is cut
    short. Where labels cannot but cover each other, the first is on top.
    """
    drawn = Image.fromarray(image).copy()
    draw = ImageDraw.Draw(drawn)
    longer = max(drawn.size)
    line = max(2, round(longer * LINE_SHARE))
    font = _font(max(SMALLEST_FONT, round(longer * FONT_SHARE)))
    each = list(zip(boxes.tolist(), labels, colours, strict=True))
    for box, _, colour in reversed(each):
        draw.rectangle(_pixels(box), outline=colour, width=line)
    fields: list[Field] = []
    for box, label, colour in each:
        if label:
            fields.append(_placed(box, label, colour, font, drawn.size, fields))
    for area, text, colour in reversed(fields):
        dark = np.dot(colour, (0.299, 0.587, 0.114)) < 140
        draw.rectangle((*area[:2], area[2] - 1, area[3] - 1), fill=colour)
        draw.text((area[0] + _margin(font), area[1]), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
    return drawn


def _pixels(box: Sequence[float]) -> Area:
    """Return the first and the last pixel, in each direction, that a box covers: at least one."""
    x1, y1, x2, y2 = (round(side) for side in box)
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def _placed(box: Sequence[float], label: str, colour: Colour, font: ImageFont.FreeTypeFont, size: tuple[int, int],
            fields: Sequence[Field]) -> Field:
    """Return where a label stands and what of it, covering none of the fields before it if there is such a place."""
    text, margin = label, _margin(font)
    while len(text) > 1 and font.getlength(text) + 2 * margin > size[0]:
        text = f"{text.removesuffix('…')[:-1]}…"
    width, height = font.getlength(text) + 2 * margin, sum(font.getmetrics())
    x1, y1, x2, y2 = box
    corners = [(x, y) for x in (x1, x2 - width) for y in (y1 - height, y1, y2)]
    areas = [_inside(corner, (width, height), size) for corner in corners]
    free = (each for each in areas if not any(_overlap(each, field.area) for field in fields))
    return Field(next(free, areas[0]), text, colour)


def _margin(font: ImageFont.FreeTypeFont) -> int:
    return max(1, sum(font.getmetrics()) // 8)


def _inside(corner: tuple[float, float], field: tuple[float, float], size: tuple[int, int]) -> Area:
    """Return the place of a field nearest to a corner at which the image holds it whole."""
    x, y = (max(0.0, min(at, side - length)) for at, length, side in zip(corner, field, size, strict=True))
    return x, y, x + field[0], y + field[1]


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@lru_cache(maxsize=8)  # a folder of photographs has few sizes
def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as Pillow's own wheels have it
    return font
