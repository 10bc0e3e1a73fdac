"""Dropout's masks: each image's own, whatever images share the batch."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from altopt.batches.samples import Sample
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.models.dropout import FullyConnected
from altopt.ops.targets import RoISample

WIDTH = 40


def layers_of(p: float = 0.5) -> FullyConnected:
    """Return layers that pass on what they are given, so that what is left of ones is the product of two masks."""
    layers = FullyConnected(WIDTH, WIDTH)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(torch.eye(WIDTH))
                layer.bias.zero_()
            elif isinstance(layer, nn.Dropout):
                layer.p = p
    return layers.train()


def rois(count: int, seed: int) -> RoISample:
    return RoISample(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4), 0, seed)


def left_of(images: list[RoISample], layers: FullyConnected) -> list[torch.Tensor]:
    """Return what is left of ones, for each image."""
    counts = [len(each.labels) for each in images]
    with torch.no_grad():
        return list(layers(torch.ones(sum(counts), WIDTH), images).split(counts))


def alone(layer: str) -> FullyConnected:
    """Return layers of which one drops."""
    layers = layers_of()
    other = layers.get_submodule("drop7" if layer == "drop6" else "drop6")
    assert isinstance(other, nn.Dropout)
    other.p = 0.0
    return layers


def test_an_image_has_the_same_mask_alone_and_in_any_batch():
    one, two, layers = rois(5, 1), rois(3, 2), layers_of()
    together = left_of([one, two], layers)
    assert torch.equal(together[0], left_of([one], layers)[0])
    assert torch.equal(together[1], left_of([two], layers)[0])
    assert torch.equal(left_of([two, one], layers)[0], together[1])


def test_masks_do_not_depend_on_torchs_own_generator():
    torch.manual_seed(1)
    (one,) = left_of([rois(5, 1)], layers_of())
    torch.manual_seed(2)
    assert torch.equal(left_of([rois(5, 1)], layers_of())[0], one)


def test_masks_differ_by_seed_and_layer():
    found = [*left_of([rois(4, 1), rois(4, 2)], alone("drop6")), *left_of([rois(4, 1), rois(4, 2)], alone("drop7"))]
    for k, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:k])


def test_seeds_differ_by_image_mirroring_and_iteration():
    sampling = RoISampling(RoIThresholds(0.5, 0.5, 0.0), 8, 0.25)
    image = Sample("one", False, torch.zeros(3, 8, 8, dtype=torch.uint8), 1.0, torch.zeros(0, 4),
                   torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    samples = [image, replace(image, id="two"), replace(image, flipped=True)]
    seeds = [sampling.prepare(each, 3, "test", iteration).rois.dropout_seed for each in samples for iteration in (7, 8)]
    assert len(set(seeds)) == 6
    assert seeds[0] == sampling.of_image(image, torch.zeros(0, 4), 3, "test", 7).dropout_seed


@pytest.mark.parametrize("layer", ["drop6", "drop7"])
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_what_is_left_is_scaled_up(layer, p):
    layers = alone(layer)
    layers.get_submodule(layer).p = p
    (left,) = left_of([rois(400, 1)], layers)
    assert left.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert left.eq(0).float().mean().item() == pytest.approx(p, abs=0.02)


def test_gradients_go_where_the_values_went():
    layers, input = layers_of(), torch.ones(6, WIDTH, requires_grad=True)
    left = layers(input, [rois(6, 1)])
    left.sum().backward()
    assert 0 < left.eq(0).sum() < left.numel()
    assert torch.equal(input.grad, left)


def test_nothing_is_dropped_in_evaluation_or_with_probability_0():
    layers, input = layers_of(), torch.rand(3, WIDTH)
    assert torch.equal(layers.eval()(input), input)  # nobody says which RoIs are whose
    assert torch.equal(layers_of(p=0.0)(input, [rois(3, 1)]), input)


def test_training_must_say_which_rows_are_which_images():
    for images in ([rois(2, 1)],):
        with pytest.raises((RuntimeError, ValueError)):
            layers_of()(torch.ones(3, WIDTH), images)


def test_images_without_rois_take_no_part():
    layers = layers_of()
    empty, some = left_of([rois(0, 1), rois(3, 2)], layers)
    assert empty.shape == (0, WIDTH)
    assert torch.equal(some, left_of([rois(3, 2)], layers)[0])
