"""Any number of processes take the step that one takes on the whole batch, but for rounding."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from loss_values import losses_of, prepared, total
from rank_runs import in_ranks

from altopt.batches.local_batches import LocalBatches
from altopt.batches.samples import Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig, ProposalSettings, TrainingConfig
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import FastRCNNHead, FastRCNNTraining
from altopt.models.joint import CoordinatePath, JointTraining
from altopt.models.region_classifier import PyramidTraining, RegionClassifier, WarpedTraining
from altopt.models.rpn import AnchorSampling, RPNTraining
from altopt.training.loop import make_optimizer, train_step

NETWORK = NetworkConfig(name="small", anchor_scales=(1.5, 3), rpn_channels=8)
ANCHORS = AnchorSampling(0.7, 0.3, per_image=64, positive_fraction=0.5)
ROIS = RoISampling(RoIThresholds(0.5, 0.5, 0.0), per_image=16, fg_fraction=0.25)
SIZES = ((64, 48), (48, 64), (48, 64), (64, 64), (80, 48))  # two alike go together, unless processes part them
SEED = (3, "local batches")
STILL = TrainingConfig(lr=0.0)  # gradients are looked at, and weights stay as they are
LEVELS = (3, 1)


def sample(number, precision):
    width, height = SIZES[number]
    random = generator("local batches", number)
    corners = torch.rand(12 + 4 * number, 2, generator=random) * torch.tensor([width - 32, height - 32])
    boxes = torch.cat([corners, corners + 16 + 16 * torch.rand(corners.shape, generator=random)], dim=1).to(precision)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(str(number), False, pixels, 1.0, boxes[:2], torch.tensor([0, 1]), boxes[2:])


def filled(network, precision):
    """Return the network with few features behind fc6 and fc7, to be quick, and random weights."""
    with torch.device("meta"):
        network.fc = FullyConnected(network.fc.fc6.in_features, 16)
        network.head = (FastRCNNHead(16, 2) if isinstance(network, FasterRCNN)
                        else torch.nn.Sequential(OrderedDict(cls_score=torch.nn.Linear(16, 3))))
    conv = {f"conv.{name}": torch.randn(tensor.shape, generator=generator(name)) * 0.1
            for name, tensor in network.conv.state_dict().items()}
    network.fill(conv, generator("local batches"))
    return network.to(precision).train()


def rpn(precision):
    network = filled(FasterRCNN(NETWORK, 2), precision)
    return RPNTraining(network.conv, network.rpn, anchors=ANCHORS, sigma=3.0, box_weight=1.0, seed=SEED)


def fast_rcnn(precision):
    return FastRCNNTraining(filled(FasterRCNN(NETWORK, 2), precision), rois=ROIS, cls_weight=1.0, box_weight=1.0,
                            seed=SEED)


def joint(precision, samples_per_bin=0, path=None):
    network = filled(FasterRCNN(NETWORK, 2), precision)
    network.samples_per_bin = samples_per_bin
    return JointTraining(
        network, anchors=ANCHORS, sigma=3.0, rois=ROIS, path=path, seed=SEED,
        weights=dict.fromkeys(("rpn_cls", "rpn_box", "cls", "box"), 1.0),
        proposals=ProposalSettings(pre_nms=200, nms=0.7, post_nms=30, min_side=4))


def exact_joint(precision):
    return joint(precision, samples_per_bin=2, path=CoordinatePath(0, 1.0))


def pyramid(precision):
    network = filled(RegionClassifier(NETWORK, 2, LEVELS), precision)
    network.conv.requires_grad_(False)
    return PyramidTraining(network, LEVELS, ROIS, SEED)


def warped(precision):
    return WarpedTraining(filled(RegionClassifier(NETWORK, 2), precision), 32, replace(ROIS, per_image=4), SEED)


KINDS = (rpn, fast_rcnn, joint, exact_joint, pyramid, warped)
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest entry


def batch_of(numbers, precision):
    batch = make_batch([sample(number, precision) for number in numbers], torch.device("cpu"))
    return replace(batch, images=batch.images.to(precision))


def deviation(ours, theirs):
    """Return the greatest difference between tensors, as a share of the greatest value."""
    return max((one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True)) / max(
        other.abs().max().item() for other in theirs)


def gradients(module):
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in module.parameters()]


def deviations(group):
    """Return how far losses and gradients are from those of one backward pass, by kind, batch size and precision."""
    found = {}
    for precision in LIMITS:
        for kind in KINDS:
            module = kind(precision)
            for count in (5, group.count - 1) if group.count > 1 and precision == torch.float64 else (5,):
                expected = losses_of(module, batch_of(range(count), precision))
                module.zero_grad()
                total(expected).backward()
                alone = gradients(module)
                batches = LocalBatches(group, [range(count)])
                batch = prepared(module, batch_of(batches[0], precision))
                idle = batches.idle(0)
                step = train_step(module, make_optimizer(module, STILL), batch, STILL, group, idle)
                own, losses = step.losses()
                assert losses.keys() == expected.keys()
                assert not idle or not any(own.values())
                apart = deviation([torch.tensor(value, dtype=torch.float64) for value in losses.values()],
                                  [expected[name].detach().double() for name in losses])
                found[kind.__name__, count, str(precision)] = apart, deviation(gradients(module), alone)
                assert sum(bool(each.any()) for each in alone) >= 4
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_take_the_step_of_the_whole_batch(processes):
    """Each kind of training, with dropout where it has some, also on fewer images than there are processes."""
    for found in [deviations(SingleProcess())] if processes == 1 else in_ranks(processes, deviations):
        assert len(found) == len(KINDS) * (2 if processes == 1 else 3)
        for (kind, count, precision), apart in found.items():
            limit = next(limit for each, limit in LIMITS.items() if str(each) == precision)
            assert max(apart) < limit, (kind, count, precision, apart)



@pytest.mark.parametrize(("entries", "processes", "parts"), [
    (5, 1, [[0, 1, 2, 3, 4]]), (5, 2, [[0, 1], [2, 3, 4]]), (5, 3, [[0], [1, 2], [3, 4]]), (2, 2, [[0], [1]]),
    (2, 3, [[], [0], [1]]), (1, 3, [[], [], [0]]),
])
def test_parts_are_neighbours_and_together_the_batch(entries, processes, parts):
    order = [[-1], list(range(entries))]
    for rank, own in enumerate(parts):
        group = SingleProcess()
        group.rank, group.count = rank, processes
        batches = LocalBatches(group, order)
        assert batches[1] == (own or [0])  # one for whom nothing is left does as the others do
        assert batches.idle(1) == (not own)
        assert batches.size(1) == entries
