"""Filling networks of any parts: from checkpoints, with layers that a network may have or lack."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from altopt.config import NetworkConfig
from altopt.errors import ArtifactError
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.detector import FasterRCNN
from altopt.models.dropout import FullyConnected
from altopt.models.network_parts import NetworkOfParts, initialise
from altopt.models.region_classifier import RegionClassifier

NETWORK = NetworkConfig(name="small", anchor_scales=(1.0, 2.0), rpn_channels=8)
MAKERS = [lambda: FasterRCNN(NETWORK, 3), lambda: RegionClassifier(NETWORK, 3)]
IDS = ["FasterRCNN", "RegionClassifier"]


def with_norms(kind: type[nn.Module], backbone: backbones.Backbone) -> backbones.Backbone:
    for block in backbone.conv:
        block.add_module("norm", kind(next(layer.out_channels for layer in reversed([*block.children()])
                                           if isinstance(layer, nn.Conv2d))))
    return backbone


def conv_tensors(network: NetworkOfParts) -> dict[str, Tensor]:
    """Return random weights and statistics for the network's conv layers."""
    return {f"conv.{name}": torch.rand(tensor.shape, generator=generator(name)).to(tensor.dtype)
            for name, tensor in network.conv.state_dict().items()}


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_normalised_conv_layers_are_filled_with_their_statistics(monkeypatch, make, kind):
    build = backbones.build
    monkeypatch.setattr(backbones, "build", lambda name: with_norms(kind, build(name)))
    network = make()
    given = conv_tensors(network)
    assert "conv.conv3.norm.running_var" in given
    network.fill(given, generator("rest"))
    assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    found = network.tensors(["conv"])
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    with torch.no_grad():
        assert network.eval().conv(torch.ones(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(ArtifactError, match=r"conv\.conv3\.norm"):
        make().fill({name: tensor for name, tensor in given.items() if name != "conv.conv3.norm.running_var"},
                    generator("rest"))


class Nameless(nn.Module):
    """A parameter, and nothing that says how it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def with_layer(layer: Callable[[], nn.Module], part: str) -> RegionClassifier:
    network = RegionClassifier(NETWORK, 3)
    with torch.device("meta"):
        network.get_submodule(part).add_module("more", layer())
    return network


def test_new_layers_begin_as_they_say_themselves():
    network = with_layer(lambda: nn.BatchNorm1d(4), "head")
    given = conv_tensors(network)
    assert network.fill(given, generator("rest")) == ["fc.fc6", "fc.fc7", "head.cls_score", "head.more"]
    found = network.tensors(["head"])
    assert found["head.more.weight"].tolist() == found["head.more.running_var"].tolist() == [1] * 4
    assert found["head.more.bias"].tolist() == found["head.more.running_mean"].tolist() == [0] * 4


@pytest.mark.parametrize("layer", [Nameless, lambda: FrozenBatchNorm2d(4)], ids=["parameter", "buffers"])
def test_a_new_layer_that_does_not_say_how_it_begins_is_an_error(layer):
    network = with_layer(layer, "head")
    with pytest.raises(TypeError, match=r"head\.more, a (Nameless|FrozenBatchNorm2d), does not say how it begins"):
        network.fill(conv_tensors(network), generator("rest"))


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_a_buffer_that_no_checkpoint_holds_is_an_error(make):
    network = make()
    given = conv_tensors(network)
    network.conv.conv2.register_buffer("scale", torch.ones(3, device="meta"), persistent=False)
    with pytest.raises(TypeError, match=r"conv\.conv2\.scale is in no checkpoint"):
        network.fill(given, generator("rest"))


def test_layers_of_another_shape_are_drawn_and_the_others_kept():
    whole = RegionClassifier(NETWORK, 3)
    whole.fill(conv_tensors(whole), generator("whole"))
    tensors = whole.tensors(["conv", "fc", "head"])
    network = RegionClassifier(NETWORK, 3, levels=(3, 2, 1))
    assert network.fill(tensors, generator("pyramid")) == ["fc.fc6"]
    assert network.get_parameter("fc.fc6.weight").shape == (256, 128 * 14)
    assert network.pooled_size == 128 * 14
    assert network.hidden_size == 256
    assert torch.equal(network.get_parameter("fc.fc7.weight"), tensors["fc.fc7.weight"])
    assert all(parameter.requires_grad for parameter in network.parameters())
    again = RegionClassifier(NETWORK, 3)
    assert again.fill(tensors, generator("again"), fresh=("fc",)) == ["fc.fc6", "fc.fc7"]
    assert torch.equal(again.get_parameter("head.cls_score.weight"), tensors["head.cls_score.weight"])


def test_rounded_layers_compute_what_autocast_makes_of_them():
    layers = NetworkOfParts()
    layers.fc = FullyConnected(64, 32)
    random = generator("rounded")
    for name, layer in layers.fc.named_modules():
        initialise(name, layer, random)
    input = torch.randn(5, 64, generator=generator("input"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = layers.eval().fc(input)
        layers.round_fc()
        assert layers.get_parameter("fc.fc6.weight").dtype == torch.bfloat16
        assert torch.equal(layers.fc(input), expected)
    assert expected.any()
