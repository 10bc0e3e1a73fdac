"""The table of layers, held against the networks themselves."""

import pytest
import torch

from altopt.config import NETWORKS
from altopt.errors import UsageError
from altopt.layers import LAYERS, names_matching
from altopt.models.backbones import build
from altopt.training.loop import layers_named

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
    assert [weights for layer in LAYERS[name] for weights in layer.weights] == layers_named(conv_of(name), ["*"])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_name_what_they_name_in_the_network(name, patterns):
    weighted = [weights for layer in LAYERS[name] for weights in layer.weights]
    assert names_matching(weighted, patterns) == layers_named(conv_of(name), patterns)


def test_a_pattern_that_names_nothing():
    with pytest.raises(UsageError, match=r"there is no layer 'conv6': blocks are conv1, conv2, and layers conv1\.0, "):
        names_matching(["conv1.0", "conv2.1"], ["conv1", "conv6"])
