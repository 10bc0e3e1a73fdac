"""The RPN: how its outputs are laid out, its losses, and the proposals it makes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from loss_values import losses_of, total
from torch import nn

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import label_anchors, subsample_labels
from altopt.config import NetworkConfig, ProposalSettings
from altopt.machine.randomness import generator
from altopt.models.network_parts import initialise
from altopt.models.rpn import AnchorSampling, RPNHead, RPNTraining, make_proposals
from altopt.ops import boxes as bx
from altopt.ops.anchors import reference_anchors

NETWORK = NetworkConfig(name="small", anchor_scales=(2.0, 4.0), anchor_ratios=(0.5, 1.0, 2.0), rpn_channels=8)
ALL = AnchorSampling(0.7, 0.3, per_image=10_000, positive_fraction=1.0)
OBJECTS = torch.tensor([[20.0, 20, 60, 60], [70, 10, 100, 74]])


def sample_of(objects: torch.Tensor, id: str = "one", width: int = 128, height: int = 96, scale: float = 1.0) -> Sample:
    return Sample(id, False, torch.zeros(3, height, width, dtype=torch.uint8), scale, objects,
                  torch.zeros(len(objects), dtype=torch.int64))


def head_of(channels: int = 4, network: NetworkConfig = NETWORK, std: float = 0.2) -> RPNHead:
    head = RPNHead(channels, network)
    random = generator("head")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=std, generator=random)
    return head


def training_of(anchors: AnchorSampling = ALL, box_weight: float = 1.0) -> RPNTraining:
    conv = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.ReLU())
    random = generator("conv")
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.1, generator=random)
    return RPNTraining(conv, head_of(), anchors=anchors, sigma=3.0, box_weight=box_weight, seed=(3, "test"))


def batch_of(*samples: Sample) -> Batch:
    height, width = (max(sample.size[k] for sample in samples) for k in (1, 0))
    return Batch(list(samples), torch.randn(len(samples), 3, height, width, generator=generator("pixels")))


def test_outputs_lie_in_the_anchors_order():
    """Channels that say where they are and which they are must meet the anchor of that place and kind."""
    network = NetworkConfig(name="small", rpn_channels=2)
    head = RPNHead(2, network)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        for k in (0, 1):
            head.conv.weight[k, k, 1, 1] = 1
        head.cls_score.weight[:] = torch.tensor([10000.0, 100])[None, :, None, None]
        head.bbox_pred.weight[:] = torch.tensor([10000.0, 100])[None, :, None, None]
        head.cls_score.bias[:] = torch.arange(18)
        head.bbox_pred.bias[:] = torch.arange(36)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    features = torch.stack([rows, columns])[None].repeat(2, 1, 1, 1)
    logits, deltas = head(features)
    anchors = head.anchors_on(features[0])
    assert logits.shape == (2, 4 * 5 * 9, 2)
    assert deltas.shape == (2, 4 * 5 * 9, 4)
    assert anchors.shape == (4 * 5 * 9, 4)
    reference = reference_anchors(16, network.anchor_ratios, network.anchor_scales)
    n = 0
    for row in range(4):
        for column in range(5):
            for a in range(9):
                place = 10000 * row + 100 * column
                for b in (0, 1):
                    assert logits[b, n].tolist() == [place + a, place + 9 + a]  # 9 of background, then 9 of objects
                    assert deltas[b, n].tolist() == [place + 4 * a + k for k in range(4)]
                shift = torch.tensor([column, row, column, row]) * 16
                assert torch.equal(anchors[n], reference[a] + shift)
                n += 1


def test_channels_are_the_papers():
    head = RPNHead(512, NetworkConfig())
    assert head.conv.weight.shape == (512, 512, 3, 3)
    assert head.cls_score.weight.shape == (18, 512, 1, 1)
    assert head.bbox_pred.weight.shape == (36, 512, 1, 1)


def test_initial_weights_are_gaussian_and_repeatable():
    head, again = RPNHead(64, NetworkConfig(rpn_channels=64)), RPNHead(64, NetworkConfig(rpn_channels=64))
    for each in (head, again):
        random = generator(1)
        for name, layer in each.named_children():
            initialise(f"rpn.{name}", layer, random)
    for layer in (head.conv, head.cls_score, head.bbox_pred):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert layer.bias.eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def slow_losses(logits: np.ndarray, deltas: np.ndarray, anchors: np.ndarray, objects: np.ndarray,
                labels: np.ndarray) -> tuple[float, float]:
    """Return the two losses of an image for given labels, anchor by anchor."""
    used = [n for n in range(len(labels)) if labels[n] >= 0]
    classification = box = 0.0
    for n in used:
        classification += math.log(np.exp(logits[n]).sum()) - logits[n][labels[n]]
        if labels[n] == 1:
            a = anchors[n]
            overlaps = []
            for g in objects:
                w, h = min(a[2], g[2]) - max(a[0], g[0]), min(a[3], g[3]) - max(a[1], g[1])
                shared = max(w, 0) * max(h, 0)
                overlaps.append(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (g[2] - g[0]) * (g[3] - g[1]) - shared))
            g = objects[int(np.argmax(overlaps))]
            width, height = a[2] - a[0], a[3] - a[1]
            target = [((g[0] + g[2]) - (a[0] + a[2])) / 2 / width, ((g[1] + g[3]) - (a[1] + a[3])) / 2 / height,
                      math.log((g[2] - g[0]) / width), math.log((g[3] - g[1]) / height)]
            for d in np.abs(deltas[n] - np.array(target)):
                box += 4.5 * d * d if d < 1 / 9 else d - 0.5 / 9
    return classification / len(used), box / len(used)


def test_losses_of_two_images_against_the_loop():
    training = training_of()
    other = torch.tensor([[5.0, 5, 40, 50], [50, 25, 90, 60]])
    batch = batch_of(sample_of(OBJECTS), sample_of(other, "two"))
    losses = losses_of(training, batch)
    features = training.trunk.conv(batch.images)
    logits, deltas = (each.detach().double().numpy() for each in training.rpn(features))
    anchors = training.rpn.anchors_on(features[0])
    expected = []
    for b, sample in enumerate(batch.samples):
        labels = label_anchors(anchors, sample.gt_boxes, (128, 96), 0.7, 0.3)[0].numpy()
        assert (labels == 1).sum() > 1
        assert (labels == 0).sum() > 20
        boxes = anchors.double().numpy()
        expected.append(slow_losses(logits[b], deltas[b], boxes, sample.gt_boxes.double().numpy(), labels))
    assert losses["rpn_cls"].item() == pytest.approx(np.mean([one[0] for one in expected]), rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(np.mean([one[1] for one in expected]), rel=1e-4)


SIXTEEN = AnchorSampling(0.7, 0.3, 16, 0.5)


def test_losses_are_divided_by_what_is_sampled():
    training = training_of(SIXTEEN)
    batch = batch_of(sample_of(OBJECTS))
    losses = losses_of(training, batch, 5)
    features = training.trunk.conv(batch.images)
    logits, deltas = (each.detach().double().numpy()[0] for each in training.rpn(features))
    anchors = training.rpn.anchors_on(features[0])
    labels = subsample_labels(label_anchors(anchors, OBJECTS, (128, 96), 0.7, 0.3)[0], 16, 0.5,
                            generator(3, "test", 5, "one", False))
    assert (labels >= 0).sum() == 16
    expected = slow_losses(logits, deltas, anchors.double().numpy(), OBJECTS.double().numpy(), labels.numpy())
    assert losses["rpn_cls"].item() == pytest.approx(expected[0], rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(expected[1], rel=1e-4)
    weighted = losses_of(training_of(SIXTEEN, box_weight=10), batch, 5)
    assert weighted["rpn_box"].item() == pytest.approx(10 * losses["rpn_box"].item())
    assert weighted["rpn_cls"].item() == losses["rpn_cls"].item()


def test_the_sample_depends_on_iteration_and_image_alone():
    training = training_of(SIXTEEN)
    batch = batch_of(sample_of(OBJECTS))
    first = losses_of(training, batch, 1)["rpn_cls"]
    assert torch.equal(first, losses_of(training, batch, 1)["rpn_cls"])
    assert not torch.equal(first, losses_of(training, batch, 2)["rpn_cls"])
    renamed = Batch([sample_of(OBJECTS, "other")], batch.images)
    assert not torch.equal(first, losses_of(training, renamed, 1)["rpn_cls"])


def gradients(training: RPNTraining) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in training.named_parameters()}


def test_a_image_without_objects_teaches_background_only():
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(torch.zeros(0, 4))))
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    assert losses["rpn_cls"].item() > 0
    assert losses["rpn_box"].item() == 0
    found = gradients(training)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    assert found["trunk.conv.0.weight"].any()
    assert not found["rpn.bbox_pred.weight"].any()


def test_images_with_and_without_objects_make_one_batch():
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(OBJECTS), sample_of(torch.zeros(0, 4), "two")))
    total(losses).backward()
    assert losses["rpn_box"].item() > 0
    assert all(gradient.isfinite().all() for gradient in gradients(training).values())


def test_a_image_smaller_than_every_anchor_gives_zero_not_nan():
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(torch.tensor([[2.0, 2, 9, 9]]), width=16, height=16)))
    total(losses).backward()
    assert [losses["rpn_cls"].item(), losses["rpn_box"].item()] == [0, 0]
    assert all(gradient.eq(0).all() for gradient in gradients(training).values())


def test_one_pixel_objects_give_finite_losses():
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(torch.tensor([[50.0, 50, 51, 51]]))))
    assert losses["rpn_box"].item() > 0
    assert all(loss.isfinite() for loss in losses.values())


def test_a_image_does_not_see_those_that_share_its_batch():
    """One is 64 px wide and one 128: losses are what they are alone, and all anchors of the first lie within it."""
    training = training_of()
    narrow, wide = sample_of(torch.zeros(0, 4), "narrow", width=64), sample_of(OBJECTS)
    batch = batch_of(narrow, wide)
    alone = [Batch([narrow], batch.images[:1, :, :, :64]), Batch([wide], batch.images[1:])]
    losses = [losses_of(training, each)["rpn_cls"] for each in alone]
    torch.testing.assert_close(losses_of(training, batch)["rpn_cls"], sum(losses) / 2)
    features = training.trunk.conv(alone[0].images)
    anchors = training.rpn.anchors_on(features[0])
    inside = (anchors[:, 2] <= 64) & (anchors[:, 0] >= 0) & (anchors[:, 1] >= 0) & (anchors[:, 3] <= 96)
    assert 0 < inside.sum() < len(anchors)
    logits = training.rpn(features)[0][0]
    expected = nn.functional.cross_entropy(logits[inside], torch.zeros(int(inside.sum()), dtype=torch.int64))
    torch.testing.assert_close(losses[0], expected)


def slow_proposals(scores: list[float], boxes: list[list[float]], size: tuple[int, int], scale: float,
                   rule: ProposalSettings) -> list[int]:
    """Return the numbers of the boxes that become proposals, best first."""
    clipped = [[min(max(v, 0), size[k % 2]) for k, v in enumerate(box)] for box in boxes]
    side = rule.min_side * scale
    usable = [n for n, (x1, y1, x2, y2) in enumerate(clipped) if x2 - x1 >= side and y2 - y1 >= side]
    usable.sort(key=lambda n: -scores[n])
    kept: list[int] = []
    for n in usable[: rule.pre_nms] if rule.pre_nms else usable:
        overlaps = bx.iou(torch.tensor([clipped[n]]), torch.tensor([clipped[m] for m in kept]).reshape(-1, 4))
        if not (overlaps > rule.nms).any():
            kept.append(n)
    return kept[: rule.post_nms]


@pytest.mark.parametrize("rule", [
    ProposalSettings(pre_nms=0, nms=0.7, post_nms=2000, min_side=16),
    ProposalSettings(pre_nms=60, nms=0.7, post_nms=2000, min_side=16),
    ProposalSettings(pre_nms=100, nms=0.3, post_nms=9, min_side=16),
    ProposalSettings(pre_nms=0, nms=0.5, post_nms=1, min_side=0),
])
@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_proposals_against_the_loop(rule, scale):
    random = generator("proposals")
    anchors = RPNHead(4, NETWORK).anchors_on(torch.zeros(4, 6, 8))
    logits = torch.randn(len(anchors), 2, generator=random)
    deltas = torch.randn(len(anchors), 4, generator=random) * 0.3
    sample = sample_of(OBJECTS, scale=scale)
    boxes, scores = make_proposals(logits, deltas, anchors, sample, rule)
    everything = bx.decode(deltas, anchors)
    probability = torch.exp(logits[:, 1]) / torch.exp(logits).sum(dim=1)
    expected = slow_proposals(probability.tolist(), everything.tolist(), (128, 96), scale, rule)
    assert len(expected) >= min(rule.post_nms, 9)
    torch.testing.assert_close(boxes, bx.clip(everything[expected], (128, 96)))
    torch.testing.assert_close(scores, probability[expected])
    assert (scores.diff() <= 0).all()


def proposed(anchors: Sequence[Sequence[float]], scores: Sequence[float], scale: float = 1.0,
             deltas: torch.Tensor | None = None, **rule: Any) -> tuple[list[list[float]], torch.Tensor]:
    logits = torch.stack([torch.zeros(len(scores)), torch.tensor(scores)], dim=1)
    shifts = torch.zeros(len(scores), 4) if deltas is None else deltas
    settings = ProposalSettings(**({"pre_nms": 0, "nms": 0.7, "post_nms": 2000, "min_side": 16} | rule))
    boxes, found = make_proposals(logits, shifts, torch.tensor(anchors).reshape(-1, 4),
                                  sample_of(OBJECTS, scale=scale), settings)
    return boxes.tolist(), found


def test_anchors_across_the_border_are_clipped_and_take_part():
    assert proposed([[-50.0, -50, 40, 40], [100, 60, 300, 300]], [2.0, 1])[0] == [[0, 0, 40, 40], [100, 60, 128, 96]]


def test_the_least_side_counts_original_pixels():
    anchors: list[list[float]] = [[0, 0, 31, 40], [50, 0, 82, 32]]
    assert len(proposed(anchors, [2.0, 1])[0]) == 2
    assert proposed(anchors, [2.0, 1], scale=2.0)[0] == [[50, 0, 82, 32]]


def test_boxes_are_clipped_before_small_ones_are_dropped():
    assert proposed([[-90.0, 0, 10, 50]], [1.0])[0] == []


def test_small_boxes_are_dropped_before_the_cut_and_the_cut_comes_before_suppression():
    small, first, twin, other = [0.0, 0, 9, 9], [0.0, 0, 50, 50], [0.0, 0, 50, 51], [70.0, 40, 120, 90]
    boxes, _ = proposed([small, first, twin, other], [9.0, 8, 7, 6], pre_nms=2)
    assert boxes == [first]  # without the small one, first and twin make the cut, and twin is suppressed
    boxes, _ = proposed([small, first, twin, other], [9.0, 8, 7, 6], pre_nms=3, post_nms=2)
    assert boxes == [first, other]


def test_suppression_is_strictly_above_the_limit():
    """IoU 0.5 of 100 x 50 and 50 x 50."""
    anchors: list[list[float]] = [[0.0, 0, 100, 50], [0, 0, 50, 50]]
    assert len(proposed(anchors, [2.0, 1], nms=0.5)[0]) == 2
    assert len(proposed(anchors, [2.0, 1], nms=0.49)[0]) == 1


def test_boxes_that_are_not_finite_are_dropped():
    deltas = torch.zeros(3, 4)
    deltas[0, 2] = math.nan
    assert proposed([[0.0, 0, 40, 40], [50, 0, 90, 40], [0, 50, 40, 90]], [3.0, math.nan, 1], deltas=deltas)[0] == [
        [0, 50, 40, 90]]


def test_no_anchors_or_none_large_enough():
    boxes, scores = proposed([], [])
    assert boxes == []
    assert scores.shape == (0,)
    boxes, scores = proposed([[0.0, 0, 5, 5]], [1.0])
    assert boxes == []
    assert scores.shape == (0,)
