"""Sizes known without an image: of one in the network's frame, and of what the conv layers make of it. No torch here.

So ``altopt plan`` can say at once how much room feature maps will take.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import count

from altopt.config import NetworkConfig
from altopt.layers import LAYERS, KernelGeometry

VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def scale_of(size: tuple[int, int], short_side: int, max_side: int) -> float:
    """Return the factor that brings the shorter side to ``short_side``, unless the longer would pass ``max_side``."""
    return min(short_side / min(size), max_side / max(size))


def input_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return (width, height) of an image of ``size`` in the input frame."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def original_frame(network: NetworkConfig, size: tuple[int, int]) -> NetworkConfig:
    """Return the network with the frame in which an image of ``size`` keeps its pixels."""
    return replace(network, short_side=min(size), max_side=max(size))


def map_shape(network: NetworkConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the map that the conv layers make of an image of (width, height)."""
    return shape_behind(network.name, input_size(size, scale_of(size, network.short_side, network.max_side)))


def shape_behind(name: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the last conv layer's map, for (width, height) in the input frame."""
    (width, height), channels = size, 3
    for layer in LAYERS[name]:
        channels = layer.channels or channels
        if layer.window:
            width, height = _after(layer.window, width), _after(layer.window, height)
    return channels, height, width


@cache
def shortest_side(name: str) -> int:
    """Return the fewest pixels of a side in the input frame that a network takes: those of one place of its map."""
    # A network that pads by more than its strides would make a map of an image of one pixel, from padding alone.
    stride = math.prod(layer.window.stride for layer in LAYERS[name] if layer.window)
    return next(side for side in count(stride) if min(shape_behind(name, (side, side))))


def maps_bytes(sizes: Iterable[tuple[int, int, int]], network: NetworkConfig, flips: bool, precision: str) -> int:
    """Return the room that the maps of images take, given as (width, height, how many of them)."""
    values = sum(number * math.prod(map_shape(network, (width, height))) for width, height, number in sizes)
    return values * VALUE_BYTES[precision] * (2 if flips else 1)


def _after(window: KernelGeometry, side: int) -> int:
    rest = side + 2 * window.padding + window.more - window.size
    steps = -(-rest // window.stride) if window.ceil else rest // window.stride
    if window.ceil and steps * window.stride >= side + window.padding:
        steps -= 1  # a window must begin inside
    return max(steps + 1, 0)
