"""RoI sampling, forward and backward, against a slow version written from its definition."""

import math

import pytest
import torch

from altopt.ops.roi_pool import roi_pool
from altopt.ops.roi_sample import pool_rois, roi_sample

STRIDE = 16
HEIGHT, WIDTH = 7, 9  # of the map; the image is 144 x 112


def features_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return boxes of an image of 144 x 112 pixels, some of them reaching out of it."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=random, dtype=torch.float64) * 160 - 30
    sizes = 1 + torch.rand(count, 2, generator=random, dtype=torch.float64) * 120
    return torch.cat([corners, corners + sizes], dim=1).to(dtype)


def sampled(features: torch.Tensor, boxes: list[torch.Tensor], size: int, samples: int) -> torch.Tensor:
    return roi_sample(features, boxes, size, 1 / STRIDE, samples)


def value_at(plane: list[list[float]], x: float, y: float) -> float:
    """Return what a map is worth at a point of the image: its cell (i, j) stands for (16 j + 8, 16 i + 8)."""
    height, width = len(plane), len(plane[0])
    column, row = (min(max((v - 8) / 16, 0), n - 1) for v, n in ((x, width), (y, height)))
    left, top = math.floor(column), math.floor(row)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    across, down = column - left, row - top
    return ((1 - down) * ((1 - across) * plane[top][left] + across * plane[top][right])
            + down * ((1 - across) * plane[bottom][left] + across * plane[bottom][right]))


def slow_bin(plane: list[list[float]], box: list[float], i: int, j: int, size: int, samples: int) -> float:
    """Return the maximum over a bin's points, or 0 where none of them lies on the map."""
    values, on_map = [], False
    for s in range(samples):
        for t in range(samples):
            y = box[1] + (box[3] - box[1]) * (i * samples + s + 0.5) / (size * samples)
            x = box[0] + (box[2] - box[0]) * (j * samples + t + 0.5) / (size * samples)
            on_map |= 0 <= x <= 16 * len(plane[0]) and 0 <= y <= 16 * len(plane)
            values.append(value_at(plane, x, y))
    return max(values) if on_map else 0.0


def slow(features: torch.Tensor, boxes: list[torch.Tensor], size: int, samples: int) -> torch.Tensor:
    return torch.tensor([
        [[[slow_bin(plane, box, i, j, size, samples) for j in range(size)] for i in range(size)]
         for plane in features[b].tolist()]
        for b, each in enumerate(boxes) for box in each.tolist()
    ], dtype=features.dtype).reshape(-1, features.shape[1], size, size)


@pytest.mark.parametrize(("size", "samples"), [(1, 1), (1, 4), (2, 3), (6, 2), (7, 2)])
def test_random_boxes_in_several_images(size, samples):
    features = features_of(3, 2, HEIGHT, WIDTH)
    boxes = [random_boxes(6, 1), torch.zeros(0, 4, dtype=torch.float64), random_boxes(5, 2)]
    torch.testing.assert_close(sampled(features, boxes, size, samples), slow(features, boxes, size, samples))


# Names of the cases, and boxes in pixels.
CASES = {
    "whole image": [0, 0, 144, 112],
    "one pixel": [40, 40, 41, 41],
    "one pixel at the far corner": [143, 111, 144, 112],
    "no area": [40, 40, 40, 40],
    "right and below": [200, 160, 300, 300],
    "left and above": [-300, -300, -200, -160],
    "larger than the image": [-100, -100, 300, 300],
    "partly outside": [100, 80, 220, 180],
}


@pytest.mark.parametrize("box", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("cells", [(HEIGHT, WIDTH), (1, 1), (1, 9), (2, 1)])
def test_single_boxes_on_maps_of_any_size(box, cells):
    features = features_of(1, 2, *cells).requires_grad_()
    boxes = [torch.tensor([box], dtype=torch.float64, requires_grad=True)]
    result = sampled(features, boxes, 3, 2)
    torch.testing.assert_close(result.detach(), slow(features.detach(), [boxes[0].detach()], 3, 2))
    result.sum().backward()
    assert features.grad.isfinite().all()
    assert boxes[0].grad.isfinite().all()


def test_a_cell_stands_for_the_place_where_anchors_are_centred():
    """The map says where its cells lie, so a point must come out as its own place."""
    x = (torch.arange(WIDTH, dtype=torch.float64) * 16 + 8).expand(HEIGHT, WIDTH)
    y = (torch.arange(HEIGHT, dtype=torch.float64) * 16 + 8)[:, None].expand(HEIGHT, WIDTH)
    box = torch.tensor([[20.0, 30, 60, 90]], dtype=torch.float64)
    places = sampled(torch.stack([x, y])[None], [box], 2, 1)[0]
    torch.testing.assert_close(places[0], torch.tensor([[30.0, 50], [30, 50]], dtype=torch.float64))
    torch.testing.assert_close(places[1], torch.tensor([[45.0, 45], [75, 75]], dtype=torch.float64))


def test_a_box_outside_gives_zero_among_negative_features():
    features = torch.full((1, 1, HEIGHT, WIDTH), -3.0)
    assert sampled(features, [torch.tensor([[300.0, 0, 400, 50]])], 2, 2).eq(0).all()
    half = sampled(features, [torch.tensor([[80.0, 0, 240, 16]])], 2, 2)[0, 0]
    assert half.tolist() == [[-3, 0], [-3, 0]]


def test_every_image_is_read_from_its_own_features():
    features = torch.stack([torch.full((1, 4, 4), float(b)) for b in range(3)])
    box = torch.tensor([[0.0, 0, 64, 64]])
    assert sampled(features, [box, box.expand(2, 4), box], 1, 2).flatten().tolist() == [0, 1, 1, 2]


def test_no_boxes_at_all():
    features = features_of(2, 3, HEIGHT, WIDTH).requires_grad_()
    result = sampled(features, [torch.zeros(0, 4), torch.zeros(0, 4)], 7, 2)
    assert result.shape == (0, 3, 7, 7)
    result.sum().backward()
    assert features.grad.eq(0).all()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_gradcheck_for_features_and_boxes(samples):
    features = features_of(2, 2, 5, 6, seed=4).requires_grad_()
    first = torch.tensor([[3.3, 5.1, 70.7, 60.2], [40.4, 40.9, 41.4, 41.9]], dtype=torch.float64).requires_grad_()
    second = torch.tensor([[-20.3, 10.7, 61.7, 200.9]], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *boxes: sampled(x, list(boxes), 3, samples), (features, first, second))


def test_the_gradient_of_an_edge_is_the_slope_of_the_map():
    """On a map that rises by 1 for each pixel to the right, the only point is the middle: half for each edge."""
    slope = (torch.arange(WIDTH, dtype=torch.float64) * 16).expand(1, 1, HEIGHT, WIDTH)
    box = torch.tensor([[30.0, 30, 70, 60]], dtype=torch.float64, requires_grad=True)
    sampled(slope, [box], 1, 1).sum().backward()
    torch.testing.assert_close(box.grad, torch.tensor([[0.5, 0, 0.5, 0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features_of_another_precision_keep_it(dtype):
    features = features_of(1, 2, HEIGHT, WIDTH, dtype=dtype).requires_grad_()
    boxes = random_boxes(9, 4, torch.float32).requires_grad_()
    result = sampled(features, [boxes], 6, 2)
    assert result.dtype == dtype
    expected = slow(features.detach().double(), [boxes.detach()], 6, 2)
    torch.testing.assert_close(result.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)
    result.float().sum().backward()
    assert features.grad.dtype == dtype
    assert boxes.grad.any()


def test_coordinates_are_not_rounded_to_the_precision_of_the_features():
    """At 1000 px bfloat16 knows only every fourth pixel."""
    columns = torch.arange(80.0).expand(1, 1, 1, 80).bfloat16()
    assert sampled(columns, [torch.tensor([[998.0, 0, 1002, 16]])], 1, 1).item() == 62
    assert sampled(columns / 64, [torch.tensor([[982.0, 0, 986, 16]])], 1, 1).item() == pytest.approx(61 / 64, rel=1e-3)


def test_layout_in_memory_does_not_matter():
    features, boxes = features_of(2, 4, HEIGHT, WIDTH), [random_boxes(3, 5), random_boxes(4, 6)]
    there = sampled(features.to(memory_format=torch.channels_last), boxes, 6, 2)
    assert torch.equal(there, sampled(features, boxes, 6, 2))


def test_no_samples_mean_pooling():
    features, boxes = features_of(2, 2, HEIGHT, WIDTH), [random_boxes(3, 7), random_boxes(2, 8)]
    assert torch.equal(pool_rois(features, boxes, 6, 1 / STRIDE, 0), roi_pool(features, boxes, 6, 1 / STRIDE))
    assert torch.equal(pool_rois(features, boxes, 6, 1 / STRIDE, 2), sampled(features, boxes, 6, 2))
