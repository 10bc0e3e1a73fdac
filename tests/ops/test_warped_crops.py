import math

import pytest
import torch

from altopt.machine.randomness import generator
from altopt.ops.warped_crops import context_windows, crop_padding, warp

BOXES = torch.tensor([
    [4.0, 3, 20, 15],     # inside
    [0, 0, 30, 20],       # all of the image: context on every side
    [-6, 5, 9, 26],       # beyond two edges
    [10, 4, 11, 5],       # one pixel
    [40, 40, 60, 60],     # elsewhere
])


def direct(image, box, side):
    """The crop, pixel by pixel: where its centre lies in the image, and a mean of up to four pixels there."""
    height, width = image.shape[1:]
    padding = round(16 * side / 227)
    grown = side / (side - 2 * padding)
    x1, y1, x2, y2 = box.tolist()
    crop = torch.zeros(3, side, side)
    for i in range(side):
        for j in range(side):
            x = (x1 + x2) / 2 + ((j + 0.5) / side - 0.5) * (x2 - x1) * grown
            y = (y1 + y2) / 2 + ((i + 0.5) / side - 0.5) * (y2 - y1) * grown
            if not (0 <= x <= width and 0 <= y <= height):
                continue
            u, v = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
            left, top = math.floor(u), math.floor(v)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            upper = image[:, top, left] * (left + 1 - u) + image[:, top, right] * (u - left)
            lower = image[:, bottom, left] * (left + 1 - u) + image[:, bottom, right] * (u - left)
            crop[:, i, j] = upper * (top + 1 - v) + lower * (v - top)
    return crop


@pytest.mark.parametrize("side", [8, 29])
def test_crops_are_what_a_direct_loop_makes(side):
    image = torch.randn(3, 20, 30, generator=generator("warp"))
    crops = warp(image, BOXES, side)
    assert crops.shape == (5, 3, side, side)
    for crop, box in zip(crops, BOXES, strict=True):
        torch.testing.assert_close(crop, direct(image, box, side), atol=2e-4, rtol=1e-4)


def test_a_crop_does_not_depend_on_the_others():
    image = torch.randn(3, 20, 30, generator=generator("warp"))
    together = warp(image, BOXES, 16)
    for k in range(len(BOXES)):
        assert torch.equal(warp(image, BOXES[k : k + 1], 16)[0], together[k])


def test_padding_is_16_px_of_227():
    assert [crop_padding(side) for side in (227, 224, 64, 114, 4)] == [16, 16, 5, 8, 0]


def test_a_box_fills_its_crop_up_to_the_padding():
    window = context_windows(torch.tensor([[100.0, 50, 295, 245]]), 227)[0]
    assert window.tolist() == pytest.approx([84, 34, 311, 261])


def test_outside_is_the_mean_colour_and_a_constant_stays_constant():
    crop = warp(torch.full((3, 20, 30), 2.5), torch.tensor([[0.0, 0, 30, 20]]), 227)[0]
    inner = crop[:, 16:211, 16:211]
    torch.testing.assert_close(inner, torch.full_like(inner, 2.5))
    assert crop[:, :16].abs().max() == 0
    assert crop[:, :, 211:].abs().max() == 0


def test_no_regions():
    assert warp(torch.zeros(3, 5, 6), torch.zeros(0, 4), 8).shape == (0, 3, 8, 8)
