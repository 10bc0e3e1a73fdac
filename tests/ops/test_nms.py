"""Suppression in parts keeps what suppression of all boxes at once keeps, and compares no more than it has to."""

import pytest
import torch
import torchvision

from altopt.machine.randomness import generator
from altopt.ops import nms as suppression
from altopt.ops.nms import nms_keeping_best, overlapped


def sorted_boxes(n, key, alike=0.0, side=100.0):
    """Return boxes of many sizes, of which a share begins with equal corners, and falling scores with ties."""
    random = generator("suppression", n, key)
    corners = torch.rand(n, 2, generator=random) * side
    corners[: int(alike * n)] = 5.0
    boxes = torch.cat([corners, corners + 5 + torch.rand(n, 2, generator=random) * side / 2], dim=1)
    return boxes, torch.rand(n, generator=random).sort(descending=True).values.mul(8).round()


def kept_one_by_one(boxes, overlap):
    """Return what greedy suppression keeps, said in the plainest way."""
    kept: list[int] = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        area = (x2 - x1) * (y2 - y1)
        for j in kept:
            left, top, right, bottom = boxes[j].double().tolist()
            both = max(0.0, min(x2, right) - max(x1, left)) * max(0.0, min(y2, bottom) - max(y1, top))
            if both > overlap * (area + (right - left) * (bottom - top) - both):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("at_a_time", [1, 7, 64, 1000])
@pytest.mark.parametrize("count", [1, 3, 50, 1000])
@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_the_best_apart_are_those_of_plain_suppression(monkeypatch, at_a_time, count, alike):
    """Also where the first boxes all suppress each other, and more are needed."""
    monkeypatch.setattr(suppression, "AT_A_TIME", at_a_time)
    monkeypatch.setattr(suppression, "IN_CACHE", 5)
    boxes, scores = sorted_boxes(200, alike, alike)
    expected = kept_one_by_one(boxes, 0.5)
    assert 1 < len(expected) < 200
    assert nms_keeping_best(boxes, scores, 0.5, count).tolist() == expected[:count]


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7, 1.0])
def test_thousands_of_boxes_are_suppressed_as_torchvision_does(overlap):
    boxes, scores = sorted_boxes(5000, overlap, alike=0.2, side=400.0)
    assert torch.equal(nms_keeping_best(boxes, scores, overlap, 5000), torchvision.ops.nms(boxes, scores, overlap))


@pytest.mark.parametrize("overlap", [0.25, 1 / 3, 0.5, 0.7])
def test_what_overlaps_by_just_the_limit_stays(monkeypatch, overlap):
    """Whole numbers, with many pairs at the limit itself: the arithmetic has to be the op's to the last bit."""
    monkeypatch.setattr(suppression, "AT_A_TIME", 50)
    random = generator("limits")
    corners = torch.randint(0, 30, (3000, 2), generator=random)
    boxes = torch.cat([corners, corners + torch.randint(1, 20, (3000, 2), generator=random)], dim=1).float()
    scores = torch.linspace(1, 0, 3000)
    assert torch.equal(nms_keeping_best(boxes, scores, overlap, 3000), torchvision.ops.nms(boxes, scores, overlap))


def test_boxes_without_area_suppress_nothing(monkeypatch):
    monkeypatch.setattr(suppression, "AT_A_TIME", 1)
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [3, 3, 3, 9]])
    scores = torch.tensor([4.0, 3, 2, 1])
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0, 1, 2, 3]
    assert nms_keeping_best(boxes, scores, 0.5, 4).tolist() == [0, 1, 2, 3]


def test_no_boxes():
    assert nms_keeping_best(torch.zeros(0, 4), torch.zeros(0), 0.5, 3).tolist() == []
    assert overlapped(torch.zeros(0, 4), torch.ones(2, 4), 0.5).tolist() == []
    assert overlapped(torch.ones(2, 4), torch.zeros(0, 4), 0.5).tolist() == [False, False]


def test_no_more_boxes_are_compared_than_are_needed(monkeypatch):
    seen = []
    nms = torchvision.ops.nms

    def counted(boxes, *rest):
        seen.append(len(boxes))
        return nms(boxes, *rest)

    monkeypatch.setattr(torchvision.ops, "nms", counted)
    monkeypatch.setattr(suppression, "AT_A_TIME", 4)
    corners = torch.arange(100.0)[:, None].expand(-1, 2) * 30
    boxes = torch.cat([corners, corners + 20], dim=1).repeat_interleave(2, dim=0)  # each twice
    assert nms_keeping_best(boxes, torch.linspace(1, 0, 200), 0.5, 5).tolist() == [0, 2, 4, 6, 8]
    assert seen == [4, 4, 4]


def test_boxes_that_learn_are_compared_as_constants():
    boxes, scores = sorted_boxes(1200, "learns")
    kept = nms_keeping_best(boxes.requires_grad_(), scores, 0.7, 1000)
    assert torch.equal(kept, nms_keeping_best(boxes.detach(), scores, 0.7, 1000))
