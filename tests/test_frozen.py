"""Frozen conv layers: a picture's map depends on no other picture, and the layers above do not see the padding."""

import pytest
import torch

from altopt.backbones import small
from altopt.config import NetworkConfig
from altopt.detector import initialise
from altopt.fast_rcnn import FastRCNNHead, FastRCNNTraining
from altopt.frozen import conv_features, frozen_features, picture_map
from altopt.pictures import Sample, make_batch
from altopt.randomness import generator
from altopt.rpn import RPNHead, RPNRule, RPNTraining
from altopt.sampling import RoIRule, RoISampling

CPU = torch.device("cpu")
SIZES = [(96, 80), (81, 97), (64, 112)]  # (width, height)
NETWORK = NetworkConfig(name="small", anchor_scales=(1.0, 2.0), rpn_channels=8)
RULE = RPNRule(positive=0.7, negative=0.3, anchors_per_image=64, positive_fraction=0.5, sigma=3.0, box_weight=1.0)


@pytest.fixture(scope="module")
def conv():
    layers = small().conv.to(memory_format=torch.channels_last)
    initialise(layers, generator("conv"))
    return layers.requires_grad_(False)


@pytest.fixture(scope="module")
def samples():
    return [sample_of(f"picture {k}", *size) for k, size in enumerate(SIZES)]


def sample_of(id, width, height):
    random = generator(id)
    corners = torch.rand(40, 2, generator=random) * torch.tensor([width - 20.0, height - 20])
    boxes = torch.cat([corners, corners + 10 + torch.rand(40, 2, generator=random) * 30], dim=1)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(id, False, pixels, 1.0, boxes[:2], torch.tensor([0, 1]), boxes[2:])


def stored(conv, sample):
    features = picture_map(conv, make_batch([sample], CPU).images[0])
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand_as(sample.pixels)
    return Sample(sample.id, False, blank, 1.0, sample.objects, sample.classes, sample.proposals, features)


def test_a_map_is_the_same_bits_alone_and_in_any_batch(conv, samples):
    together = frozen_features(conv, make_batch(samples, CPU))
    for b, sample in enumerate(samples):
        alone = picture_map(conv, make_batch([sample], CPU).images[0])
        height, width = alone.shape[1:]
        assert torch.equal(together[b, :, :height, :width], alone)
        assert together[b, :, height:].eq(0).all()
        assert together[b, :, :, width:].eq(0).all()
        assert not alone.requires_grad


def test_padded_pictures_together_would_give_other_borders(conv, samples):
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


def test_layers_that_learn_see_all_pictures_at_once(samples):
    layers = small().conv
    initialise(layers, generator("conv"))
    for name in ("conv1", "conv2"):
        layers.get_submodule(name).requires_grad_(False)
    batch = make_batch(samples, CPU)
    features = conv_features(layers, batch)
    assert features.requires_grad
    assert torch.equal(features, layers(batch.images))


def rpn_training(conv):
    head = RPNHead(128, NETWORK)
    head.initialise(generator("head"))
    return RPNTraining(conv, head, RULE, (3, "test"))


def fast_rcnn_training(conv):
    fc, head = torch.nn.Sequential(torch.nn.Linear(128 * 4, 16), torch.nn.ReLU()), FastRCNNHead(16, 2)
    initialise(fc, generator("fc"))
    head.initialise(generator("head"))
    rois = RoISampling(RoIRule(0.5, 0.5, 0.0), per_image=16, fg_fraction=0.25)
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


def test_the_rpns_loss_of_a_batch_is_the_mean_of_its_pictures_alone(conv, samples):
    """Padded cells have anchors too, and none of them is trained on."""
    module = rpn_training(conv)
    together = module(make_batch(samples, CPU), 0)
    alone = [module(make_batch([sample], CPU), 0) for sample in samples]
    for name, loss in together.items():
        torch.testing.assert_close(loss, torch.stack([each[name] for each in alone]).mean())
