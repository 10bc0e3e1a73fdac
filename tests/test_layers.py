"""The table of layers, held against the networks themselves."""

import pytest
import torch

from altopt.config import NETWORKS
from altopt.errors import UsageError
from altopt.layers import LAYERS, frozen_layers, names_matching
from altopt.models.backbones import build
from altopt.training.loop import freeze, layers_named

PATTERNS = [("conv1",), ("conv1", "conv2"), ("conv[12]*",), ("conv1", "conv3"), ("*",), (), ("conv1.*", "conv2.1"),
            ("conv2",)]


def conv_of(name):
    with torch.device("meta"):
        return build(name).conv


def frozen_depth(conv):
    """Return how many layers of a network stand before the first that learns."""
    depth = 0
    for layer in (layer for block in conv for layer in block):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            break
        depth += 1
    return depth


def test_every_network_is_there():
    assert set(LAYERS) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_are_those_of_the_network(name):
    conv = conv_of(name)
    assert [layer.name for layer in LAYERS[name]] == [
        f"{block}.{layer}" for block, layers in conv.named_children() for layer, _ in layers.named_children()]
    assert [weights for layer in LAYERS[name] for weights in layer.weights] == layers_named(conv, ["*"])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("patterns", PATTERNS)
def test_frozen_layers_are_counted_as_the_network_has_them(name, patterns):
    conv = conv_of(name)
    freeze(conv, layers_named(conv, patterns))
    assert frozen_layers(name, patterns) == frozen_depth(conv)


def test_a_module_is_frozen_when_all_of_it_is():
    assert frozen_layers("squeezenet1_1", ["conv1", "conv2.1.squeeze"]) == 3
    assert frozen_layers("squeezenet1_1", ["conv1", "conv2.1.*"]) == 4
    assert frozen_layers("vgg16", ["conv1", "conv2"]) == 4 + 5 + 1  # with the pooling that follows


def test_a_pattern_that_names_nothing():
    with pytest.raises(UsageError, match=r"there is no layer 'conv6': blocks are conv1, conv2, and layers conv1\.0, "):
        names_matching(["conv1.0", "conv2.1"], ["conv1", "conv6"])
