"""How synthetic images are drawn: noise, and one to five filled shapes on it.

An image is the same on every machine: its randomness is PCG64's raw stream, which numpy never changes, and geometry
and colour are whole-number arithmetic, so there is no rounding that could differ.

Inside a shape, lengths are in half pixels from its centre: then the centres of its pixels are whole numbers.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIZES = (30, 180)  # least and greatest, of the longer side in pixels; a factor of 6
MAX_OBJECTS = 5
MAX_IOU = 10  # per cent, of any two boxes
MIN_VISIBLE = 80  # per cent of each shape, however many others lie on it
MIN_CONTRAST = 200  # to the mean colour beneath, summed over the channels
NOISE = ((90, 24, 20), (30, 16, 10), (10, 10, 4))  # cell in pixels; mean amplitude of all channels alike, of each alone
GRAIN = (4, 12)  # least and greatest amplitude of the noise of single pixels
TEXTURE = (24, 20)  # cell in pixels and mean amplitude of the noise on a shape

_TRIES = 20
_AXIS = 64  # a shape is turned to the direction (_AXIS, tilt), by up to 9 degrees
_MAX_TILT = 10
_WEIGHT_BITS = 5  # of the weights of interpolation, so few that its products fit into 16 bits

Box = tuple[int, int, int, int]
Mask = NDArray[np.bool_]
Planes = NDArray[np.int16]


class Dice:
    """Whole numbers from PCG64's raw stream, seeded by a text."""

    def __init__(self, text: str) -> None:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, end: int) -> int:
        """Return one of 0 .. end - 1."""
        return int(self._bits.random_raw()) % end

    def between(self, first: int, last: int) -> int:
        """Return one of first .. last."""
        return first + self.below(last - first + 1)

    def noise(self, *shape: int) -> Planes:
        """Return values -128 .. 127 of that shape."""
        count = math.prod(shape)
        words = self._bits.random_raw((count + 7) // 8).astype("<u8")  # the same bytes on a big-endian machine
        return words.view(np.int8)[:count].reshape(shape).astype(np.int16)


def draw(seed: str, shapes: Sequence[str], width: int, height: int) -> tuple[NDArray[np.uint8], list[Box], list[int]]:
    """Return pixels RGB [H, W, 3], boxes xyxy and labels of one image: noise, and one to five shapes on it."""
    dice = Dice(seed)
    canvas = Canvas(dice, width, height)
    for _ in range(dice.between(1, MAX_OBJECTS)):
        label = dice.below(len(shapes))
        canvas.add(label, shape_mask(dice, shapes[label], min(width, height)))
    pixels = np.stack(tuple(canvas.planes.clip(0, 255).astype(np.uint8)), axis=-1)  # (H, W, 3)
    return pixels, canvas.boxes, canvas.labels


class Canvas:
    """An image in the making: planes int16 [3, H, W], and for each pixel the number of the shape seen there, or 0."""

    def __init__(self, dice: Dice, width: int, height: int) -> None:
        self._dice = dice
        self._grain = dice.noise(height, width) * dice.between(*GRAIN) >> 7
        self.planes = background(dice, width, height) + self._grain
        self._owner = np.zeros((height, width), np.uint8)
        self._areas = np.zeros(1, np.int64)  # by number: pixels of the shape
        self._seen = np.zeros(1, np.int64)  # and how many of these are seen
        self.boxes: list[Box] = []
        self.labels: list[int] = []

    def add(self, label: int, mask: Mask) -> None:
        """Paint a shape somewhere where it hides not too much of the others; leave it out when there is no room."""
        height, width = mask.shape
        rows, columns = self._owner.shape
        area = int(np.count_nonzero(mask))
        for _ in range(_TRIES):
            x, y = self._dice.below(columns - width + 1), self._dice.below(rows - height + 1)
            box = (x, y, x + width, y + height)
            if any(iou_percent(box, other) > MAX_IOU for other in self.boxes):
                continue
            hidden = np.bincount(self._owner[y : y + height, x : x + width][mask], minlength=len(self._seen))
            # All shapes so far must stay recognisable; number 0 is the background.
            if (100 * (self._seen - hidden) >= MIN_VISIBLE * self._areas)[1:].all():
                self.boxes.append(box)
                self.labels.append(label)
                self._areas = np.append(self._areas, area)
                self._seen = np.append(self._seen - hidden, area)
                self._paint(box, mask, area)
                return

    def _paint(self, box: Box, mask: Mask, area: int) -> None:
        x1, y1, x2, y2 = box
        beneath = self.planes[:, y1:y2, x1:x2]
        sums = beneath.clip(0, 255).reshape(3, -1) @ mask.ravel().astype(np.float64)  # exact: whole numbers below 2^53
        colour = self._colour(sums.astype(np.int64) // area)
        cell, amplitude = TEXTURE
        texture = corner_noise(self._dice, amplitude, 1, (y2 - y1) // cell + 2, (x2 - x1) // cell + 2)
        shade = enlarge(texture, cell)[0, : y2 - y1, : x2 - x1] + self._grain[y1:y2, x1:x2]  # (h, w)
        np.copyto(beneath, colour[:, None, None] + shade, where=mask)
        self._owner[y1:y2, x1:x2][mask] = len(self.boxes)

    def _colour(self, beneath: NDArray[np.int64]) -> Planes:
        """Return a random colour [3] that stands out from the one beneath."""
        for _ in range(_TRIES):
            colour = np.array([self._dice.below(256) for _ in range(3)], np.int16)
            if abs(colour - beneath).sum() >= MIN_CONTRAST:
                return colour
        return np.where(beneath < 128, 255, 0).astype(np.int16)


def background(dice: Dice, width: int, height: int) -> Planes:
    """Return smooth noise [3, H, W] of several scales around a random colour."""
    planes = np.array([dice.between(50, 205) for _ in range(3)], np.int16)[:, None, None]
    finer_cells = [cell for cell, _, _ in NOISE[1:]] + [1]
    for (cell, shared, single), finer in zip(NOISE, finer_cells, strict=True):
        columns, rows = width // cell + 3, height // cell + 3  # one corner more than the next scale needs
        noise = corner_noise(dice, shared, 1, rows, columns) + corner_noise(dice, single, 3, rows, columns)
        planes = enlarge(planes[:, :rows, :columns] + noise, cell // finer)
    return planes[:, :height, :width]


def corner_noise(dice: Dice, amplitude: int, planes: int, rows: int, columns: int) -> Planes:
    """Return noise of a random amplitude, on average the one given."""
    return dice.noise(planes, rows, columns) * dice.below(2 * amplitude + 1) >> 7


def enlarge(planes: Planes, factor: int) -> Planes:
    """Interpolate between the corners [C, h, w] of square cells: [C, (h - 1) * factor, (w - 1) * factor]."""
    columns = interpolate(np.ascontiguousarray(planes.swapaxes(1, 2)), factor)
    return interpolate(np.ascontiguousarray(columns.swapaxes(1, 2)), factor)


def interpolate(corners: Planes, factor: int) -> Planes:
    """Put factor - 1 values between neighbours of the last axis, leaving and reaching each with slope 0."""
    rest = np.arange(factor)
    weights = ((rest * rest * (3 * factor - 2 * rest) << _WEIGHT_BITS) // factor**3).astype(np.int16)
    starts = corners[..., :-1, None]
    values: Planes = (corners[..., 1:, None] - starts) * weights
    values >>= _WEIGHT_BITS
    values += starts
    return values.reshape(*corners.shape[:-1], -1)


def shape_mask(dice: Dice, name: str, shorter_side: int) -> Mask:
    """Return the pixels [h, w] of a shape, cut tight, its longer side in SIZES, but 3/4 of the image at most.

    u and v are coordinates along the shape's direction (p, q) and across it, times the length of (p, q).
    """
    side = dice.between(SIZES[0], min(SIZES[1], 3 * shorter_side // 4))
    tilt, thickness = dice.between(-_MAX_TILT, _MAX_TILT), dice.below(101)
    p, q = ((_AXIS, tilt), (tilt, _AXIS), (-_AXIS, tilt), (tilt, -_AXIS))[dice.below(4)]
    centres = np.arange(1 - side, side, 2, dtype=np.int32)
    x, y = centres[None, :], centres[:, None]
    u, v = abs(x * p + y * q), y * p - x * q
    reach = side * (p * p + q * q) // (abs(p) + abs(q))  # of a square that, turned, is as long as asked for
    if name == "circle":
        return x * x + y * y <= side * side
    if name == "ring":
        hole = side * (45 + thickness // 5) // 100
        return (x * x + y * y <= side * side) & (x * x + y * y > hole * hole)
    if name == "square":
        return tight((u <= reach) & (abs(v) <= reach * (75 + thickness // 4) // 100))
    if name == "triangle":
        return tight((v <= reach) & (2 * u <= v + reach))
    arm = reach * (22 + thickness // 6) // 100
    return tight(((u <= arm) & (abs(v) <= reach)) | ((abs(v) <= arm) & (u <= reach)))


def tight(mask: Mask) -> Mask:
    """Cut the empty rows and columns off a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def iou_percent(a: Box, b: Box) -> int:
    """Return the intersection over union of two boxes in whole per cent, rounded up."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return -(-100 * width * height // union)
