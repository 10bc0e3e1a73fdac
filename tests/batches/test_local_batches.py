"""Gradients of slices add up to those of the whole batch: of two images to the last bit, of more but for rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_runs import in_ranks

from altopt.batches.local_batches import LocalBatches
from altopt.batches.samples import Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig, ProposalSettings
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.fast_rcnn import FastRCNNTraining
from altopt.models.joint import JointTraining
from altopt.models.rpn import AnchorSampling, RPNTraining

NETWORK = NetworkConfig(name="small", short_side=80, max_side=96, anchor_scales=(1.5, 3), rpn_channels=8)
ANCHORS = AnchorSampling(0.7, 0.3, 64, 0.5, 3.0, 1.0)
ROIS = RoIThresholds(0.5, 0.5, 0.0)
SIZES = ((96, 80), (64, 96), (80, 112), (64, 64), (96, 48))  # no two alike: each pads the others


def sample(number, precision):
    width, height = SIZES[number]
    random = generator("slices", number)
    corners = torch.rand(12 + 4 * number, 2, generator=random) * torch.tensor([width - 32, height - 32])
    boxes = torch.cat([corners, corners + 16 + 16 * torch.rand(corners.shape, generator=random)], dim=1).to(precision)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(str(number), False, pixels, 1.0, boxes[:2], torch.tensor([0, 1]), boxes[2:])


def network_of(precision):
    network = FasterRCNN(NETWORK, 2)
    network.conv.to_empty(device="cpu")
    conv = {f"conv.{name}": torch.randn(tensor.shape, generator=generator(name)) * 0.1
            for name, tensor in network.conv.state_dict().items()}
    network.fill(conv, generator("slices"))
    return network.to(precision)


def modules(precision):
    """Yield each kind of training, on a network of its own, as stages have."""
    key = (3, "slices")
    network = network_of(precision)
    yield RPNTraining(network.conv, network.rpn, ANCHORS, key)
    network = network_of(precision)
    yield FastRCNNTraining(network.conv, network.fc, network.head, roi_size=network.roi_size,
                           rois=RoISampling(ROIS, 32, 0.25), box_weight=1.0, key=key)
    weights = dict.fromkeys(("rpn_cls", "rpn_box", "cls", "box"), 1.0)
    yield JointTraining(network_of(precision), anchors=ANCHORS, rois=RoISampling(ROIS, 32, 0.25), weights=weights,
                        path=None, key=key, proposals=ProposalSettings(pre_nms=200, nms=0.7, post_nms=30, min_side=4))


def gradients(ranks, count, precision=torch.float64):
    """Of each kind of training on the first images: the losses' sum, and a number for each parameter's gradient."""
    slices = LocalBatches(ranks, [range(count)])
    found = []
    for module in modules(precision):
        batch = make_batch([sample(number, precision) for number in slices[0]], torch.device("cpu"))
        batch = slices.begin(replace(batch, images=batch.images.to(precision)), 0)
        total = torch.stack(list(module(batch, 0).values())).sum()
        total.backward()
        ranks.sum_gradients(module.parameters())
        found.append(float(ranks.all_reduce_sum(total.detach().double())))
        for name, parameter in module.named_parameters():
            probe = torch.randn(parameter.shape, generator=generator(name), dtype=torch.float64)
            found.append(float((parameter.grad * probe).sum()) if parameter.grad is not None else 0.0)
    return found


def of_both(ranks):
    return gradients(ranks, 5), gradients(ranks, 2)


def of_two(ranks):
    """The gradients alone: losses, which are only read by people, are added up in another precision."""
    sizes = [len(list(module.parameters())) for module in modules(torch.float32)]
    found = iter(gradients(ranks, 2, torch.float32))
    return [[next(found) for _ in range(1 + size)][1:] for size in sizes]


@pytest.fixture(scope="module")
def alone():
    return of_both(SingleProcess())


def test_slices_of_any_number_of_ranks_add_up_to_the_batch(alone):
    for each in in_ranks(3, of_both):
        for ours, theirs in zip(each, alone, strict=True):
            assert np.abs(theirs).max() > 1
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_of_two_images_are_the_same_bits_with_any_number_of_ranks():
    """A sum of two does not depend on their order; each image goes through the network by itself."""
    alone = in_ranks(1, of_two)[0]
    assert all(np.abs(each).max() > 1 for each in alone)
    assert in_ranks(2, of_two) == [alone] * 2
    assert in_ranks(3, of_two) == [alone] * 3
