"""The networks: convolutional layers in named blocks, and the fully connected layers that follow RoI pooling.

Each function returns a ``Backbone`` with fresh weights. Blocks are named so that a recipe can say which of them are
frozen: ``freeze = ["conv1", "conv2"]``.

Feature cell (i, j) should see the image around (16 j + 8, 16 i + 8), where the anchors are centred and where RoI
pooling rounds to. VGG-16 does by itself; networks that pool 3 x 3 without padding see 7.5 px further to the right and
down, so their first layer pads 8 px more. ResNet sees 7.5 px too little: it pads 8 px more too, and then does without
the first row and column.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from altopt.config import TORCHVISION_PIXELS, Pixels
from altopt.models import lite0
from altopt.models.dropout import FullyConnected
from altopt.models.resnet import DropFirst, FrozenBatchNorm, Res5

STRIDE = 16  # pixels of the input for one cell of the last feature map; the same for every network here


@dataclass(frozen=True, eq=False)
class Backbone:
    """``conv``: image to features, a sequence of named blocks; ``fc``: pooled RoIs to vectors of ``hidden_size``.

    ``imagenet`` are torchvision's weights, if it has any. ``names`` says what its file calls our layers, by the
    beginning of their names; ``pixels`` what these weights want of an image, and ``first_spread`` is about the standard
    deviation of their first layer (0: nobody else's have its names).
    """

    conv: nn.Sequential
    fc: FullyConnected | Res5
    channels: int
    roi_size: int
    hidden_size: int
    names: Mapping[str, str] = field(default_factory=dict)
    imagenet: WeightsEnum | None = None
    pixels: Pixels = TORCHVISION_PIXELS
    first_spread: float = 0.0


def vgg16() -> Backbone:
    """VGG-16 (Simonyan and Zisserman): conv1 to conv5 without the last pooling, fc6 and fc7, RoI pool 7 x 7."""
    layers = list(models.vgg16(weights=None).features)[:-1]
    blocks = _split_at_pools(layers)
    return Backbone(_blocks(blocks), FullyConnected(512 * 7 * 7, 4096), 512, 7, 4096,
                    _places(blocks) | {"fc.fc6": "classifier.0", "fc.fc7": "classifier.3"},
                    models.VGG16_Weights.IMAGENET1K_V1, first_spread=0.3)


def alexnet() -> Backbone:
    """AlexNet as torchvision has it: conv1 to conv5 without the last pooling, fc6 and fc7, RoI pool 6 x 6."""
    features = list(models.alexnet(weights=None).features)
    conv1 = features[0]
    assert isinstance(conv1, nn.Conv2d)
    conv1.padding = (10, 10)  # 8 more than its own, see above
    blocks = [features[0:2], features[2:5], features[5:8], features[8:10], features[10:12]]
    return Backbone(_blocks(blocks), FullyConnected(256 * 6 * 6, 4096), 256, 6, 4096,
                    _places(blocks) | {"fc.fc6": "classifier.1", "fc.fc7": "classifier.4"},
                    models.AlexNet_Weights.IMAGENET1K_V1, first_spread=0.12)


def squeezenet1_1() -> Backbone:
    """SqueezeNet 1.1 for laptops: its own convolutions, and two small fully connected layers, RoI pool 6 x 6.

    Its ImageNet features are large, with a root mean square of 11 to 13 on photographs, and nothing normalises them.
    Divided by 16 they suit layers re-initialised; without that the first gradients are 17 times as long.
    """
    features = list(models.squeezenet1_1(weights=None).features)
    conv1 = features[0]
    assert isinstance(conv1, nn.Conv2d)
    conv1.padding = (8, 8)  # 8 more than its own, see above
    blocks = [features[0:2], features[2:5], features[5:8], features[8:11], [*features[11:13], Divide(16)]]
    return Backbone(_blocks(blocks), FullyConnected(512 * 6 * 6, 512), 512, 6, 512, _places(blocks),
                    models.SqueezeNet1_1_Weights.IMAGENET1K_V1, first_spread=14.4)


def efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0 for photographs: the fifth stage's 112 channels and the seventh's 320; RoI pool 6 x 6.

    The last two stages keep stride 16 and are dilated instead. They see far and say what a thing is; where small ones
    lie the fifth says better, so its output stands beside theirs. On photographs the features have a root mean square
    of 3; a quarter of that is what SqueezeNet's layers get, for which learning rates were tried.
    """
    stem = lite0.PaddedConv2d(3, lite0.STEM, 3, stride=2, padding=1, before=7)  # 8 more than its own, see above
    stages = lite0.stages()
    conv = _blocks([
        [stem, nn.ReLU6(inplace=True), *stages[0]], [*stages[1]], [*stages[2]], [*stages[3], *stages[4]],
        [lite0.Beside(*stages[5], *stages[6]), Divide(4)]])
    residuals = [path for path, layer in conv.named_modules() if isinstance(layer, lite0.InvertedResidual)]
    names = {"conv.conv1.0": "_conv_stem"}
    for number, path in enumerate(residuals):
        names |= {f"conv.{path}.{part}": f"_blocks.{number}._{part}_conv" for part in lite0.PARTS}
    return Backbone(conv, FullyConnected(432 * 6 * 6, 512), 432, 6, 512, names,
                    pixels=Pixels("RGB", 1.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)))


def resnet50() -> Backbone:
    """ResNet-50, "C4": conv1 to conv4 on the image, res5 on 14 x 14 RoIs, batch normalisation frozen (He et al.)."""
    return _resnet(models.resnet50(weights=None, norm_layer=FrozenBatchNorm), models.ResNet50_Weights.IMAGENET1K_V1)


def resnet101() -> Backbone:
    """ResNet-101, as ``resnet50``."""
    return _resnet(models.resnet101(weights=None, norm_layer=FrozenBatchNorm), models.ResNet101_Weights.IMAGENET1K_V1)


def _resnet(network: models.ResNet, weights: WeightsEnum) -> Backbone:
    network.conv1.padding = (11, 11)  # 8 more than its own, see above
    blocks: list[list[nn.Module]] = [[network.conv1, network.bn1, network.relu], [network.maxpool, *network.layer1],
                                     [*network.layer2], [*network.layer3, DropFirst()]]
    names = {"conv.conv1.0": "conv1", "conv.conv1.1": "bn1", "fc.layer4": "layer4"}
    for block, layers in ((2, network.layer1), (3, network.layer2), (4, network.layer3)):
        names |= {f"conv.conv{block}.{number + (block == 2)}": f"layer{block - 1}.{number}"
                  for number in range(len(layers))}
    return Backbone(_blocks(blocks), Res5(network.layer4), 1024, 14, 2048, names, weights, first_spread=0.12)


def small() -> Backbone:
    """Nine convolutions of 24 to 128 channels, for the ``shapes`` recipe and for tests; RoI pool 6 x 6.

    The first one takes every second pixel (6 x 6, stride 2), which makes it a quarter of VGG's cost per image.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 6, stride=2, padding=2), nn.ReLU(inplace=True)]
    blocks = [layers]
    channels = 24
    for widths in ((32, 32), (64, 64), (128, 128), (128, 128)):
        layers = [nn.MaxPool2d(2)] if len(blocks) < 4 else []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        blocks.append(layers)
    return Backbone(_blocks(blocks), FullyConnected(128 * 6 * 6, 256), 128, 6, 256)


class Divide(nn.Module):
    """Divides features by a constant, which does not train."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, features: Tensor) -> Tensor:
        """Return the features, of any shape, divided."""
        return features / self.by


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "vgg16": vgg16, "alexnet": alexnet, "squeezenet1_1": squeezenet1_1, "small": small,
    "efficientnet_lite0": efficientnet_lite0, "resnet50": resnet50, "resnet101": resnet101,
}


def build(name: str) -> Backbone:
    """Return the network of that name; its name is checked where a recipe is read."""
    return BACKBONES[name]()


def _blocks(blocks: list[list[nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"conv{n}", nn.Sequential(*layers)) for n, layers in enumerate(blocks, 1)))


def _places(blocks: list[list[nn.Module]]) -> dict[str, str]:
    """Return the names of layers in torchvision's ``features``, of which the blocks are slices, in order."""
    ours = [f"conv.conv{block}.{place}" for block, layers in enumerate(blocks, 1) for place, _ in enumerate(layers)]
    return {name: f"features.{position}" for position, name in enumerate(ours)}


def _split_at_pools(layers: list[nn.Module]) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = [[]]
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            blocks.append([])
        blocks[-1].append(layer)
    return blocks
