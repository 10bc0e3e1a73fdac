"""Conv layers: an image's map depends on no other image, whether it is frozen or learns, stored or fresh."""

import pytest
import torch

from altopt.batches.samples import Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig
from altopt.machine.randomness import generator
from altopt.models.backbones import small
from altopt.models.detector import initialise
from altopt.models.fast_rcnn import FastRCNNHead, FastRCNNTraining
from altopt.models.frozen import conv_features, frozen_depth, frozen_features, image_map, image_maps, layers_of
from altopt.models.rpn import AnchorSampling, RPNHead, RPNTraining

CPU = torch.device("cpu")
SIZES = [(96, 80), (81, 97), (64, 112)]  # (width, height)
DEPTH = 8  # layers of conv1 and conv2, and the pooling that conv3 begins with
NETWORK = NetworkConfig(name="small", anchor_scales=(1.0, 2.0), rpn_channels=8)
RULE = AnchorSampling(0.7, 0.3, anchors_per_image=64, positive_fraction=0.5, sigma=3.0, box_weight=1.0)


@pytest.fixture(scope="module")
def conv():
    layers = small().conv.to(memory_format=torch.channels_last)
    initialise(layers, generator("conv"))
    return layers.requires_grad_(False)


@pytest.fixture(scope="module")
def samples():
    return [sample_of(f"image {k}", *size) for k, size in enumerate(SIZES)]


def sample_of(id, width, height):
    random = generator(id)
    corners = torch.rand(40, 2, generator=random) * torch.tensor([width - 20.0, height - 20])
    boxes = torch.cat([corners, corners + 10 + torch.rand(40, 2, generator=random) * 30], dim=1)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(id, False, pixels, 1.0, boxes[:2], torch.tensor([0, 1]), boxes[2:])


def stored(conv, sample, layers=None):
    features = image_map(conv, make_batch([sample], CPU).images[0], 0, layers).contiguous()
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand_as(sample.pixels)
    return Sample(sample.id, False, blank, 1.0, sample.gt_boxes, sample.gt_labels, sample.proposals, features, layers)


@pytest.fixture
def learning():
    """Layers of which the first two blocks are frozen, and the pooling behind them."""
    layers = small().conv.to(memory_format=torch.channels_last)
    initialise(layers, generator("conv"))
    for name in ("conv1", "conv2"):
        layers.get_submodule(name).requires_grad_(False)
    return layers


def test_a_map_is_the_same_bits_alone_and_in_any_batch(conv, samples):
    together = frozen_features(conv, make_batch(samples, CPU))
    for b, sample in enumerate(samples):
        alone = image_map(conv, make_batch([sample], CPU).images[0])
        height, width = alone.shape[1:]
        assert torch.equal(together[b, :, :height, :width], alone)
        assert together[b, :, height:].eq(0).all()
        assert together[b, :, :, width:].eq(0).all()
        assert not alone.requires_grad


def test_padded_images_together_would_give_other_borders(conv, samples):
    """Otherwise the test before this one says nothing."""
    batch = make_batch(samples, CPU)
    padded, alone = conv(batch.images)[0], frozen_features(conv, batch)[0]
    height, width = SIZES[0][1] // 16, SIZES[0][0] // 16
    assert not torch.allclose(padded[:, :height, :width], alone[:, :height, :width], atol=1e-3)


def test_stored_and_fresh_maps_make_equal_features(conv, samples):
    fresh = make_batch(samples, CPU)
    read = make_batch([stored(conv, sample) for sample in samples], CPU)
    assert torch.equal(frozen_features(conv, read), frozen_features(conv, fresh))
    assert [each.size for each in read.samples] == [each.size for each in fresh.samples]


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_learn_see_each_image_by_itself(learning, samples, frozen):
    learning.get_submodule("conv1").requires_grad_(not frozen)
    assert frozen_depth(learning) == (DEPTH if frozen else 0)
    together = conv_features(learning, make_batch(samples, CPU))
    assert [group for group, _ in together] == [range(1), range(1, 2), range(2, 3)]
    for sample, (_, features) in zip(samples, together, strict=True):
        batch = make_batch([sample], CPU)
        assert features.requires_grad
        assert torch.equal(features, conv_features(learning, batch)[0][1])
        assert torch.equal(features, learning(batch.images))
        assert features.is_contiguous(memory_format=torch.channels_last)


def test_neighbours_of_one_size_go_together(learning):
    alike = [sample_of(f"alike {k}", *SIZES[0]) for k in range(4)]
    together = conv_features(learning, make_batch(alike, CPU))
    assert [group for group, _ in together] == [range(2), range(2, 4)]
    for group, features in together:
        assert features.is_contiguous(memory_format=torch.channels_last)
        for b, of_one in zip(group, features, strict=True):
            alone = conv_features(learning, make_batch([alike[b]], CPU))[0][1]
            torch.testing.assert_close(of_one[None], alone, rtol=1e-4, atol=1e-5)


def test_how_deep_layers_are_frozen(learning):
    assert frozen_depth(learning) == DEPTH
    learning.conv5.requires_grad_(False)  # behind layers that learn
    assert frozen_depth(learning) == DEPTH
    learning.conv3[1].requires_grad_(False)
    assert frozen_depth(learning) == DEPTH + 2  # with its ReLU
    learning.conv1[0].bias.requires_grad_(True)
    assert frozen_depth(learning) == 0
    assert frozen_depth(learning.requires_grad_(False)) == len(layers_of(learning)) == 21
    assert frozen_depth(torch.nn.Conv2d(1, 1, 1)) == 0  # not made of blocks


def test_maps_stored_on_the_way_are_gone_on_from(conv, samples):
    expected = image_maps(conv, make_batch(samples, CPU))
    for layers in (0, 3, DEPTH, 21, None):
        found = image_maps(conv, make_batch([stored(conv, each, layers) for each in samples], CPU))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(AssertionError, match="layers that learn"):
        image_maps(conv, make_batch([stored(conv, each) for each in samples], CPU), DEPTH)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_equal_with_stored_fronts(learning, samples, precision):
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for each in (samples, [stored(learning, sample, DEPTH) for sample in samples]):
            assert all(sample.features is None or sample.features.dtype == precision for sample in each)
            module = rpn_training(learning)
            losses = module(make_batch(each, CPU), 0)
            learning.zero_grad()
            sum(losses.values()).backward()
            gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
            results.append([*losses.values(), *gradients])
    assert len(results[0]) == 2 + 2 * 6 + 6
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def rpn_training(conv):
    head = RPNHead(128, NETWORK)
    head.initialise(generator("head"))
    return RPNTraining(conv, head, RULE, (3, "test"))


def fast_rcnn_training(conv):
    fc, head = torch.nn.Sequential(torch.nn.Linear(128 * 4, 16), torch.nn.ReLU()), FastRCNNHead(16, 2)
    initialise(fc, generator("fc"))
    head.initialise(generator("head"))
    rois = RoISampling(RoIThresholds(0.5, 0.5, 0.0), per_image=16, fg_fraction=0.25)
    return FastRCNNTraining(conv, fc, head, roi_size=2, rois=rois, box_weight=1.0, key=(3, "test"))


@pytest.mark.parametrize("make", [rpn_training, fast_rcnn_training])
def test_losses_and_gradients_are_equal_with_stored_maps(conv, samples, make):
    results = []
    for batch in (make_batch(samples, CPU), make_batch([stored(conv, sample) for sample in samples], CPU)):
        module = make(conv)
        losses = module(batch, 0)
        sum(losses.values()).backward()
        gradients = [each.grad for each in module.parameters() if each.requires_grad]
        results.append([*losses.values(), *gradients])
        assert all(each.grad is None for each in conv.parameters())
    assert len(results[0]) > 4
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_rpns_loss_of_a_batch_is_the_mean_of_its_images_alone(conv, samples):
    """Padded cells have anchors too, and none of them is trained on."""
    module = rpn_training(conv)
    together = module(make_batch(samples, CPU), 0)
    alone = [module(make_batch([sample], CPU), 0) for sample in samples]
    for name, loss in together.items():
        torch.testing.assert_close(loss, torch.stack([each[name] for each in alone]).mean())
