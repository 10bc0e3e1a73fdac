"""Joint training: what has a gradient and what has not, against compositions by hand and numerical derivatives."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_values import losses_of, means, prepared, total
from torch import Tensor, nn

from altopt.batches import sampling
from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling, RoIThresholds, sample_rois
from altopt.config import NetworkConfig, ProposalSettings
from altopt.machine.randomness import generator
from altopt.models import joint
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import FastRCNNHead, fast_rcnn_losses
from altopt.models.joint import CoordinatePath, JointTraining
from altopt.models.losses import rpn_losses
from altopt.models.rpn import AnchorSampling, RPNHead, make_proposals, sample_anchors
from altopt.ops.roi_pool import roi_pool
from altopt.ops.roi_sample import roi_sample

NETWORK = NetworkConfig(name="small", anchor_scales=(2.0, 4.0), anchor_ratios=(0.5, 1.0, 2.0), rpn_channels=8)
CLASSES = 3
SIZE = (128, 96)
SEED = (3, "test")
ANCHORS = AnchorSampling(0.7, 0.3, per_image=32, positive_fraction=0.5)
PROPOSALS = ProposalSettings(pre_nms=120, nms=0.7, post_nms=60, min_side=8)
ROIS = RoISampling(RoIThresholds(0.5, 0.5, 0.0), per_image=24, fg_fraction=0.25)
EQUAL = {"rpn_cls": 1.0, "rpn_box": 1.0, "cls": 1.0, "box": 1.0}
OBJECTS = torch.tensor([[20.0, 20, 60, 60], [70, 10, 100, 74], [1, 50, 90, 95]])
NONE = torch.zeros(0, 4)


def network_of(samples_per_bin: int) -> Any:
    """The four parts in double precision, with weights that move anchors by a fifth of their size."""
    network = SimpleNamespace(
        conv=nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Tanh()), rpn=RPNHead(4, NETWORK),
        fc=FullyConnected(4 * 3 * 3, 6), head=FastRCNNHead(6, CLASSES),
        roi_size=3, samples_per_bin=samples_per_bin)
    network.fc.drop6.p = network.fc.drop7.p = 0.0
    random = generator("weights")
    with torch.no_grad():
        for part in (network.conv, network.rpn, network.fc, network.head):
            part.double()
            for parameter in part.parameters():
                parameter.normal_(std=0.2, generator=random)
        network.head.renormalise(torch.zeros(CLASSES + 1, 4), torch.tensor([0.1, 0.1, 0.2, 0.2]).expand(4, 4))
    return network


def training_of(samples_per_bin: int = 0, path: CoordinatePath | None = None, **settings) -> JointTraining:
    return JointTraining(network_of(samples_per_bin), seed=SEED, path=path, **{
        "anchors": ANCHORS, "sigma": 3.0, "proposals": PROPOSALS, "rois": ROIS, "weights": EQUAL, **settings})


def exact_of(warmup: int = 0, clip: float = 0.0, **settings) -> JointTraining:
    return training_of(2, CoordinatePath(warmup, clip), **settings)


def sample_of(objects: Tensor = OBJECTS, id: str = "one", width: int = SIZE[0], height: int = SIZE[1]) -> Sample:
    return Sample(id, False, torch.zeros(3, height, width, dtype=torch.uint8), 1.0, objects,
                  torch.arange(len(objects)) % CLASSES)


def batch_of(*samples: Sample) -> Batch:
    height, width = (max(sample.size[k] for sample in samples) for k in (1, 0))
    pixels = torch.randn(len(samples), 3, height, width, generator=generator("pixels"), dtype=torch.float64)
    return Batch(list(samples), pixels)


BATCH = batch_of(sample_of(), sample_of(OBJECTS[:1] + 7, "two"))


def by_hand(training: JointTraining, batch: Batch, iteration: int, samples_per_bin: int) -> dict[str, Tensor]:
    """Return the four losses with constant proposals, one line after the other as the paper tells it."""
    features = training.trunk.conv(batch.images)
    logits, deltas = training.rpn(features)
    anchors = training.rpn.anchors_on(features[0])
    rois, drawn = [], []
    for b, sample in enumerate(batch.samples):
        boxes, _ = make_proposals(logits[b].detach(), deltas[b].detach(), anchors, sample, PROPOSALS)
        chosen = sample_rois(boxes, sample.gt_boxes, sample.gt_labels, count=24, fg_fraction=0.25,
                             thresholds=ROIS.thresholds,
                             random=generator(*SEED, "rois", iteration, sample.id, sample.flipped))
        rois.append(chosen)
        drawn.append(sample_anchors(sample, anchors, ANCHORS, *SEED, "anchors", iteration))
    regions = [chosen.rois for chosen in rois]
    if samples_per_bin:
        pooled = roi_sample(features, regions, 3, 1 / 16, samples_per_bin)
    else:
        pooled = roi_pool(features, regions, 3, 1 / 16)
    scores, offsets = training.head(training.fc(pooled.flatten(1)))
    of_detector = fast_rcnn_losses(training.head, scores, offsets, rois)
    return means(rpn_losses(list(zip(logits, deltas, strict=True)), drawn, sigma=3.0) | of_detector)


def with_share(training: JointTraining, batch: Batch, iteration: int, share: float) -> dict[str, Tensor]:
    """Return the losses with this share of the gradient through the coordinates, whatever the iteration says."""
    return means(training.losses(prepared(training, batch, iteration), share))


def gradients(training: JointTraining, losses: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Return the gradient of the sum of the named losses, or of all, for every parameter; 0 where there is none."""
    parameters = dict(training.named_parameters())
    total = torch.stack([losses[name] for name in names or losses]).sum()
    found = torch.autograd.grad(total, list(parameters.values()),
                                retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("iteration", [0, 7])
def test_approximate_is_the_composition_with_constant_proposals(iteration):
    training = training_of()
    losses, expected = losses_of(training, BATCH, iteration), by_hand(training, BATCH, iteration, 0)
    assert list(losses) == ["rpn_cls", "rpn_box", "cls", "box"]
    assert all(loss > 0 for loss in losses.values())
    assert_same(losses, expected)
    assert_same(gradients(training, losses), gradients(training, expected))


@pytest.mark.parametrize("training", [exact_of(warmup=8), exact_of()], ids=["warming up", "share 0"])
def test_exact_without_the_coordinate_path_is_the_composition_with_constant_proposals(training):
    losses = losses_of(training, BATCH, 7) if training.path.warmup else with_share(training, BATCH, 7, 0.0)
    expected = by_hand(training, BATCH, 7, 2)
    assert_same(losses, expected)
    assert_same(gradients(training, losses), gradients(training, expected))


def test_the_coordinate_path_changes_gradients_and_no_loss():
    training = exact_of()
    off, on = with_share(training, BATCH, 0, 0.0), losses_of(training, BATCH)
    assert_same(on, off)
    without, with_path = gradients(training, off), gradients(training, on)
    for name in without:
        changed = not torch.allclose(without[name], with_path[name], rtol=1e-6)
        assert changed == name.startswith(("trunk.conv.", "rpn.conv", "rpn.bbox_pred")), name


def test_detector_losses_reach_the_rpn_through_coordinates_alone():
    approximate, exact = training_of(), exact_of()
    none = gradients(approximate, losses_of(approximate, BATCH), "cls", "box")
    some = gradients(exact, losses_of(exact, BATCH), "cls", "box")
    for name in none:
        if name.startswith("rpn."):
            assert not none[name].any()
            assert some[name].any() == (not name.startswith("rpn.cls_score")), name  # scores only choose


def indices(monkeypatch) -> list[Tensor]:
    """Return a list that gets what every step chooses: the anchors that become proposals, labels of sampled RoIs."""
    chosen: list[Tensor] = []
    keep, sample = joint.filter_proposals, sampling.sample_rois

    def recorded_keep(*arguments):
        chosen.append(keep(*arguments))
        return chosen[-1]

    def recorded_sample(*arguments, **settings):
        result = sample(*arguments, **settings)
        chosen.append(result.labels)
        return result

    monkeypatch.setattr(joint, "filter_proposals", recorded_keep)
    monkeypatch.setattr(sampling, "sample_rois", recorded_sample)
    return chosen


@pytest.mark.parametrize("name", ["cls", "box"])
@pytest.mark.parametrize("direction", range(4))
def test_exact_gradient_of_the_box_bias_is_the_numerical_one(monkeypatch, name, direction):
    """Of the RPN's outputs for boxes, in a random direction; what is chosen stays as it is, which is checked."""
    training, chosen, step = exact_of(), indices(monkeypatch), 1e-6
    bias = training.rpn.bbox_pred.bias
    move = torch.randn(len(bias), generator=generator("direction", direction), dtype=torch.float64)
    analytical = (gradients(training, losses_of(training, BATCH, 3), name)["rpn.bbox_pred.bias"] * move).sum().item()
    values, before = [], bias.detach().clone()
    for sign in (1, -1):
        with torch.no_grad():
            bias.copy_(before + sign * step * move)
            values.append(losses_of(training, BATCH, 3)[name].item())
    assert len(chosen) == 12
    for first, again, last in zip(chosen[:4], chosen[4:8], chosen[8:], strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, last)
    assert (chosen[1] > 0).sum() + (chosen[3] > 0).sum() > 4  # foreground beyond the objects themselves
    assert analytical == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)
    assert abs(analytical) > 1e-7


@pytest.mark.parametrize(("warmup", "shares"), [
    (0, {0: 1, 100: 1}), (1, {0: 0, 1: 1, 2: 1}), (4, {0: 0, 3: 0, 4: 0.25, 5: 0.5, 7: 1, 1000: 1}),
])
def test_the_share_rises_in_a_straight_line_after_the_warmup(warmup, shares):
    assert {iteration: CoordinatePath(warmup, 0.0).share(iteration) for iteration in shares} == shares


def test_a_share_scales_what_comes_through_the_coordinates():
    training = exact_of(warmup=4)
    whole, half = (gradients(training, losses_of(training, BATCH, iteration), "cls", "box")["rpn.bbox_pred.weight"]
                   for iteration in (5, 5))
    assert torch.equal(whole, half)
    full = gradients(training, with_share(training, BATCH, 5, 1.0), "cls", "box")["rpn.bbox_pred.weight"]
    torch.testing.assert_close(half, full / 2)


def test_a_gradient_above_the_limit_is_cut_to_it_and_others_are_not():
    gradient = torch.tensor([[3.0, 0, 0, 0], [0, 0, 4, 0]])
    assert CoordinatePath(0, 0.0).limited(gradient, 1.0).norm() == 5
    assert CoordinatePath(0, 6.0).limited(gradient, 1.0).norm() == 5
    assert CoordinatePath(0, 0.5).limited(gradient, 1.0).norm().item() == pytest.approx(0.5)
    assert CoordinatePath(0, 0.5).limited(gradient, 0.5).norm().item() == pytest.approx(0.25)
    assert CoordinatePath(0, 0.5).limited(torch.zeros(2, 4), 1.0).eq(0).all()
    assert CoordinatePath(0, 0.5).limited(torch.zeros(0, 4), 1.0).shape == (0, 4)


def test_the_limit_holds_for_each_image():
    training = exact_of()
    one = Batch([BATCH.samples[0]], BATCH.images[:1])
    free = gradients(training, losses_of(training, one), "cls", "box")["rpn.bbox_pred.bias"]
    training.path = CoordinatePath(0, 1e-6)
    cut = gradients(training, losses_of(training, one), "cls", "box")["rpn.bbox_pred.bias"]
    torch.testing.assert_close(cut / cut.norm(), free / free.norm())
    assert cut.norm() < free.norm() / 10


def test_the_convolutional_layers_run_once_for_all_losses():
    training, calls = exact_of(), []
    first = next(training.trunk.conv.children())
    first.register_forward_hook(lambda layer, images, features: calls.append(len(features)))
    losses_of(training, BATCH)
    assert calls == [2]
    losses_of(training, batch_of(sample_of(), sample_of(id="narrow", width=96)))
    assert calls == [2, 1, 1]


def test_each_loss_has_its_weight():
    weights = {"rpn_cls": 2.0, "rpn_box": 3.0, "cls": 0.0, "box": 5.0}
    losses, weighted = losses_of(training_of(), BATCH), losses_of(training_of(weights=weights), BATCH)
    assert_same(weighted, {name: weights[name] * loss for name, loss in losses.items()})


def test_the_sample_depends_on_iteration_and_image_alone():
    training = training_of()
    first, again, other = losses_of(training, BATCH, 1), losses_of(training, BATCH, 1), losses_of(training, BATCH, 2)
    renamed = losses_of(training, Batch([sample_of(id="other"), BATCH.samples[1]], BATCH.images), 1)
    assert_same(first, again)
    for name in ("rpn_cls", "cls"):
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], renamed[name])


def test_proposals_follow_the_rpn_of_the_moment():
    training = training_of(weights=EQUAL | {"rpn_cls": 0.0, "rpn_box": 0.0})
    before = losses_of(training, BATCH)
    with torch.no_grad():
        training.rpn.bbox_pred.bias += 0.3
    after = losses_of(training, BATCH)
    assert not torch.equal(before["cls"], after["cls"])


@pytest.mark.parametrize("make", [training_of, exact_of], ids=["approximate", "exact"])
@pytest.mark.parametrize("samples", [
    [sample_of(NONE)], [sample_of(NONE), sample_of(id="two")], [sample_of(NONE, width=17, height=16)],
    [sample_of(torch.tensor([[2.0, 2, 6, 7]]), width=17, height=16)], [sample_of(torch.tensor([[50.0, 50, 51, 51]]))],
], ids=["no objects", "objects in one only", "neither objects nor proposals", "no proposals", "one pixel"])
def test_images_without_objects_or_proposals(make, samples):
    training = make(proposals=replace(PROPOSALS, min_side=18))
    losses = losses_of(training, batch_of(*samples))
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in training.parameters())


@pytest.mark.parametrize("make", [training_of, exact_of], ids=["approximate", "exact"])
def test_bfloat16_gives_losses_and_gradients_in_single_precision(make):
    training, expected = make().float(), losses_of(make(), BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(training, Batch(BATCH.samples, BATCH.images.float()))
    total(losses).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for name in ("rpn_cls", "rpn_box"):
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in training.parameters())


def test_single_precision_agrees_with_double():
    """In float32 as stages train; the tests above are in float64, which heads and targets must not leave."""
    exact = exact_of()
    double = losses_of(exact, BATCH)
    assert {loss.dtype for loss in double.values()} == {torch.float64}
    single = losses_of(exact.float(), Batch(BATCH.samples, BATCH.images.float()))
    assert {loss.dtype for loss in single.values()} == {torch.float32}
    for name in double:
        assert single[name].item() == pytest.approx(double[name].item(), rel=1e-4)
