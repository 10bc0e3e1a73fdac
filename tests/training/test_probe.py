"""Gradients of the shared layers with and without the coordinate path, against backward passes by hand."""

import pytest
import torch
from loss_values import means, prepared, total

from altopt.batches.samples import Batch, Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig, ProposalSettings
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.joint import CoordinatePath, JointTraining
from altopt.models.network_parts import initialise
from altopt.models.rpn import AnchorSampling
from altopt.training.probe import compare_gradients

NETWORK = NetworkConfig(name="small", anchor_scales=(1.5, 3.0), rpn_channels=8)
OBJECTS = torch.tensor([[20.0, 20, 60, 60], [30, 10, 90, 64]])
BLOCKS = ("conv1", "conv2", "conv3", "conv4", "conv5")
EQUAL = {"rpn_cls": 1.0, "rpn_box": 1.0, "cls": 1.0, "box": 1.0}


def module_of(**weights: float) -> JointTraining:
    network = FasterRCNN(NETWORK, 3)
    network.conv.to_empty(device="cpu")
    random = generator("conv")
    for name, layer in network.conv.named_modules():
        initialise(name, layer, random)
    network.fill({f"conv.{name}": tensor for name, tensor in network.conv.state_dict().items()}, generator("heads"))
    network.samples_per_bin = 2
    with torch.no_grad():
        network.rpn.bbox_pred.weight.mul_(10)
        network.head.bbox_pred.weight.mul_(50)
    return JointTraining(
        network, anchors=AnchorSampling(0.7, 0.3, 64, 0.5), sigma=3.0,
        proposals=ProposalSettings(post_nms=50, min_side=4),
        rois=RoISampling(RoIThresholds(0.5, 0.5, 0.0), 16, 0.25), weights=EQUAL | weights, path=CoordinatePath(0, 0.0),
        seed=("test",)).eval()


def image(id: str, objects: torch.Tensor = OBJECTS) -> Batch:
    pixels = torch.randint(0, 256, (3, 80, 96), dtype=torch.uint8, generator=generator(id))
    return make_batch([Sample(id, False, pixels, 1.0, objects, torch.arange(len(objects)))], torch.device("cpu"))


def images(module: JointTraining, *batches: Batch) -> list[Batch]:
    """Return the batches as the iterations 0, 1, ... train on them."""
    return [prepared(module, batch, iteration) for iteration, batch in enumerate(batches)]


def by_hand(batches: list[Batch], block: str, share: float, *names: str) -> torch.Tensor:
    """Return the gradient of a block, or of all for an empty name, added up by backward passes."""
    module = module_of()
    for batch in images(module, *batches):
        losses = means(module.losses(batch, share))
        total({name: losses[name] for name in names}).backward()
    return torch.cat([parameter.grad.flatten() for name, parameter in module.trunk.conv.named_parameters()
                      if name.startswith(block)]).double()


def test_rows_are_those_of_backward_passes():
    batches = [image("one"), image("two"), image("three", OBJECTS[:1])]
    module = module_of()
    rows = compare_gradients(module, images(module, *batches))
    assert [row.block for row in rows] == [*BLOCKS, "all"] * 2
    assert [row.losses for row in rows] == [("cls", "box")] * 6 + [("rpn_cls", "rpn_box", "cls", "box")] * 6
    for row in rows:
        block = "" if row.block == "all" else row.block
        without, with_path = (by_hand(batches, block, share, *row.losses) for share in (0.0, 1.0))
        assert row.cosine == pytest.approx(torch.cosine_similarity(without, with_path, dim=0).item(), rel=1e-4)
        assert row.norm_ratio == pytest.approx((with_path.norm() / without.norm()).item(), rel=1e-4)
        assert row.cosine < 0.99999


def test_without_proposals_the_two_are_one():
    module = module_of()
    module.proposals = ProposalSettings(post_nms=50, min_side=1000)
    for row in compare_gradients(module, images(module, image("one"))):
        assert row.cosine == pytest.approx(1, abs=1e-9)
        assert row.norm_ratio == pytest.approx(1, abs=1e-9)


def test_what_is_not_defined_is_none():
    module = module_of(cls=0.0, box=0.0)
    rows = compare_gradients(module, images(module, image("one")))
    assert {(row.cosine, row.norm_ratio) for row in rows[:6]} == {(None, None)}
    assert all(row.cosine == pytest.approx(1) for row in rows[6:])


def test_probing_leaves_the_network_as_it_was():
    module = module_of()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    compare_gradients(module, images(module, image("one"), image("none", torch.zeros(0, 4))))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
