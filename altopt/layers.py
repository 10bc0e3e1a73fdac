"""The conv layers of every network by name, so that ``altopt plan`` knows them at once. No torch here.

The tables are those of altopt/models/backbones.py, and tests hold them against the networks.
"""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from altopt.errors import UsageError


class KernelGeometry(NamedTuple):
    """How a layer changes the size of a map; ``ceil`` is max pooling's ceil_mode."""

    size: int
    stride: int
    padding: int = 0
    ceil: bool = False


class Layer(NamedTuple):
    """A layer of a block: its name, the names of what has weights in it, and what it makes of a map.

    ``channels`` 0: as many as it is given; without a ``window`` the size stays.
    """

    name: str
    weights: tuple[str, ...] = ()
    channels: int = 0
    window: KernelGeometry | None = None


class Conv(NamedTuple):
    """A convolution and a ReLU behind it."""

    channels: int
    window: KernelGeometry | None = None


class Fire(NamedTuple):
    """SqueezeNet's module of three convolutions."""

    channels: int


def _layers(*blocks: Sequence[Conv | Fire | KernelGeometry | None]) -> tuple[Layer, ...]:
    """Return the layers of conv1, conv2, ... in order; a bare window is a pooling, None a layer that only computes."""
    layers = []
    for number, block in enumerate(blocks, 1):
        names = (f"conv{number}.{place}" for place in range(2 * len(block)))
        for part in block:
            name = next(names)
            if isinstance(part, Conv):
                layers += [Layer(name, (name,), part.channels, part.window), Layer(next(names))]
            elif isinstance(part, Fire):
                weights = tuple(f"{name}.{each}" for each in ("squeeze", "expand1x1", "expand3x3"))
                layers.append(Layer(name, weights, part.channels))
            else:
                layers.append(Layer(name, window=part))
    return tuple(layers)


_HALF, _THIRD = KernelGeometry(2, 2), KernelGeometry(3, 2)
_CEIL = KernelGeometry(3, 2, ceil=True)
LAYERS = {
    "vgg16": _layers(
        [Conv(64), Conv(64)], [_HALF, Conv(128), Conv(128)], [_HALF, Conv(256), Conv(256), Conv(256)],
        [_HALF, Conv(512), Conv(512), Conv(512)], [_HALF, Conv(512), Conv(512), Conv(512)]),
    "alexnet": _layers(
        [Conv(64, KernelGeometry(11, 4, 10))], [_THIRD, Conv(192, KernelGeometry(5, 1, 2))], [_THIRD, Conv(384)],
        [Conv(256)], [Conv(256)]),
    "squeezenet1_1": _layers(
        [Conv(64, KernelGeometry(3, 2, 8))], [_CEIL, Fire(128), Fire(128)], [_CEIL, Fire(256), Fire(256)],
        [_CEIL, Fire(384), Fire(384)], [Fire(512), Fire(512), None]),
    "small": _layers(
        [Conv(24, KernelGeometry(6, 2, 2))], [_HALF, Conv(32), Conv(32)], [_HALF, Conv(64), Conv(64)],
        [_HALF, Conv(128), Conv(128)], [Conv(128), Conv(128)]),
}


def names_matching(weighted: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Return the layers with weights, in order, that a pattern names, by their own name or that of a part around them.

    ``conv3`` is a whole block and ``conv3.0`` a layer of it; ``*`` stands for anything, so ``conv[12]*`` and
    ``conv3.*`` are patterns too; "all" stands for every layer. Raises ``UsageError`` for a pattern that names nothing.
    """
    if patterns == "all":
        return list(weighted)
    around = {name: [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)] for name in weighted}
    chosen = set()
    for pattern in patterns:
        found = {name for name in weighted if any(fnmatchcase(each, pattern) for each in around[name])}
        if not found:
            blocks = dict.fromkeys(name.split(".")[0] for name in weighted)
            raise UsageError(f"freeze: there is no layer {pattern!r}: blocks are {', '.join(blocks)}, and layers "
                             f"{', '.join(weighted)}")
        chosen |= found
    return [name for name in weighted if name in chosen]


def leading(flags: Collection[bool]) -> int:
    """Return how many of the flags are set before the first that is not."""
    return next((count for count, flag in enumerate(flags) if not flag), len(flags))
