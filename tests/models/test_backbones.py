"""The networks: their blocks, how large their features are, and where a feature cell looks."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from altopt.config import NETWORKS
from altopt.models import backbones, lite0
from altopt.models.backbones import STRIDE, Backbone
from altopt.models.imagenet import from_foreign
from altopt.models.network_parts import initialise_all
from altopt.models.resnet import FrozenBatchNorm
from altopt.training.loop import freeze


def outline(name: str) -> Backbone:
    """Return the network without memory for its weights."""
    with torch.device("meta"):
        return backbones.build(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_and_layers_have_the_documented_names(name):
    backbone = outline(name)
    resnet = name.startswith("resnet")
    blocks = ["conv1", "conv2", "conv3", "conv4"] if resnet else ["conv1", "conv2", "conv3", "conv4", "conv5"]
    layers = ["layer4"] if resnet else ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7"]
    assert [block for block, _ in backbone.conv.named_children()] == blocks
    assert [layer for layer, _ in backbone.fc.named_children()] == layers


def convolutions(module: nn.Module) -> list[int]:
    return [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def test_vgg16_has_thirteen_convolutions_in_five_blocks():
    blocks = {block: convolutions(layers) for block, layers in outline("vgg16").conv.named_children()}
    assert blocks == {"conv1": [64] * 2, "conv2": [128] * 2, "conv3": [256] * 3, "conv4": [512] * 3, "conv5": [512] * 3}


def test_alexnet_has_a_convolution_in_each_block():
    blocks = {block: convolutions(layers) for block, layers in outline("alexnet").conv.named_children()}
    assert blocks == {"conv1": [64], "conv2": [192], "conv3": [384], "conv4": [256], "conv5": [256]}


def test_squeezenet_and_small_split_their_layers_likewise():
    squeezenet = [convolutions(block) for block in outline("squeezenet1_1").conv]
    assert [len(block) for block in squeezenet] == [1, 6, 6, 6, 6]  # a fire module has three
    small = [convolutions(block) for block in outline("small").conv]
    assert small == [[24], [32, 32], [64, 64], [128, 128], [128, 128]]


@pytest.mark.parametrize(("name", "roi_size", "hidden_size"), [
    ("vgg16", 7, 4096), ("alexnet", 6, 4096), ("squeezenet1_1", 6, 512), ("small", 6, 256),
    ("efficientnet_lite0", 6, 512), ("resnet50", 14, 2048)])
def test_fully_connected_layers_take_the_pooled_features(name, roi_size, hidden_size):
    backbone = outline(name)
    assert (backbone.roi_size, backbone.hidden_size) == (roi_size, hidden_size)
    pooled = torch.zeros(3, backbone.channels, roi_size, roi_size, device="meta")
    assert backbone.fc.eval()(pooled.flatten(1)).shape == (3, hidden_size)
    dropout = [layer.p for layer in backbone.fc.modules() if isinstance(layer, nn.Dropout)]
    assert dropout == ([] if name == "resnet50" else [0.5, 0.5])


@pytest.mark.parametrize("size", [(600, 1000), (601, 999), (600, 800), (240, 320), (239, 321), (375, 500), (333, 77)])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_cell_for_every_sixteen_pixels(name, size):
    backbone = outline(name)
    shape = backbone.conv(torch.zeros(2, 3, *size, device="meta")).shape
    assert shape[:2] == (2, backbone.channels)
    for cells, pixels in zip(shape[2:], size, strict=True):
        assert abs(cells - pixels / STRIDE) < 1
        if name == "vgg16":
            assert cells == pixels // STRIDE  # as Faster R-CNN's feature maps


class Spread(nn.Module):
    """The mean of a layer's window, so that gradients show all that it sees; channels do not matter."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.more = layer.dilation, getattr(layer, "more", (0, 0, 0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = torch.ones(1, 1, *self.kernel, dtype=x.dtype) / (self.kernel[0] * self.kernel[1])
        padded = F.pad(x.mean(dim=1, keepdim=True), self.more)
        return F.conv2d(padded, window, stride=self.stride, padding=self.padding, dilation=self.dilation)


def spread(module: nn.Module) -> nn.Module:
    """Return the layers with convolutions and pools replaced by means over the same windows."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(module, name, Spread(layer))
        elif isinstance(layer, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode))
        elif isinstance(layer, nn.ReLU6 | FrozenBatchNorm):
            setattr(module, name, nn.Identity())
        else:
            spread(layer)
    return module


def seen(conv: nn.Module, row: int, column: int, side: int) -> list[float]:
    """Return the box xyxy, in pixels, that a feature cell sees of an image of ``side`` x ``side``."""
    image = torch.full((1, 3, side, side), 1e-6, dtype=torch.float64, requires_grad=True)  # below ReLU6's bound
    conv(image)[0, :, row, column].sum().backward()
    rows, columns = torch.nonzero(image.grad[0].abs().sum(dim=0), as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize(("name", "centre"), [
    ("vgg16", 8), ("alexnet", 7.5), ("squeezenet1_1", 7.5), ("small", 8), ("efficientnet_lite0", 7.5),
    ("resnet50", 8.5)])
def test_a_cell_looks_where_its_anchors_are_centred(name, centre):
    conv = spread(outline(name).conv)
    side = 1408 if name == "efficientnet_lite0" else 704 if name == "resnet50" else 352
    for row, column in ((side // 32 - 1, side // 32 - 2), (side // 32, side // 32 + 2)):
        x1, y1, x2, y2 = seen(conv, row, column, side)
        assert min(x1, y1) > 0  # all of the field is in the image
        assert max(x2, y2) < side
        assert (x1 + x2) / 2 == pytest.approx(STRIDE * column + 8, abs=1)
        assert (y1 + y2) / 2 == pytest.approx(STRIDE * row + 8, abs=1)
        assert (x1 + x2) / 2 == STRIDE * column + centre


def test_vgg16_sees_196_pixels():
    x1, y1, x2, y2 = seen(spread(outline("vgg16").conv), 10, 10, 352)
    assert (x2 - x1, y2 - y1) == (196, 196)


def torchvisions(name: str) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """Return torchvision's own ``features`` with drawn weights, and its state dict (classifier without memory)."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    features = model.features.to_empty(device="cpu")
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in features.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(std=(2 / fan_in) ** 0.5, generator=random)
    return features, model.state_dict()


@pytest.mark.parametrize(("name", "padding"), [("vgg16", 1), ("alexnet", 10), ("squeezenet1_1", 8)])
def test_features_are_those_of_torchvisions_network_with_other_padding(name, padding):
    features, state = torchvisions(name)
    tensors = from_foreign(name, state, "random weights")
    conv = outline(name).conv
    conv.load_state_dict({key.removeprefix("conv."): value for key, value in tensors.items()
                          if key.startswith("conv.")}, assign=True)
    features = copy.copy(features) if name == "squeezenet1_1" else features[:-1]  # the last pooling is left out
    first = features[0]
    assert isinstance(first, torch.nn.Conv2d)
    first.padding = (padding, padding)
    image = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours, theirs = conv(image), features(image)
    assert theirs.abs().max() > 0.01
    divisor = 16 if name == "squeezenet1_1" else 1  # a power of two: no digit is lost
    assert torch.equal(ours * divisor, theirs)


def test_lite0_is_the_original_but_for_the_finer_grid_of_its_last_stages():
    """Every second row and column of the dilated map is what the layers make of it with the stride left in."""
    random = torch.Generator().manual_seed(7)
    state: dict[str, torch.Tensor] = {}

    def norm(name: str, channels: int) -> None:
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            state[f"{name}.{part}"] = low + torch.rand(channels, generator=random)

    def weights(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=random) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5

    weights("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    inputs, number = 32, 0
    for stage in lite0.STAGES:
        for _ in range(stage.blocks):
            block, hidden = f"_blocks.{number}.", inputs * stage.expansion
            if stage.expansion > 1:
                weights(f"{block}_expand_conv", hidden, inputs, 1, 1)
                norm(f"{block}_bn0", hidden)
            weights(f"{block}_depthwise_conv", hidden, 1, stage.kernel, stage.kernel)
            norm(f"{block}_bn1", hidden)
            weights(f"{block}_project_conv", stage.channels, hidden, 1, 1)
            norm(f"{block}_bn2", stage.channels)
            inputs, number = stage.channels, number + 1

    def convolved(x: torch.Tensor, layer: str, bn: str, stride: int = 1) -> torch.Tensor:
        """TensorFlow's "same" padding, and the normalisation as a step of its own."""
        weight = state[f"{layer}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)
        return F.batch_norm(x, state[f"{bn}.running_mean"], state[f"{bn}.running_var"], state[f"{bn}.weight"],
                            state[f"{bn}.bias"], eps=1e-3)

    image = torch.randn(1, 3, 64, 96, generator=random)
    x = fifth = F.relu6(convolved(image, "_conv_stem", "_bn0", 2))
    number = 0
    for stage, stride in zip(lite0.STAGES, (1, 2, 2, 2, 1, 2, 1), strict=True):
        for repeat in range(stage.blocks):
            block, before = f"_blocks.{number}.", x
            if stage.expansion > 1:
                x = F.relu6(convolved(x, f"{block}_expand_conv", f"{block}_bn0"))
            x = F.relu6(convolved(x, f"{block}_depthwise_conv", f"{block}_bn1", 1 if repeat else stride))
            x = convolved(x, f"{block}_project_conv", f"{block}_bn2")
            x = x + before if x.shape == before.shape else x
            number += 1
        fifth = x if stage.channels == 112 else fifth  # of the stages; the last two are behind it
    assert x.shape == (1, 320, 2, 3)

    tensors = from_foreign("efficientnet_lite0", state, "random weights")
    conv = outline("efficientnet_lite0").conv
    conv.load_state_dict({key.removeprefix("conv."): value for key, value in tensors.items()}, assign=True)
    stem = conv.get_submodule("conv1.0")
    assert isinstance(stem, lite0.PaddedConv2d)
    stem.padding, stem.more = (0, 0), (0, 1, 0, 1)  # its own, without what brings cells and anchors together
    with torch.no_grad():
        features = conv(image) * 4
    assert features.shape == (1, 112 + 320, 4, 6)
    torch.testing.assert_close(features[:, :112], fifth, rtol=1e-4, atol=1e-4 * fifth.abs().max().item())
    torch.testing.assert_close(features[:, 112:, 1::2, 1::2], x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_resnet_is_torchvisions_but_for_its_padding():
    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None)
    model.to_empty(device="cpu")
    initialise_all(model, torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1, generator=random)
            layer.running_var.uniform_(0.5, 2, generator=random)
    model.eval()
    tensors = from_foreign("resnet50", model.state_dict(), "random weights")
    backbone = outline("resnet50")
    for part in ("conv", "fc"):
        own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(part)}
        getattr(backbone, part).load_state_dict(own, assign=True)
    conv = backbone.conv
    first = conv.get_submodule("conv1.0")
    assert isinstance(first, nn.Conv2d)
    first.padding = (3, 3)
    image = torch.randn(1, 3, 64, 96, generator=random)
    with torch.no_grad():
        features = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(image)))))
        theirs = model.layer3(model.layer2(features))
        pooled = torch.randn(2, 1024, 14, 14, generator=random)
        torch.testing.assert_close(conv(image), theirs[:, :, 1:, 1:], rtol=1e-4, atol=1e-5 * theirs.max().item())
        torch.testing.assert_close(backbone.fc(pooled.flatten(1)), model.layer4(pooled).mean(dim=(2, 3)))


def test_freezing_a_block_leaves_the_others_trainable():
    conv = outline("vgg16").conv
    freeze(conv, ["conv1", "conv2"])
    trained = {name.split(".")[0] for name, parameter in conv.named_parameters() if parameter.requires_grad}
    assert trained == {"conv3", "conv4", "conv5"}


def test_freezing_an_unknown_block_is_an_error():
    with pytest.raises(AttributeError, match="conv6"):
        freeze(outline("small").conv, ["conv1", "conv6"])


def test_two_networks_share_nothing():
    one, other = backbones.small(), backbones.small()
    addresses = {parameter.data_ptr() for parameter in one.conv.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in other.conv.parameters()}
