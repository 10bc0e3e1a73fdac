"""Sizes known without a picture: of one in the network's frame, and of what the conv layers make of it. No torch here.

So ``altopt plan`` can say at once how much room feature maps will take. The windows are those of altopt/backbones.py,
and tests hold them against the networks.
"""

from collections.abc import Iterable
from typing import NamedTuple

from altopt.config import NetworkConfig

VALUE_BYTES = {"float32": 4, "bfloat16": 2}


class Window(NamedTuple):
    """A layer that changes the size of a map; ``ceil`` is max pooling's ceil_mode."""

    size: int
    stride: int
    padding: int = 0
    ceil: bool = False


# Channels of the last map, and what lies between it and the picture.
LAYERS = {
    "vgg16": (512, [Window(2, 2)] * 4),
    "alexnet": (256, [Window(11, 4, 10), Window(3, 2), Window(5, 1, 2), Window(3, 2)]),
    "squeezenet1_1": (512, [Window(3, 2, 8)] + [Window(3, 2, ceil=True)] * 3),
    "small": (128, [Window(6, 2, 2)] + [Window(2, 2)] * 3),
}


def scale_of(size: tuple[int, int], short_side: int, max_side: int) -> float:
    """Return the factor that brings the shorter side to ``short_side``, unless the longer would pass ``max_side``."""
    return min(short_side / min(size), max_side / max(size))


def input_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return (width, height) of a picture of ``size`` in the input frame."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def map_shape(network: NetworkConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the last conv layer's map of a picture of (width, height) as it is stored."""
    width, height = input_size(size, scale_of(size, network.short_side, network.max_side))
    channels, windows = LAYERS[network.name]
    for window in windows:
        width, height = _after(window, width), _after(window, height)
    return channels, height, width


def maps_bytes(sizes: Iterable[tuple[int, int, int]], network: NetworkConfig, flips: bool, precision: str) -> int:
    """Return the room that the maps of pictures take, given as (width, height, how many of them)."""
    values = 0
    for width, height, count in sizes:
        channels, rows, columns = map_shape(network, (width, height))
        values += count * channels * rows * columns
    return values * VALUE_BYTES[precision] * (2 if flips else 1)


def _after(window: Window, side: int) -> int:
    rest = side + 2 * window.padding - window.size
    steps = -(-rest // window.stride) if window.ceil else rest // window.stride
    if window.ceil and steps * window.stride >= side + window.padding:
        steps -= 1  # a window must begin inside
    return max(steps + 1, 0)
