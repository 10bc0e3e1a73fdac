"""The conv layers of every network by name, so that ``altopt plan`` knows them at once. No torch here.

The tables are those of altopt/models/backbones.py, and tests hold them against the networks.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from altopt.errors import UsageError


class KernelGeometry(NamedTuple):
    """How a layer changes the size of a map; ``ceil`` is max pooling's ceil_mode."""

    size: int
    stride: int
    padding: int = 0  # on all sides
    ceil: bool = False
    more: int = 0  # padding of one side beside that


class Layer(NamedTuple):
    """What a layer makes of a map, and the names of what has weights in it.

    ``channels`` 0: as many as it is given; without a ``window`` the size stays.
    """

    channels: int = 0
    window: KernelGeometry | None = None
    weights: tuple[str, ...] = ()


def _conv(channels: int, window: KernelGeometry | None = None) -> Layer:
    return Layer(channels, window, ("",))


def _fire(channels: int) -> Layer:
    """Return SqueezeNet's module of three convolutions."""
    return Layer(channels, None, (".squeeze", ".expand1x1", ".expand3x3"))


def _layers(*blocks: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the layers of conv1, conv2, ... in order, their weights by full names."""
    layers = []
    for number, block in enumerate(blocks, 1):
        place = 0
        for layer in block:
            layers.append(layer._replace(weights=tuple(f"conv{number}.{place}{part}" for part in layer.weights)))
            place += 2 if layer.weights == ("",) else 1  # the ReLU behind a convolution has a place of its own
    return tuple(layers)


def _inverted(channels: int, window: KernelGeometry | None = None, expands: bool = True) -> Layer:
    """Return EfficientNet's block of three convolutions; the one before the first stride does not expand."""
    return Layer(channels, window, (*((".expand",) if expands else ()), ".depthwise", ".project"))


def _residual(channels: int, blocks: int, window: KernelGeometry | None = None) -> list[Layer]:
    """Return ResNet's bottleneck blocks of one size, the first of which brings its input to that size too."""
    parts = (".conv1", ".conv2", ".conv3")
    return [Layer(channels, window, (*parts, ".downsample.0")), *[Layer(channels, None, parts)] * (blocks - 1)]


def _resnet(last: int) -> tuple[Layer, ...]:
    """Return the layers of ResNet's conv1 to conv4, the last of so many blocks, less a row and a column."""
    halved = KernelGeometry(3, 2, 1)
    return _layers([_conv(64, KernelGeometry(7, 2, 11))], [Layer(0, halved), *_residual(256, 3)],
                   _residual(512, 4, halved), [*_residual(1024, last, halved), Layer(0, KernelGeometry(2, 1))])


_HALF, _THIRD = Layer(0, KernelGeometry(2, 2)), Layer(0, KernelGeometry(3, 2))
_CEIL = Layer(0, KernelGeometry(3, 2, ceil=True))
LAYERS = {
    "vgg16": _layers(
        [_conv(64), _conv(64)], [_HALF, _conv(128), _conv(128)], [_HALF, _conv(256), _conv(256), _conv(256)],
        [_HALF, _conv(512), _conv(512), _conv(512)], [_HALF, _conv(512), _conv(512), _conv(512)]),
    "alexnet": _layers(
        [_conv(64, KernelGeometry(11, 4, 10))], [_THIRD, _conv(192, KernelGeometry(5, 1, 2))], [_THIRD, _conv(384)],
        [_conv(256)], [_conv(256)]),
    "squeezenet1_1": _layers(
        [_conv(64, KernelGeometry(3, 2, 8))], [_CEIL, _fire(128), _fire(128)], [_CEIL, _fire(256), _fire(256)],
        [_CEIL, _fire(384), _fire(384)], [_fire(512), _fire(512)]),
    "small": _layers(
        [_conv(24, KernelGeometry(6, 2, 2))], [_HALF, _conv(32), _conv(32)], [_HALF, _conv(64), _conv(64)],
        [_HALF, _conv(128), _conv(128)], [_conv(128), _conv(128)]),
    "efficientnet_lite0": _layers(
        [_conv(32, KernelGeometry(3, 2, 1, more=7)), _inverted(16, expands=False)],
        [_inverted(24, KernelGeometry(3, 2, 0, more=1)), _inverted(24)],
        [_inverted(40, KernelGeometry(5, 2, 1, more=1)), _inverted(40)],
        [_inverted(80, KernelGeometry(3, 2, 0, more=1)), *[_inverted(80)] * 2, *[_inverted(112)] * 3],
        [Layer(112 + 320, None, tuple(f".{block}{part}" for block in range(5) for part in _inverted(0).weights))]),
    "resnet50": _resnet(6),
    "resnet101": _resnet(23),
}


def names_matching(weighted: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Return the layers with weights, in order, that a pattern names, by their own name or that of a part around them.

    ``conv3`` is a whole block and ``conv3.0`` a layer of it; ``*`` stands for anything, so ``conv[12]*`` and
    ``conv3.*`` are patterns too; "all" stands for every layer. Raises ``UsageError`` for a pattern that names nothing.
    """
    if patterns == "all":
        return list(weighted)
    chosen: set[str] = set()
    for pattern in patterns:
        # ``*`` matches dots too, so the second asks for any part around the layer.
        found = [name for name in weighted if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not found:
            blocks = dict.fromkeys(name.split(".")[0] for name in weighted)
            raise UsageError(f"freeze: there is no layer {pattern!r}: blocks are {', '.join(blocks)}, and layers "
                             f"{', '.join(weighted)}")
        chosen.update(found)
    return [name for name in weighted if name in chosen]
