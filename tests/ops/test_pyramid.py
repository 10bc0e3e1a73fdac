import pytest
import torch

from altopt.machine.randomness import generator
from altopt.ops.pyramid import bins, nearest_scale, pool_at_nearest_scale, pyramid_pool

BOXES = [torch.tensor([[0, 0, 160, 128], [16, 32, 96, 64], [100.5, 3.2, 101, 4], [-50, 20, 70, 300]]),
         torch.zeros(0, 4), torch.tensor([[40.0, 8, 150, 120]])]


def brute_force(features, box, levels):
    """The maximum of every bin, cell by cell, in the order level, channel, row, column."""
    channels, height, width = features.shape
    x1, y1, x2, y2 = (round_half_away(value / 16) for value in (box[0], box[1], box[2] - 1, box[3] - 1))
    columns, rows = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    out = []
    for level in levels:
        for c in range(channels):
            for i in range(level):
                for j in range(level):
                    cells = [features[c, y, x].item()
                             for y in range(y1 + i * rows // level, y1 - (-(i + 1) * rows // level))
                             for x in range(x1 + j * columns // level, x1 - (-(j + 1) * columns // level))
                             if 0 <= y < height and 0 <= x < width]
                    out.append(max(cells, default=0.0))
    return torch.tensor(out)


def round_half_away(value):
    value = float(value)
    return int(value + 0.5) if value >= 0 else -int(-value + 0.5)


@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (1,), (2, 5)])
def test_every_bin_is_the_maximum_of_its_cells(levels):
    features = torch.randn(3, 4, 8, 10, generator=generator("pyramid"))
    pooled = pyramid_pool(features, BOXES, levels, 1 / 16)
    expected = [brute_force(features[b], box, levels) for b, boxes in enumerate(BOXES) for box in boxes]
    assert pooled.shape == (5, 4 * bins(levels))
    assert torch.equal(pooled, torch.stack(expected))


def test_fifty_bins():
    assert bins((6, 3, 2, 1)) == 50


def test_no_regions():
    assert pyramid_pool(torch.randn(1, 4, 8, 10), [torch.zeros(0, 4)], (2, 1), 1 / 16).shape == (0, 20)


def test_the_nearest_scale_is_the_one_that_makes_the_area_most_alike():
    boxes = torch.tensor([[0.0, 0, 448, 448], [5, 5, 117, 117], [0, 0, 224, 224], [0, 0, 0, 0], [0, 0, 56, 896]])
    assert nearest_scale(boxes, (0.5, 1.0, 2.0), 224 * 224).tolist() == [0, 2, 1, 0, 1]
    assert nearest_scale(torch.zeros(0, 4), (0.5, 1.0), 224 * 224).tolist() == []


def test_pooling_at_the_nearest_scale_keeps_the_order_of_the_boxes():
    boxes = torch.tensor([[0.0, 0, 448, 448], [5, 5, 117, 117], [0, 0, 224, 224], [1, 0, 449, 448]])
    asked = []

    def pool(scale, here):
        asked.append((scale, len(here)))
        return torch.cat([torch.full((len(here), 1), float(scale)), here], dim=1)

    pooled = pool_at_nearest_scale(boxes, (0.5, 1.0, 2.0), 224 * 224, pool)
    assert asked == [(0, 2), (1, 1), (2, 1)]
    scales = torch.tensor([0.5, 2, 1, 0.5])
    assert pooled.tolist() == torch.cat([torch.tensor([[0.0], [2], [1], [0]]), boxes * scales[:, None]], dim=1).tolist()
    assert pool_at_nearest_scale(boxes[:0], (0.5, 1.0), 224 * 224, pool).shape == (0, 5)
