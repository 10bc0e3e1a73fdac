"""Labels and samples against the rules of Faster R-CNN (3.1.2, 3.1.3) and Fast R-CNN (2.3), written as slow loops."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from altopt.batches.sampling import (
    RoIThresholds,
    choose,
    has_samples,
    label_anchors,
    match_rois,
    sample_rois,
    subsample_labels,
)
from altopt.machine.randomness import generator
from altopt.ops import boxes as bx

THRESHOLDS = RoIThresholds(fg=0.5, bg_high=0.5, bg_low=0.0)


def boxes_in(count: int, seed: int, side: int, margin: int = 0) -> torch.Tensor:
    """Return boxes with whole coordinates in -margin..side + margin."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.randint(-margin, side, (count, 2), generator=random)
    sizes = torch.randint(1, side // 2, (count, 2), generator=random)
    return torch.cat([corners, (corners + sizes).clamp(max=side + margin)], dim=1).float()


def exact_iou(a: list[float], b: list[float]) -> Fraction:
    width, height = (int(max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]))) for k in (0, 1))
    areas = sum(int((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b))
    return Fraction(width * height, areas - width * height)


def slow_labels(anchors: torch.Tensor, objects: torch.Tensor, size: tuple[int, int], border: bool) -> list[int]:
    """Return the labels by the rules, at 0.7 and 0.3, one anchor at a time."""
    boxes, truth = anchors.tolist(), objects.tolist()
    competing = [border or (x1 >= 0 and y1 >= 0 and x2 <= size[0] and y2 <= size[1]) for x1, y1, x2, y2 in boxes]
    best_of = [max((exact_iou(box, g) for box, inside in zip(boxes, competing, strict=True) if inside), default=0)
               for g in truth]
    labels = []
    for box, inside in zip(boxes, competing, strict=True):
        overlaps = [exact_iou(box, g) for g in truth]
        top = max(overlaps, default=Fraction(0))
        promoted = any(o == best > 0 for o, best in zip(overlaps, best_of, strict=True))
        if not inside:
            labels.append(-1)
        elif top >= Fraction(7, 10) or promoted:
            labels.append(1)
        else:
            labels.append(0 if top < Fraction(3, 10) else -1)
    return labels


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_labels_of_random_anchors_follow_the_rules(seed, border):
    anchors, objects = boxes_in(150, seed, 24, margin=3), boxes_in(seed, 100 + seed, 24)
    labels, matched = label_anchors(anchors, objects, (24, 20), 0.7, 0.3, border)
    expected = slow_labels(anchors, objects, (24, 20), border)
    assert labels.tolist() == expected
    assert labels.dtype == matched.dtype == torch.int64
    assert seed == 0 or set(expected) >= {0, 1}
    for n in torch.nonzero(labels == 1)[:, 0].tolist():
        overlaps = [exact_iou(anchors[n].tolist(), g) for g in objects.tolist()]
        assert overlaps[matched[n]] == max(overlaps)


def labelled(anchors: Sequence[Sequence[float]], objects: Sequence[Sequence[float]]) -> list[int]:
    return label_anchors(torch.tensor(anchors), torch.tensor(objects).reshape(-1, 4), (100, 100), 0.7, 0.3)[0].tolist()


def test_all_anchors_that_tie_for_an_object_are_positive():
    anchors: list[list[float]] = [[0, 0, 20, 20], [40, 0, 60, 20], [0, 40, 20, 60]]
    assert labelled(anchors, [[10.0, 0, 50, 20], [80, 80, 90, 90]]) == [1, 1, 0]


def test_the_limits_belong_to_positive_and_to_ignored():
    """Of the object's 10 x 10 pixels the anchors share all, 0.7, 0.69, 0.3 and 0.29."""
    widths = [10, 7, 6.9, 3, 2.9]
    assert labelled([[0.0, 0, w, 10] for w in widths], [[0, 0, 10, 10]]) == [1, 1, -1, -1, 0]


def test_a_promoted_anchor_keeps_its_own_best_object():
    """The second object's best anchor overlaps the first object more; its targets go to the first."""
    anchors, objects = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 2]])
    labels, matched = label_anchors(anchors, objects, (100, 100), 0.7, 0.3)
    assert labels.tolist() == [1]
    assert matched.tolist() == [0]


def test_an_object_that_no_anchor_touches_promotes_nothing():
    """In py-faster-rcnn its best IoU of 0 ties with every anchor's."""
    assert labelled([[0.0, 0, 10, 10], [20, 0, 30, 10]], [[80, 80, 90, 90]]) == [0, 0]


def test_anchors_across_the_border_neither_compete_nor_win():
    anchors: list[list[float]] = [[-1.0, 0, 10, 10], [90, 90, 100, 100], [90, 90, 101, 100], [3, 0, 13, 10]]
    assert labelled(anchors, [[0, 0, 10, 10]]) == [-1, 0, -1, 1]  # 7 / 13 wins, for the better one lies outside


def test_an_object_whose_only_anchors_cross_the_border_promotes_nothing():
    assert labelled([[-1.0, 0, 10, 10], [50, 50, 60, 60]], [[0, 0, 10, 10]]) == [-1, 0]


def test_without_objects_what_lies_inside_is_background():
    assert labelled([[0.0, 0, 10, 10], [95, 0, 105, 10]], []) == [0, -1]


def test_a_one_pixel_object_gets_an_anchor():
    assert labelled([[0.0, 0, 16, 16], [16, 0, 32, 16]], [[5, 5, 6, 6]]) == [1, 0]


def test_no_anchors_at_all():
    labels, matched = label_anchors(torch.zeros(0, 4), torch.zeros(0, 4), (10, 10), 0.7, 0.3)
    assert labels.shape == matched.shape == (0,)


@pytest.mark.parametrize(("positives", "negatives", "expected"), [
    (500, 5000, (128, 128)), (20, 5000, (20, 236)), (0, 5000, (0, 256)), (500, 100, (128, 100)), (128, 128, (128, 128)),
    (3, 4, (3, 4)), (0, 0, (0, 0)), (500, 0, (128, 0)),
])
def test_sample_of_256_anchors(positives, negatives, expected):
    labels = torch.cat([torch.ones(positives), torch.zeros(negatives), -torch.ones(7)]).long()
    labels = labels[torch.randperm(len(labels), generator=generator("shuffled"))]
    sampled = subsample_labels(labels, 256, 0.5, generator("draw"))
    assert ((sampled == 1).sum().item(), (sampled == 0).sum().item()) == expected
    used = sampled >= 0
    assert torch.equal(sampled[used], labels[used])
    assert torch.equal(sampled, subsample_labels(labels, 256, 0.5, generator("draw")))


def test_sampled_anchors_change_with_the_generator_and_reach_everywhere():
    labels = torch.zeros(1000, dtype=torch.int64)
    draws = torch.stack([subsample_labels(labels, 256, 0.5, generator("draw", k)) for k in range(40)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws >= 0).any(dim=0).all()  # none is left out 40 times by chance: 0.744^40 = 7e-6


def test_choose_draws_without_replacement_and_keeps_short_lists():
    candidates = torch.arange(50) * 2
    drawn = choose(candidates, 20, generator(0))
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(candidates.tolist())
    assert torch.equal(choose(candidates, 50, generator(0)), candidates)
    assert choose(candidates, 0, generator(0)).shape == (0,)
    assert choose(candidates[:0], 5, generator(0)).shape == (0,)


def test_match_rois_against_the_loop():
    rois, objects = boxes_in(60, 1, 24), boxes_in(5, 2, 24)
    overlap, matched = match_rois(rois, objects)
    for roi, best, index in zip(rois.tolist(), overlap.tolist(), matched.tolist(), strict=True):
        exact = [exact_iou(roi, g) for g in objects.tolist()]
        assert best == pytest.approx(float(max(exact)))
        assert exact[index] == max(exact)
    assert match_rois(rois, objects[:0])[0].eq(0).all()


OBJECTS = torch.tensor([[10.0, 10, 50, 50], [100, 20, 140, 80]])
CLASSES = torch.tensor([4, 0])


def near(box: torch.Tensor, count: int) -> torch.Tensor:
    """Return proposals that overlap a box by more than a half, all of them different from it and each other."""
    return box + torch.arange(1, count + 1)[:, None] * 0.1


def far(count: int) -> torch.Tensor:
    return torch.tensor([200.0, 200, 220, 220]) + torch.arange(count)[:, None]


def sampled(proposals: torch.Tensor, objects: torch.Tensor = OBJECTS, classes: torch.Tensor = CLASSES, *,
            count: int = 64, thresholds: RoIThresholds = THRESHOLDS, seed: object = 0):
    return sample_rois(proposals, objects, classes, count=count, fg_fraction=0.25, thresholds=thresholds,
                       random=generator(seed))


@pytest.mark.parametrize(("fg", "bg", "expected"), [
    (50, 200, (16, 48)),
    (3, 200, (5, 59)),  # the two objects are foreground too
    (50, 10, (16, 10)),  # not filled up with more foreground
    (0, 0, (2, 0)),
    (0, 100, (2, 62)),
    (50, 0, (16, 0)),
])
def test_counts_of_64_rois(fg, bg, expected):
    sample = sampled(torch.cat([near(OBJECTS[0], fg), far(bg)]))
    assert ((sample.labels > 0).sum().item(), (sample.labels == 0).sum().item()) == expected
    assert len(sample.rois) == len(sample.deltas) == sum(expected)
    assert len(torch.unique(sample.rois, dim=0)) == sum(expected)  # without replacement


def test_labels_and_deltas_belong_to_the_best_object():
    proposals = torch.cat([near(OBJECTS[0], 20), near(OBJECTS[1], 20), far(50)])
    sample = sampled(proposals, count=400)
    assert set(sample.labels.tolist()) == {0, 1, 5}
    for roi, label, deltas in zip(sample.rois, sample.labels.tolist(), sample.deltas, strict=True):
        overlaps = bx.iou(roi[None], OBJECTS)[0].tolist()
        best = overlaps.index(max(overlaps))
        assert label == (CLASSES[best] + 1 if max(overlaps) >= 0.5 else 0)
        if label:
            torch.testing.assert_close(bx.decode(deltas[None], roi[None])[0], OBJECTS[best])
        else:
            assert not deltas.any()


def test_objects_are_candidates_with_zero_deltas():
    sample = sampled(torch.zeros(0, 4))
    assert torch.equal(sample.rois, OBJECTS)
    assert sample.labels.tolist() == [5, 1]
    assert not sample.deltas.any()


def test_background_begins_at_bg_low_and_ends_below_bg_high():
    """IoU with the object of 100 x 10: 0.5, 0.4, 0.1, 0.09 and 0."""
    objects, widths = torch.tensor([[0.0, 0, 100, 10]]), [50, 40, 10, 9]
    proposals = torch.tensor([*([0.0, 0, w, 10] for w in widths), [200, 0, 210, 10]])
    labels = torch.tensor([2])
    low = sampled(proposals, objects, labels, thresholds=RoIThresholds(0.5, 0.5, 0.1), count=100)
    assert sorted(low.rois[low.labels == 0][:, 2].tolist()) == [10, 40]
    assert sorted(low.rois[low.labels == 3][:, 2].tolist()) == [50, 100]
    zero = sampled(proposals, objects, labels, count=100)
    assert sorted(zero.rois[zero.labels == 0][:, 2].tolist()) == [9, 10, 40, 210]
    gap = sampled(proposals, objects, labels, thresholds=RoIThresholds(0.6, 0.45, 0.0), count=100)
    assert 50 not in gap.rois[:, 2].tolist()  # neither foreground nor background


@pytest.mark.parametrize(("count", "cap"), [(64, 16), (32, 8), (10, 2), (14, 4), (6, 2), (1, 0)])
def test_foreground_is_at_most_a_rounded_quarter(count, cap):
    sample = sampled(torch.cat([near(OBJECTS[0], 50), far(100)]), count=count)
    assert (sample.labels > 0).sum() == cap
    assert len(sample.labels) == count


def test_without_objects_all_is_background():
    sample = sampled(far(100), OBJECTS[:0], CLASSES[:0])
    assert sample.labels.tolist() == [0] * 64
    assert not sample.deltas.any()
    assert len(sampled(far(100), OBJECTS[:0], CLASSES[:0], thresholds=RoIThresholds(0.5, 0.5, 0.1)).labels) == 0


def test_without_objects_and_proposals_there_is_no_sample():
    sample = sampled(torch.zeros(0, 4), OBJECTS[:0], CLASSES[:0])
    assert (sample.rois.shape, sample.labels.shape, sample.deltas.shape) == ((0, 4), (0,), (0, 4))


def test_the_same_seed_draws_the_same_rois_and_another_does_not():
    proposals = torch.cat([near(OBJECTS[0], 50), far(200)])
    first, again, other = (sampled(proposals, seed=seed) for seed in ("a", "a", "b"))
    assert torch.equal(first.rois, again.rois)
    assert torch.equal(first.deltas, again.deltas)
    assert not torch.equal(first.rois, other.rois)


def test_has_samples_agrees_with_what_is_sampled():
    low = RoIThresholds(0.5, 0.5, 0.1)
    none, no_proposals = OBJECTS[:0], torch.zeros(0, 4)
    cases = [(far(5), OBJECTS, low), (no_proposals, OBJECTS, low), (no_proposals, none, low), (far(5), none, low),
             (far(5), none, THRESHOLDS), (no_proposals, none, THRESHOLDS),
             (near(OBJECTS[0], 3), OBJECTS, RoIThresholds(1.1, 0.5, 0.1))]
    found = [has_samples(*case) for case in cases]
    assert found == [True, True, False, False, True, False, False]
    for (proposals, objects, thresholds), any_sample in zip(cases, found, strict=True):
        sample = sampled(proposals, objects, CLASSES[: len(objects)], thresholds=thresholds)
        assert (len(sample.labels) > 0) == any_sample
