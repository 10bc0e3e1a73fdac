"""Dropout's masks: each image's own, whatever images share the batch."""

import pytest
import torch
from torch import nn

from altopt.batches.samples import Sample
from altopt.models.backbones import fully_connected
from altopt.models.dropout import PerImageDropout, seed_dropout
from altopt.ops.targets import RoISample

NONE = torch.zeros(0, 4)
KEY = (3, "test", 7)


def image(id: str, flipped: bool = False) -> Sample:
    return Sample(id, flipped, torch.zeros(3, 8, 8, dtype=torch.uint8), 1.0, NONE, torch.zeros(0, dtype=torch.int64))


def rois(count: int) -> RoISample:
    return RoISample(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4), 0)


def dropped(images: list[Sample], counts: list[int], *key: object, p: float = 0.5) -> list[torch.Tensor]:
    """Return what is left of ones, for each image."""
    layer = PerImageDropout(p)
    seed_dropout(layer, [rois(count) for count in counts], images, *key)
    return list(layer(torch.ones(sum(counts), 40)).split(counts))


def test_a_image_has_the_same_mask_alone_and_in_any_batch():
    one, two = image("one"), image("two")
    together = dropped([one, two], [5, 3], *KEY)
    assert torch.equal(together[0], dropped([one], [5], *KEY)[0])
    assert torch.equal(together[1], dropped([two], [3], *KEY)[0])
    assert torch.equal(dropped([two, one], [3, 5], *KEY)[0], together[1])


def test_masks_differ_by_image_mirroring_iteration_and_layer():
    found = [*dropped([image("one"), image("two"), image("one", flipped=True)], [4, 4, 4], *KEY),
             *dropped([image("one")], [4], 3, "test", 8)]
    layers = fully_connected(40, 40)
    seed_dropout(layers, [rois(4)], [image("one")], *KEY)
    found += [layers.get_submodule(name)(torch.ones(4, 40)) for name in ("drop6", "drop7")]
    for k, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:k])


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_what_is_left_is_scaled_up(p):
    (left,) = dropped([image("one")], [400], *KEY, p=p)
    assert left.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert left.eq(0).float().mean().item() == pytest.approx(p, abs=0.02)


def test_gradients_go_where_the_values_went():
    layer, input = PerImageDropout(0.5), torch.ones(6, 8, requires_grad=True)
    seed_dropout(layer, [rois(6)], [image("one")], *KEY)
    left = layer(input)
    left.sum().backward()
    assert torch.equal(input.grad, left)


def test_nothing_is_dropped_in_evaluation_or_with_probability_0():
    layer, input = PerImageDropout(0.5), torch.rand(3, 8)
    seed_dropout(layer, [rois(3)], [image("one")], *KEY)
    assert torch.equal(layer.eval()(input), input)
    layer.train().p = 0.0
    assert torch.equal(layer(input), input)


def test_without_keys_it_is_torchs_own():
    input = torch.ones(4, 8)
    torch.manual_seed(1)
    expected = nn.Dropout(0.5)(input)
    torch.manual_seed(1)
    assert torch.equal(PerImageDropout(0.5)(input), expected)


def test_images_without_rois_take_no_part():
    empty, some = dropped([image("one"), image("two")], [0, 3], *KEY)
    assert empty.shape == (0, 40)
    assert torch.equal(some, dropped([image("two")], [3], *KEY)[0])
