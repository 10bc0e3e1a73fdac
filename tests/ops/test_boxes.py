"""Boxes: IoU against counted pixels, and a code that round-trips exactly."""

import math

import pytest
import torch

from altopt.ops import boxes as bx


def random_boxes(count: int, seed: int, side: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return boxes with whole coordinates in 0..side and at least one pixel of width and height."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, side, (count, 2), generator=random)
    sizes = torch.randint(1, side, (count, 2), generator=random)
    return torch.cat([corners, (corners + sizes).clamp(max=side)], dim=1).to(dtype)


def pixels_of(box: torch.Tensor) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = (int(v) for v in box)
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def test_iou_equals_counting_pixels():
    boxes, others = random_boxes(25, 0), random_boxes(30, 1)
    expected = torch.tensor([
        [len(pixels_of(a) & pixels_of(b)) / len(pixels_of(a) | pixels_of(b)) for b in others] for a in boxes])
    assert 0 < (expected > 0).sum() < expected.numel()
    torch.testing.assert_close(bx.iou(boxes, others), expected)


def test_iou_of_a_box_with_itself_is_one_and_is_symmetric():
    boxes = random_boxes(20, 2)
    assert torch.equal(bx.iou(boxes, boxes).diagonal(), torch.ones(20))
    assert torch.equal(bx.iou(boxes, boxes), bx.iou(boxes, boxes).T)


def test_iou_of_touching_boxes_and_of_boxes_without_area_is_zero():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor([[10.0, 0, 20, 10], [0, 10, 10, 20], [5, 5, 5, 5], [5, 0, 5, 10]])
    assert bx.iou(boxes, others).tolist() == [[0, 0, 0, 0]]
    assert bx.iou(others[2:], others[2:]).tolist() == [[0, 0], [0, 0]]  # 0 / 0 is not NaN


def test_iou_of_the_devkits_one_pixel_object_is_that_of_a_pixel():
    pixel = torch.tensor([[6.0, 3, 7, 4]])  # xmin = xmax = 7, ymin = ymax = 4
    assert bx.area(pixel).tolist() == [1]
    assert bx.iou(pixel, torch.tensor([[6.0, 3, 8, 4]])).tolist() == [[0.5]]


@pytest.mark.parametrize(("count", "others"), [(0, 3), (3, 0), (0, 0)])
def test_iou_without_boxes_has_the_shape_of_the_pairs(count, others):
    assert bx.iou(torch.zeros(count, 4), torch.zeros(others, 4)).shape == (count, others)


def test_encode_by_hand():
    anchors = torch.tensor([[0.0, 0, 10, 20], [0, 0, 16, 16]])
    boxes = torch.tensor([[5.0, 10, 25, 30], [0, 0, 16, 16]])
    expected = torch.tensor([[1.0, 0.5, math.log(2), 0], [0, 0, 0, 0]])
    torch.testing.assert_close(bx.encode(boxes, anchors), expected)


def test_decode_by_hand():
    anchors = torch.tensor([[-84.0, -40, 100, 56]])
    deltas = torch.tensor([[0.5, -0.25, 0, math.log(0.5)]])  # 184 x 96 at (8, 8): to (100, -16), 184 x 48
    torch.testing.assert_close(bx.decode(deltas, anchors), torch.tensor([[8.0, -40, 192, 8]]))


def test_round_trip_is_exact():
    anchors, boxes = (random_boxes(500, seed, 1000, torch.float64) for seed in (3, 4))
    anchors[:, 2:] += 16  # no smaller than a recipe's smallest anchor, so that the limit of growth is out of reach
    error = (bx.decode(bx.encode(boxes, anchors), anchors) - boxes).abs().max()
    assert error < 1e-10


def test_zero_deltas_return_the_anchor_itself():
    """py-faster-rcnn's pair moves x2 and y2 by a pixel here."""
    anchors = random_boxes(50, 5, 700)
    assert torch.equal(bx.decode(torch.zeros(50, 4), anchors), anchors)


@pytest.mark.parametrize("size", [1, 1000])
def test_the_smallest_and_the_largest_object_of_a_image_survive_the_code(size):
    anchors = torch.tensor([[-360.0, -184, 376, 200], [0, 0, 16, 16]], dtype=torch.float64)
    boxes = torch.tensor([[3.0, 3, 3 + size, 3 + size]], dtype=torch.float64).expand(2, 4)
    torch.testing.assert_close(bx.decode(bx.encode(boxes, anchors), anchors), boxes)


def test_decode_limits_growth_but_not_shrinking():
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    grown = bx.decode(torch.tensor([[0, 0, 1000.0, 1000.0]]), anchors)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492, 508, 508]]))
    shrunk = bx.decode(torch.tensor([[0, 0, -10.0, -10.0]], dtype=torch.float64), anchors.double())
    assert (shrunk[:, 2] - shrunk[:, 0]).item() == pytest.approx(16 * math.exp(-10))


def test_decode_of_every_class_is_decode_class_by_class():
    anchors = random_boxes(7, 6)
    deltas = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0))
    together = bx.decode(deltas, anchors)
    assert together.shape == (7, 5, 4)
    for k in range(5):
        assert torch.equal(together[:, k], bx.decode(deltas[:, k], anchors))


def test_code_without_boxes():
    none = torch.zeros(0, 4)
    assert bx.encode(none, none).shape == (0, 4)
    assert bx.decode(none, none).shape == (0, 4)
    assert bx.decode(torch.zeros(0, 3, 4), none).shape == (0, 3, 4)


def test_clip_to_a_image_that_is_not_square():
    boxes = torch.tensor([[-5.0, -6, 500, 400], [10, 20, 30, 40], [310, 250, 350, 270], [-9, -9, -2, -2]])
    expected = [[0, 0, 320, 240], [10, 20, 30, 40], [310, 240, 320, 240], [0, 0, 0, 0]]
    assert bx.clip(boxes, (320, 240)).tolist() == expected
    assert bx.clip(boxes.unflatten(0, (2, 2)), (320, 240)).flatten(0, 1).tolist() == expected


def test_flip_by_hand_and_twice():
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    assert bx.flip(boxes, 100).tolist() == [[70, 20, 90, 40]]
    many = random_boxes(30, 7)
    assert torch.equal(bx.flip(bx.flip(many, 20), 20), many)
    assert bx.flip(torch.zeros(0, 4), 20).shape == (0, 4)


def test_flip_of_the_first_column_is_the_last_one():
    """No pixel is lost to a "+1": column 0 of an image 100 wide becomes column 99."""
    assert bx.flip(torch.tensor([[0.0, 0, 1, 1]]), 100).tolist() == [[99, 0, 100, 1]]


def test_large_enough_needs_both_sides_and_includes_the_limit():
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 15.9, 100], [0, 0, 100, 15.9], [5, 5, 4, 100]])
    assert bx.large_enough(boxes, 16).tolist() == [True, False, False, False]


def test_inside_includes_the_border_itself():
    boxes = torch.tensor([[0.0, 0, 320, 240], [-1, 0, 9, 9], [0, -1, 9, 9], [0, 0, 321, 9], [0, 0, 9, 241]])
    assert bx.inside(boxes, (320, 240)).tolist() == [True, False, False, False, False]
