"""Fast R-CNN: the units of its box deltas, its losses, and the detections it makes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loss_values import losses_of, means, total
from torch import nn

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import DetectionSettings
from altopt.machine.randomness import generator
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import FastRCNNHead, FastRCNNTraining, fast_rcnn_losses, postprocess_detections
from altopt.models.network_parts import initialise
from altopt.ops import boxes as bx
from altopt.ops.targets import RoISample

CLASSES = 3
SIZE = (128, 96)


def head_of(classes: int = CLASSES, features: int = 6) -> FastRCNNHead:
    head = FastRCNNHead(features, classes)
    random = generator("head")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=random)
    return head


def statistics(key: str, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    random = generator(key)
    return torch.randn(classes + 1, 4, generator=random), 0.05 + torch.rand(classes + 1, 4, generator=random)


def random_boxes(count: int, key: object = 0) -> torch.Tensor:
    random = generator("boxes", key)
    corners = torch.rand(count, 2, generator=random) * torch.tensor([100.0, 70])
    return torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=random) * 60], dim=1)


def plain_deltas(head: FastRCNNHead, hidden: torch.Tensor) -> torch.Tensor:
    return head.deltas(head(hidden)[1])


def test_head_shapes_and_initial_weights():
    head = FastRCNNHead(200, 20)
    random = generator(0)
    for name, layer in head.named_modules(prefix="head"):
        initialise(name, layer, random)
    logits, normalised = head(torch.zeros(5, 200))
    assert logits.shape == (5, 21)
    assert normalised.shape == (5, 21, 4)
    assert head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert head.cls_score.bias.eq(0).all()
    assert head.bbox_pred.bias.eq(0).all()
    assert head(torch.zeros(0, 200))[1].shape == (0, 21, 4)


def test_each_class_has_four_neighbouring_outputs():
    head = head_of()
    hidden = torch.randn(2, 6, generator=generator(1))
    flat = hidden @ head.bbox_pred.weight.T + head.bbox_pred.bias
    for k in range(CLASSES + 1):
        torch.testing.assert_close(head(hidden)[1][:, k], flat[:, 4 * k : 4 * k + 4])


def test_deltas_leave_the_units_of_their_class():
    head = head_of()
    means, stds = statistics("first")
    head.bbox_means.copy_(means)
    head.bbox_stds.copy_(stds)
    normalised = torch.randn(2, CLASSES + 1, 4, generator=generator(2))
    plain = head.deltas(normalised)
    for k in range(CLASSES + 1):
        for d in range(4):
            expected = normalised[1, k, d] * stds[k, d] + means[k, d]
            assert plain[1, k, d].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_new_statistics_change_the_units_and_not_the_boxes():
    head, hidden = head_of(), torch.randn(7, 6, generator=generator(3))
    before, normalised = plain_deltas(head, hidden), head(hidden)[1]
    for key in ("first", "second"):
        means, stds = statistics(key)
        head.renormalise(means, stds)
        assert (plain_deltas(head, hidden) - before).abs().max() < 1e-5
        assert torch.equal(head.bbox_means, means)
        assert torch.equal(head.bbox_stds, stds)
    assert not torch.allclose(head(hidden)[1], normalised)


def test_a_head_folded_into_plain_units_predicts_other_boxes():
    """What py-faster-rcnn's snapshots hold, with statistics on top: the comparison above would notice."""
    head, hidden = head_of(), torch.randn(7, 6, generator=generator(4))
    head.renormalise(*statistics("first"))
    before = plain_deltas(head, hidden)
    head.renormalise(torch.zeros(CLASSES + 1, 4), torch.ones(CLASSES + 1, 4))
    head.bbox_means.copy_(statistics("first")[0])
    head.bbox_stds.copy_(statistics("first")[1])
    assert (plain_deltas(head, hidden) - before).abs().max() > 0.1


def test_statistics_travel_with_the_weights():
    head, other = head_of(), FastRCNNHead(6, CLASSES)
    head.renormalise(*statistics("first"))
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 6, generator=generator(5))
    assert torch.equal(plain_deltas(head, hidden), plain_deltas(other, hidden))


def test_losses_against_the_loop():
    head = head_of()
    head.renormalise(*statistics("first"))
    random = generator("losses")
    logits = torch.randn(12, CLASSES + 1, generator=random)
    normalised = torch.randn(12, CLASSES + 1, 4, generator=random)
    deltas = torch.randn(12, 4, generator=random) * 0.3
    labels = torch.tensor([1, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    chosen = RoISample(torch.zeros(12, 4), labels, deltas, 4)
    losses = fast_rcnn_losses(head, logits, normalised, [chosen])
    classification = box = 0.0
    means, stds = head.bbox_means.double().numpy(), head.bbox_stds.double().numpy()
    for r, label in enumerate(labels.tolist()):
        row = logits[r].double().numpy()
        classification += math.log(np.exp(row).sum()) - row[label]
        if label > 0:
            target = (deltas[r].double().numpy() - means[label]) / stds[label]
            for d in np.abs(normalised[r, label].double().numpy() - target):
                box += 0.5 * d * d if d < 1 else d - 0.5
    assert [loss.count for loss in losses.values()] == [12, 12]  # background too divides the box loss
    assert losses["cls"].total.item() == pytest.approx(classification, rel=1e-5)
    assert losses["box"].total.item() == pytest.approx(box, rel=1e-5)
    weighted = fast_rcnn_losses(head, logits, normalised, [chosen], (2.0, 3.0))
    assert weighted["cls"].total.item() == pytest.approx(2 * classification, rel=1e-5)
    assert weighted["box"].total.item() == pytest.approx(3 * box, rel=1e-5)


def test_rois_of_several_images_are_their_neighbours():
    """Foreground comes first in each image, not in the batch."""
    head, random = head_of(), generator("several")
    head.renormalise(*statistics("first"))
    logits, normalised = torch.randn(9, CLASSES + 1, generator=random), torch.randn(9, CLASSES + 1, 4, generator=random)
    images = [RoISample(torch.zeros(len(labels), 4), torch.tensor(labels, dtype=torch.int64),
                        torch.randn(len(labels), 4, generator=random), sum(label > 0 for label in labels))
              for labels in ([3, 0, 0], [], [1, 2, 0], [0, 0, 0])]
    together = fast_rcnn_losses(head, logits, normalised, images)
    places = torch.arange(9).split([len(each.labels) for each in images])
    alone = [fast_rcnn_losses(head, logits[rows], normalised[rows], [each])
             for rows, each in zip(places, images, strict=True)]
    for name in ("cls", "box"):
        assert together[name].count == sum(each[name].count for each in alone) == 9
        torch.testing.assert_close(together[name].total, torch.stack([each[name].total for each in alone]).sum())


def test_only_the_labelled_class_of_foreground_learns_boxes():
    head = head_of()
    normalised = torch.randn(4, CLASSES + 1, 4, generator=generator(6)).requires_grad_()
    chosen = RoISample(torch.zeros(4, 4), torch.tensor([2, 1, 0, 0]), torch.zeros(4, 4), 2)
    fast_rcnn_losses(head, torch.zeros(4, CLASSES + 1), normalised, [chosen])["box"].total.backward()
    touched = normalised.grad.abs().sum(dim=2) > 0
    assert torch.nonzero(touched).tolist() == [[0, 2], [1, 1]]


def background(count: int) -> RoISample:
    return RoISample(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4), 0)


def test_background_alone_has_a_zero_box_loss_with_a_gradient():
    head = head_of()
    logits, normalised = head(torch.randn(5, 6, generator=generator(7)))
    losses = means(fast_rcnn_losses(head, logits, normalised, [background(5)]))
    assert losses["box"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    assert head.bbox_pred.weight.grad.eq(0).all()
    assert head.cls_score.weight.grad.any()


def test_no_rois_give_zero_not_nan():
    head = head_of()
    logits, normalised = head(torch.zeros(0, 6))
    losses = means(fast_rcnn_losses(head, logits, normalised, [background(0)]))
    assert [losses["cls"].item(), losses["box"].item()] == [0, 0]
    torch.stack(list(losses.values())).sum().backward()
    assert head.cls_score.weight.grad.eq(0).all()


def training_of(head: FastRCNNHead | None = None, count: int = 16) -> FastRCNNTraining:
    conv, fc = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16)), FullyConnected(4 * 2 * 2, 6)
    for layer in fc:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    random = generator("layers")
    with torch.no_grad():
        for parameter in [*conv.parameters(), *fc.parameters()]:
            parameter.normal_(std=0.3, generator=random)
    rois = RoISampling(RoIThresholds(0.5, 0.5, 0.0), per_image=count, fg_fraction=0.25)
    network = SimpleNamespace(conv=conv, fc=fc, head=head or head_of(), roi_size=2)
    return FastRCNNTraining(network, rois=rois, cls_weight=1.0, box_weight=1.0, seed=(3, "test"))


def sample_of(objects: torch.Tensor, proposals: torch.Tensor, id: str = "one") -> Sample:
    return Sample(id, False, torch.zeros(3, SIZE[1], SIZE[0], dtype=torch.uint8), 1.0, objects,
                  torch.arange(len(objects)) % CLASSES, proposals)


def batch_of(*samples: Sample) -> Batch:
    return Batch(list(samples), torch.randn(len(samples), 3, SIZE[1], SIZE[0], generator=generator("pixels")))


def test_training_step_depends_on_iteration_and_image_alone():
    training = training_of()
    images = sample_of(random_boxes(2), random_boxes(60, 1)), sample_of(random_boxes(1, 2), random_boxes(60, 3))
    batch = batch_of(*images)
    first, again, other = (losses_of(training, batch, iteration) for iteration in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in ("cls", "box"))
    assert not torch.equal(first["cls"], other["cls"])


def test_losses_are_divided_by_the_rois_of_the_whole_batch():
    """One image has 3 RoIs, the other 9: an average of averages would weigh the first too much."""
    training = training_of(count=16)
    none = torch.zeros(0, 4)
    images = sample_of(none, random_boxes(3, 1), "few"), sample_of(none, random_boxes(9, 2), "many")
    batch = batch_of(*images)
    alone = [losses_of(training, Batch([each], batch.images[b : b + 1]))["cls"].item() for b, each in enumerate(images)]
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    assert losses_of(training, batch)["cls"].item() == pytest.approx((3 * alone[0] + 9 * alone[1]) / 12, rel=1e-5)


def test_every_part_gets_a_gradient():
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(random_boxes(2), random_boxes(60, 1))))
    total(losses).backward()
    assert losses["box"].item() > 0
    for parameter in training.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize(("objects", "proposals"), [(0, 30), (2, 0), (0, 0), (1, 1)])
def test_images_without_objects_or_proposals(objects, proposals):
    training = training_of()
    losses = losses_of(training, batch_of(sample_of(random_boxes(objects), random_boxes(proposals, 1))))
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in training.parameters())


def slow_detections(scores: np.ndarray, boxes: torch.Tensor, rule: DetectionSettings) -> list[tuple[float, int, int]]:
    """Return (score, RoI, class) of the detections, best first."""
    found = []
    for k in range(scores.shape[1]):
        kept: list[int] = []
        for r in sorted(range(len(scores)), key=lambda r: -scores[r, k]):
            if scores[r, k] > rule.score and not (bx.iou(boxes[r, k][None], boxes[kept, k]) > rule.nms).any():
                kept.append(r)
        found += [(float(scores[r, k]), r, k) for r in kept]
    return sorted(found, reverse=True)[: rule.per_image]


@pytest.mark.parametrize("limit", [100, 7])
def test_detections_against_the_loop(limit):
    random = generator("detections")
    rois = random_boxes(40, 4)
    logits = torch.randn(40, CLASSES + 1, generator=random) * 2
    deltas = torch.randn(40, CLASSES + 1, 4, generator=random) * 0.2
    rule = DetectionSettings(score=0.2, nms=0.3, per_image=limit)
    boxes, scores, labels = postprocess_detections(logits, deltas, rois, SIZE, rule)
    odds = np.exp(logits.double().numpy())
    probability = (odds / odds.sum(axis=1, keepdims=True))[:, 1:]
    everything = torch.stack([bx.clip(bx.decode(deltas[:, k], rois), SIZE) for k in range(1, CLASSES + 1)], dim=1)
    expected = slow_detections(probability, everything, rule)
    assert len(expected) == (7 if limit == 7 else len(expected)) > 6
    assert labels.tolist() == [k for _, _, k in expected]
    torch.testing.assert_close(boxes, torch.stack([everything[r, k] for _, r, k in expected]))
    torch.testing.assert_close(scores, torch.tensor([score for score, _, _ in expected]))


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Return logits whose softmax is the rows, background first."""
    return torch.log(torch.tensor(rows))


def test_a_roi_can_be_several_classes_and_suppression_is_class_by_class():
    rois = torch.tensor([[10.0, 10, 50, 50], [11, 10, 50, 50]])
    logits = logits_of([0.2, 0.5, 0.3, 1e-9], [0.2, 0.45, 1e-9, 0.35])
    boxes, scores, labels = postprocess_detections(logits, torch.zeros(2, 4, 4), rois, SIZE, DetectionSettings())
    assert labels.tolist() == [0, 2, 1]
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.35, 0.3]))
    assert boxes.tolist() == [[10, 10, 50, 50], [11, 10, 50, 50], [10, 10, 50, 50]]


def test_scores_must_be_above_the_floor_and_background_is_no_detection():
    rois = torch.tensor([[10.0, 10, 50, 50]])
    logits = torch.zeros(1, 4)  # 0.25 each, exactly
    assert len(postprocess_detections(logits, torch.zeros(1, 4, 4), rois, SIZE, DetectionSettings(score=0.25))[0]) == 0
    assert len(postprocess_detections(logits, torch.zeros(1, 4, 4), rois, SIZE, DetectionSettings(score=0.24))[0]) == 3


def test_the_limit_counts_all_classes_and_keeps_the_best():
    rois = torch.tensor([[0.0, 0, 20, 20], [30, 0, 50, 20], [60, 0, 80, 20]])
    logits = logits_of([0.1, 0.6, 0.3, 1e-9], [0.1, 1e-9, 0.9, 1e-9], [0.3, 0.2, 0.1, 0.4])
    _, scores, labels = postprocess_detections(logits, torch.zeros(3, 4, 4), rois, SIZE, DetectionSettings(per_image=3))
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.6, 0.4]))
    assert labels.tolist() == [1, 0, 2]


def test_each_class_moves_the_roi_by_its_own_deltas_and_the_image_cuts():
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 0] = 9  # background's are read by nobody
    deltas[0, 2, 0] = 1.0  # class 1 lies 40 px to the right
    deltas[0, 3, 2:] = math.log(10)  # class 2 fills the image
    rois = torch.tensor([[10.0, 10, 50, 50]])
    boxes, _, labels = postprocess_detections(torch.zeros(1, 4), deltas, rois, SIZE, DetectionSettings())
    found = dict(zip(labels.tolist(), boxes.tolist(), strict=True))
    assert found == {0: [10, 10, 50, 50], 1: [50, 10, 90, 50], 2: [0, 0, 128, 96]}


def test_no_rois_make_no_detections():
    boxes, scores, labels = postprocess_detections(torch.zeros(0, 4), torch.zeros(0, 4, 4), torch.zeros(0, 4), SIZE,
                                          DetectionSettings())
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))
