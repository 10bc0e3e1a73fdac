"""Conv layers: an image's map depends on no other image, whether it is frozen or learns, stored or fresh."""

from types import SimpleNamespace

import pytest
import torch
from loss_values import losses_of, total

from altopt.batches.samples import Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig
from altopt.machine.randomness import generator
from altopt.models.backbones import small
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import FastRCNNHead, FastRCNNTraining
from altopt.models.network_parts import initialise
from altopt.models.rpn import AnchorSampling, RPNHead, RPNTraining
from altopt.models.trunk import Trunk, image_maps, of_one_size, own_images, together

CPU = torch.device("cpu")
SIZES = [(96, 80), (81, 97), (64, 112)]  # (width, height)
NETWORK = NetworkConfig(name="small", anchor_scales=(1.0, 2.0), rpn_channels=8)


def initialised(part, name):
    random = generator(name)
    for path, layer in part.named_modules(prefix=name):
        initialise(path, layer, random)
    return part


def layers():
    return initialised(small().conv, "conv").to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def conv():
    return layers().requires_grad_(False)


@pytest.fixture
def learning():
    """Layers of which the first two blocks are frozen."""
    conv = layers()
    for name in ("conv1", "conv2"):
        conv.get_submodule(name).requires_grad_(False)
    return conv


@pytest.fixture(scope="module")
def samples():
    return [sample_of(f"image {k}", *size) for k, size in enumerate(SIZES)]


def sample_of(id, width, height):
    random = generator(id)
    corners = torch.rand(40, 2, generator=random) * torch.tensor([width - 20.0, height - 20])
    boxes = torch.cat([corners, corners + 10 + torch.rand(40, 2, generator=random) * 30], dim=1)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(id, False, pixels, 1.0, boxes[:2], torch.tensor([0, 1]), boxes[2:])


def stored(conv, sample):
    (features,) = image_maps(conv, make_batch([sample], CPU))
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8).expand_as(sample.pixels)
    return Sample(sample.id, False, blank, 1.0, sample.gt_boxes, sample.gt_labels, sample.proposals,
                  features.contiguous())


def same(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_frozen_map_is_the_same_bits_alone_and_in_any_batch(conv, samples):
    maps = Trunk(conv)(make_batch(samples, CPU))
    for features, sample in zip(maps, samples, strict=True):
        (alone,) = image_maps(conv, make_batch([sample], CPU))
        assert features.shape == (128, sample.size[1] // 16, sample.size[0] // 16)
        assert torch.equal(features, alone)
        assert not features.requires_grad
    alike = [sample_of(f"alike {k}", *SIZES[0]) for k in range(3)]  # not even those go through together
    assert same(Trunk(conv)(make_batch(alike, CPU)), [Trunk(conv)(make_batch([each], CPU))[0] for each in alike])


def test_padded_images_together_would_give_other_borders(conv, samples):
    """Otherwise the test before this one says nothing."""
    batch = make_batch(samples, CPU)
    padded, alone = conv(batch.images)[0], Trunk(conv)(batch)[0]
    assert not torch.allclose(padded[:, :alone.shape[1], :alone.shape[2]], alone, atol=1e-3)


def test_stored_and_fresh_maps_are_the_same(conv, learning, samples):
    fresh = make_batch(samples, CPU)
    read = make_batch([stored(conv, sample) for sample in samples], CPU)
    expected = Trunk(conv)(fresh)
    assert same(Trunk(conv)(read), expected)
    assert same(Trunk(learning)(read), expected)  # what is stored is taken, whatever would learn
    assert [each.size for each in read.samples] == [each.size for each in fresh.samples]


@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_learn_see_each_image_by_itself(learning, samples, frozen):
    learning.get_submodule("conv1").requires_grad_(not frozen)
    for sample, features in zip(samples, Trunk(learning)(make_batch(samples, CPU)), strict=True):
        batch = make_batch([sample], CPU)
        assert features.requires_grad
        assert torch.equal(features, Trunk(learning)(batch)[0])
        assert torch.equal(features, learning(batch.images)[0])


def test_neighbours_of_one_size_go_together_where_layers_learn(learning):
    images = [sample_of(f"image {k}", *SIZES[size]) for k, size in enumerate((0, 0, 1, 0, 0))]
    calls = []
    learning.register_forward_pre_hook(lambda conv, given: calls.append(given[0]))
    maps = Trunk(learning)(make_batch(images, CPU))
    assert [len(each) for each in calls] == [2, 1, 2]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in calls)
    for features, sample in zip(maps, images, strict=True):
        torch.testing.assert_close(features, Trunk(learning)(make_batch([sample], CPU))[0], rtol=1e-4, atol=1e-5)


def test_images_lose_their_padding(samples):
    for image, sample in zip(own_images(make_batch(samples, CPU)), samples, strict=True):
        assert torch.equal(image, make_batch([sample], CPU).images[0])


@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_together_lies_in_channels_last_layout(count):
    """A batch of one has several strides that mean the same; oneDNN looks at them."""
    random = generator("together")
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = torch.randn(count, 3, 5, 7, generator=random).contiguous(memory_format=layout)
        made = together(list(batch))
        assert torch.equal(made, batch)
        assert made.stride() == (105, 1, 21, 3)


def test_images_of_one_size_keep_their_order():
    images = [torch.full((1, *size), float(k)) for k, size in enumerate([(2, 3), (3, 2), (3, 2), (2, 3)])]
    groups = list(of_one_size(images))
    assert [each.shape for each in groups] == [(1, 1, 2, 3), (2, 1, 3, 2), (1, 1, 2, 3)]
    assert [image[0, 0, 0].item() for group in groups for image in group] == [0, 1, 2, 3]
    assert list(of_one_size([])) == []


def rpn_training(conv):
    head = initialised(RPNHead(128, NETWORK), "rpn")
    return RPNTraining(conv, head, anchors=AnchorSampling(0.7, 0.3, per_image=64, positive_fraction=0.5), sigma=3.0,
                       box_weight=1.0, seed=(3, "test"))


def fast_rcnn_training(conv):
    network = SimpleNamespace(conv=conv, fc=initialised(FullyConnected(128 * 4, 16), "fc"),
                              head=initialised(FastRCNNHead(16, 2), "head"), roi_size=2)
    rois = RoISampling(RoIThresholds(0.5, 0.5, 0.0), per_image=16, fg_fraction=0.25)
    return FastRCNNTraining(network, rois=rois, cls_weight=1.0, box_weight=1.0, seed=(3, "test"))


@pytest.mark.parametrize("make", [rpn_training, fast_rcnn_training])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_equal_with_stored_maps(conv, samples, make, precision):
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for each in (samples, [stored(conv, sample) for sample in samples]):
            assert all(sample.features is None or sample.features.dtype == precision for sample in each)
            module = make(conv)
            losses = losses_of(module, make_batch(each, CPU))
            total(losses).backward()
            gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
            assert all(gradient.any() for gradient in gradients)
            results.append([*losses.values(), *gradients])
            assert all(parameter.grad is None for parameter in conv.parameters())
    assert len(results[0]) > 4
    assert same(*results)


def test_the_rpns_loss_of_a_batch_is_the_mean_of_its_images_alone(learning, samples):
    module = rpn_training(learning)
    alone = [losses_of(module, make_batch([sample], CPU)) for sample in samples]
    for name, loss in losses_of(module, make_batch(samples, CPU)).items():
        torch.testing.assert_close(loss, torch.stack([each[name] for each in alone]).mean())
