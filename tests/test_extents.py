"""Sizes by arithmetic, held against the networks themselves."""

import pytest
import torch

from altopt.config import NETWORKS, NetworkConfig
from altopt.extents import map_shape, maps_bytes
from altopt.models.backbones import build

SIDES = [*range(33, 81), 96, 127, 224, 300, 375, 500, 600, 800, 997, 1000]


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_that_the_network_makes(name):
    with torch.device("meta"):
        conv = build(name).conv
    for side in SIDES[::8] if name == "resnet101" else SIDES:  # it has the layers of resnet50, and more of them
        height = side + 7
        network = NetworkConfig(name=name, short_side=side, max_side=height)
        features = torch.empty(1, 3, height, side, device="meta")
        assert map_shape(network, (side, height)) == tuple(conv(features).shape[1:]), side


def test_images_are_resized_first():
    assert map_shape(NetworkConfig(name="vgg16"), (500, 375)) == (512, 37, 50)
    assert map_shape(NetworkConfig(name="vgg16"), (500, 100)) == (512, 12, 62)  # held by the longer side


def test_room_for_maps():
    network = NetworkConfig(name="vgg16")
    one = 512 * 37 * 50 * 4
    assert maps_bytes([(500, 375, 3)], network, False, "float32") == 3 * one
    assert maps_bytes([(500, 375, 3), (375, 500, 2)], network, True, "bfloat16") == 5 * one
    assert maps_bytes([], network, True, "float32") == 0
