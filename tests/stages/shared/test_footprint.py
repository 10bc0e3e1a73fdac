"""The memory of stages from shapes alone, for every network."""

import pytest

from altopt.config import NETWORKS
from stages.pipeline.recipe import read_recipe
from stages.shared.footprint import footprint, part_bytes

SIZES = [(500, 375, 3), (100, 100, 9)]


def of(output, *sets, sizes=SIZES):
    recipe = read_recipe("voc07-vgg16", sets)
    config = next(recipe.config(step) for step in recipe.steps if step.output == output)
    return footprint(config, recipe.network, 20, sizes)


def test_vgg16_is_as_large_as_its_layers_say():
    sizes = part_bytes(read_recipe("voc07-vgg16").network, 20)
    assert sizes["conv"] == 14_714_688 * 4  # torchvision's features
    assert sizes["fc"] == (25088 * 4096 + 4096 + 4096 * 4096 + 4096) * 4


def test_frozen_layers_learn_nothing_and_keep_nothing():
    learning, frozen = of("M1", "train_rpn.freeze=[]"), of("M3")
    assert learning.learning - frozen.learning == 2 * 14_714_688 * 4
    assert learning.activations > 2 * frozen.activations


def test_activations_grow_with_batch_image_and_precision():
    one, two = (of("M1", f"train_rpn.images_per_batch={batch}") for batch in (1, 2))
    assert (two.activations, two.least) == (2 * one.activations, one.least)
    assert of("M1", sizes=[(100, 100, 9)]).activations < one.activations  # the largest image decides
    assert of("M1", "all.precision=bfloat16", "train_rpn.images_per_batch=1").activations == one.activations // 2


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_estimated(name):
    sets = [f"network.name={name}", 'all.freeze=["conv1"]']
    for output in ("M1", "P1", "M2", "M3", "M4"):
        assert of(output, *sets).total > of(output, *sets).least > 0


def test_what_runs_no_network_is_not_estimated():
    assert of("M5") is None
