"""Anchors: the nine of the paper, and their places on a feature map."""

import pytest
import torch

from altopt.ops.anchors import reference_anchors, shifted_anchors

# py-faster-rcnn's table (0-based, inclusive) with x2 and y2 one larger: our boxes are continuous.
NINE = [
    (-84, -40, 100, 56), (-176, -88, 192, 104), (-360, -184, 376, 200),
    (-56, -56, 72, 72), (-120, -120, 136, 136), (-248, -248, 264, 264),
    (-36, -80, 52, 96), (-80, -168, 96, 184), (-168, -344, 184, 360),
]


def paper() -> torch.Tensor:
    return reference_anchors(16, (0.5, 1.0, 2.0), (8.0, 16.0, 32.0))


def test_the_nine_anchors_of_the_paper():
    assert paper().tolist() == [list(map(float, box)) for box in NINE]


def test_sizes_are_the_published_ones():
    sizes = paper()[:, 2:] - paper()[:, :2]
    assert sizes.tolist() == [
        [184, 96], [368, 192], [736, 384], [128, 128], [256, 256], [512, 512], [88, 176], [176, 352], [352, 704]]


def test_all_are_centred_on_the_first_cell():
    assert (paper()[:, :2] + paper()[:, 2:]).eq(16).all()


def test_another_base_moves_centre_and_size():
    assert reference_anchors(8, (1.0,), (2.0, 1.0)).tolist() == [[-4, -4, 12, 12], [0, 0, 8, 8]]


@pytest.mark.parametrize(("height", "width"), [(2, 3), (1, 1), (5, 1), (37, 62)])
def test_enumeration_is_row_column_anchor(height, width):
    shifted = shifted_anchors(paper(), height, width, 16)
    expected = [
        [x1 + 16 * column, y1 + 16 * row, x2 + 16 * column, y2 + 16 * row]
        for row in range(height) for column in range(width) for x1, y1, x2, y2 in NINE]
    assert shifted.tolist() == expected


def test_a_map_without_cells_has_no_anchors():
    assert shifted_anchors(paper(), 0, 5, 16).shape == (0, 4)
