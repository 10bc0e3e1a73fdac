"""RoI pooling, forward and backward, against a slow version written from its definition."""

import math

import pytest
import torch
import torchvision

from altopt.machine.determinism import fixed_order
from altopt.ops.roi_pool import pool_in_order, roi_pool

STRIDE = 16


@pytest.fixture(params=[False, True], ids=["kernel", "fixed order"], autouse=True)
def in_order(request, monkeypatch):
    """Every test holds for torchvision's kernel and for the way of fixed order, which only CUDA takes by itself."""
    if request.param:
        monkeypatch.setattr(torchvision.ops, "roi_pool", pool_in_order)
    return request.param


def rounded(value: float) -> int:
    """Round half away from zero, as C does."""
    return math.floor(abs(value) + 0.5) * (-1 if value < 0 else 1)


def bins(box: list[float], size: int, height: int, width: int) -> list[list[list[tuple[int, int]]]]:
    """Return, for each bin of a box, the cells (row, column) that it takes its maximum over."""
    x1, y1 = rounded(box[0] / STRIDE), rounded(box[1] / STRIDE)
    x2, y2 = rounded((box[2] - 1) / STRIDE), rounded((box[3] - 1) / STRIDE)  # the last pixels, inclusive
    columns, rows = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)

    def covered(start: int, cells: int, bin: int, limit: int) -> range:
        first, last = start + bin * cells // size, start - (-(bin + 1) * cells // size)  # floor and ceil
        return range(min(max(first, 0), limit), min(max(last, 0), limit))

    return [[[(r, c) for r in covered(y1, rows, i, height) for c in covered(x1, columns, j, width)]
             for j in range(size)] for i in range(size)]


def slow(features: torch.Tensor, boxes: list[torch.Tensor], size: int,
         weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pooled features and, for ``weights`` on the output, the gradient with respect to the features."""
    _, channels, height, width = features.shape
    pooled = torch.zeros(sum(map(len, boxes)), channels, size, size, dtype=features.dtype)
    gradient = torch.zeros_like(features)
    rois = [(b, box) for b, each in enumerate(boxes) for box in each.tolist()]
    for r, (b, box) in enumerate(rois):
        for i, row in enumerate(bins(box, size, height, width)):
            for j, cells in enumerate(row):
                for c in range(channels if cells else 0):
                    y, x = max(cells, key=lambda cell: features[b, c, cell[0], cell[1]].item())
                    pooled[r, c, i, j] = features[b, c, y, x]
                    if weights is not None:
                        gradient[b, c, y, x] += weights[r, c, i, j]
    return pooled, gradient


def distinct(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return features no two of which are equal, half of them negative."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (order - count // 2).reshape(shape).to(dtype)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    """Return boxes of an image of 144 x 112 pixels, some of them reaching out of it."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=random) * 160 - 30
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=random) * 120], dim=1)


def pooled(features: torch.Tensor, boxes: list[torch.Tensor], size: int) -> torch.Tensor:
    """Pool with a gradient and without one, and return that with one."""
    learned = features if features.requires_grad else features.clone().requires_grad_()
    result = roi_pool(learned, boxes, size, 1 / STRIDE)
    assert torch.equal(result, roi_pool(features.detach(), boxes, size, 1 / STRIDE))
    return result


def check_against_slow(features, boxes, size, weights):
    expected, gradient = slow(features.detach(), boxes, size, weights)
    result = pooled(features, boxes, size)
    (result * weights).sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(features.grad, gradient)


@pytest.mark.parametrize("size", [1, 2, 6, 7])
def test_forward_and_backward_of_random_boxes_in_several_images(size):
    features = distinct(3, 2, 7, 9).requires_grad_()
    boxes = [random_boxes(6, 1), torch.zeros(0, 4), random_boxes(5, 2)]
    weights = distinct(11, 2, size, size, seed=3)
    check_against_slow(features, boxes, size, weights)
    assert not features.grad[1].any()  # the image without boxes


# Names of the cases, boxes in pixels; the image is 144 x 112, its map 9 x 7.
CASES = {
    "whole image": [0, 0, 144, 112],
    "one pixel": [40, 40, 41, 41],
    "one pixel at the far corner": [143, 111, 144, 112],
    "less than a pixel": [40.2, 40.2, 40.6, 40.6],
    "no area": [40, 40, 40, 40],
    "turned over": [80, 80, 40, 40],
    "half cells go away from zero": [24, 40, 73, 105],
    "negative half cells too": [-24, -8, 41, 41],
    "right and below": [200, 160, 300, 300],
    "left and above": [-300, -300, -200, -160],
    "larger than the image": [-100, -100, 300, 300],
    "partly outside": [100, 80, 220, 180],
}


@pytest.mark.parametrize("box", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [2, 7])
def test_single_boxes(box, size):
    features, boxes = distinct(1, 2, 7, 9).requires_grad_(), [torch.tensor([box], dtype=torch.float32)]
    weights = distinct(1, 2, size, size, seed=5)
    check_against_slow(features, boxes, size, weights)


def test_rounding_by_hand():
    """x: 40 / 16 = 2.5 goes to 3 and (57 - 1) / 16 = 3.5 to 4; with rounding to even it were 2 and 4."""
    columns = torch.arange(9.0).expand(1, 1, 7, 9)
    assert pooled(columns, [torch.tensor([[40.0, 0, 57, 16]])], 2)[0, 0, 0].tolist() == [3, 4]


def test_the_last_pixel_is_the_edge_less_one():
    """The last pixel of a box that ends at 24 is 23, in cell 1; its edge would be rounded to cell 2."""
    columns = torch.arange(9.0).expand(1, 1, 7, 9)
    assert pooled(columns, [torch.tensor([[0.0, 0, 24, 16]])], 1).item() == 1
    assert pooled(columns, [torch.tensor([[0.0, 0, 25, 16]])], 1).item() == 2


def test_an_empty_bin_is_zero_even_among_negative_features():
    features = torch.full((1, 1, 7, 9), -3.0)
    assert pooled(features, [torch.tensor([[300.0, 0, 400, 50]])], 2).eq(0).all()
    half = pooled(features, [torch.tensor([[80.0, 0, 208, 16]])], 2)[0, 0]
    assert half.tolist() == [[-3, 0], [-3, 0]]


def test_every_image_is_read_from_its_own_features():
    features = torch.stack([torch.full((1, 4, 4), float(b)) for b in range(3)])
    box = torch.tensor([[0.0, 0, 64, 64]])
    assert pooled(features, [box, box.expand(2, 4), box], 1).flatten().tolist() == [0, 1, 1, 2]


def test_no_boxes_at_all():
    features = distinct(2, 3, 7, 9).requires_grad_()
    result = pooled(features, [torch.zeros(0, 4), torch.zeros(0, 4)], 7)
    assert result.shape == (0, 3, 7, 7)
    result.sum().backward()
    assert features.grad.eq(0).all()


def test_gradcheck_in_float64():
    features = (distinct(2, 2, 5, 6, dtype=torch.float64) / 10).requires_grad_()
    boxes = [torch.tensor([[3.0, 5, 70, 60], [40, 40, 41, 41]]), torch.tensor([[-20.0, 10, 60, 200]])]
    assert torch.autograd.gradcheck(lambda x: pooled(x, boxes, 3), features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_another_precision_keep_it(dtype):
    features = (distinct(1, 2, 7, 9) / 7).to(dtype).requires_grad_()
    boxes = [random_boxes(9, 4)]
    result = pooled(features, boxes, 6)
    assert result.dtype == dtype
    assert torch.equal(result, slow(features.detach(), boxes, 6)[0])
    result.sum().backward()
    assert features.grad.dtype == dtype
    assert features.grad.any()


def test_coordinates_are_not_rounded_to_the_precision_of_the_features():
    """At 1000 px bfloat16 knows only every fourth pixel, and would take 999 / 16 = 62.4 for 62.5."""
    columns = torch.arange(80.0, dtype=torch.bfloat16).expand(1, 1, 1, 80)
    assert pooled(columns, [torch.tensor([[999.0, 0, 1000, 16]])], 1).item() == 62
    assert pooled(columns, [torch.tensor([[1000.0, 0, 1001, 16]])], 1).item() == 63


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("edge", [(1, 1), (1, 40), (23, 1), (23, 40)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bins_of_every_height_and_width(edge, size, dtype, layout):
    """Up to that of the whole map, and equal values among them."""
    random = torch.Generator().manual_seed(9)
    features = torch.randn(2, 5, *edge, generator=random).mul(2).round().to(dtype).to(memory_format=layout)
    boxes = [torch.cat([random_boxes(90, 11) * scale for scale in (0.2, 1, 4)]), random_boxes(7, 12)]
    assert pooled(features, boxes, size).shape == (277, 5, size, size)


def test_pooling_without_gradient_leaves_no_graph():
    features, boxes = distinct(1, 2, 7, 9).requires_grad_(), [random_boxes(3, 1)]
    with torch.no_grad():
        assert not roi_pool(features, boxes, 2, 1 / STRIDE).requires_grad
    assert not roi_pool(features.detach(), [boxes[0].requires_grad_()], 2, 1 / STRIDE).requires_grad
    assert roi_pool(features, boxes, 2, 1 / STRIDE).requires_grad


def test_maps_of_any_size_are_pooled_one_by_one():
    sizes, boxes = [(7, 9), (9, 7), (7, 9)], [random_boxes(9, 11), random_boxes(7, 12), torch.zeros(0, 4)]
    maps = [distinct(3, *size, seed=k).requires_grad_() for k, size in enumerate(sizes)]
    result = roi_pool(maps, boxes, 6, 1 / STRIDE)
    assert torch.equal(result, torch.cat([roi_pool(each[None], [rois], 6, 1 / STRIDE)
                                          for each, rois in zip(maps, boxes, strict=True)]))
    result.sum().backward()
    for each, rois in zip(maps, boxes, strict=True):
        assert torch.equal(each.grad, slow(each.detach()[None], [rois], 6, torch.ones(len(rois), 3, 6, 6))[1][0])


@pytest.mark.parametrize("in_order", [False], indirect=True)
@pytest.mark.usefixtures("in_order")
def test_torchs_switch_for_deterministic_algorithms_changes_no_bit_on_the_cpu():
    random = torch.Generator().manual_seed(5)
    features, boxes = torch.randn(2, 37, 7, 9, generator=random), [random_boxes(30, 11), random_boxes(20, 12)]
    weights = torch.randn(50, 37, 6, 6, generator=random)
    default = gradient_of(features, boxes, 6, weights)
    with fixed_order():
        assert torch.equal(gradient_of(features, boxes, 6, weights), default)


def gradient_of(features, boxes, size, weights):
    features = features.clone().requires_grad_()
    (pooled(features, boxes, size) * weights).sum().backward()
    return features.grad


@pytest.mark.parametrize("size", [1, 7])
def test_both_backward_passes_give_the_same_bits_on_the_cpu(size, monkeypatch):
    """Many bins share a cell, and weights are no whole numbers: another order of sums would show in the last bits."""
    random = torch.Generator().manual_seed(7)
    features, boxes = torch.randn(2, 3, 7, 9, generator=random), [random_boxes(90, 11), random_boxes(70, 12)]
    weights = torch.randn(160, 3, size, size, generator=random)
    default = gradient_of(features, boxes, size, weights)
    with monkeypatch.context() as patched:
        patched.setattr(torchvision.ops, "roi_pool", pool_in_order)
        in_order = gradient_of(features, boxes, size, weights)
    assert torch.equal(default, in_order)
    backwards = gradient_of(features, [each.flip(0) for each in boxes], size,
                            torch.cat([weights[:90].flip(0), weights[90:].flip(0)]))
    assert not torch.equal(backwards, in_order)  # so the order matters here
    torch.testing.assert_close(backwards, in_order, rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_reaches_its_own_cell_only():
    """A bin without a cell takes no part, whatever its gradient."""
    boxes = [torch.tensor([[300.0, 0, 400, 50], [0, 0, 8, 8]])]
    gradient = gradient_of(distinct(1, 1, 7, 9), boxes, 1, torch.tensor([math.inf, 2.0])[:, None, None, None])
    assert gradient.flatten().tolist() == [2.0] + [0.0] * 62


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("in_order", [False], indirect=True)  # on CUDA the switch chooses
@pytest.mark.usefixtures("in_order")
def test_on_cuda_the_fixed_order_repeats_itself():
    random = torch.Generator().manual_seed(7)
    features, boxes = torch.randn(1, 64, 38, 50, generator=random).cuda(), [random_boxes(128, 11).cuda() * 4]
    weights = torch.randn(128, 64, 7, 7, generator=random).cuda()
    with fixed_order():
        first = gradient_of(features, boxes, 7, weights)
        assert all(torch.equal(gradient_of(features, boxes, 7, weights), first) for _ in range(5))
    torch.testing.assert_close(first.cpu(), gradient_of(features.cpu(), [boxes[0].cpu()], 7, weights.cpu()))
