"""IoU against hand-made examples and against a loop."""

import numpy as np
import pytest
from evaluation_samples import random_boxes, slow_iou

from altopt.evaluation.measures import box_areas, box_iou


def test_examples():
    first = np.array([[0, 0, 2, 2], [0, 0, 1, 1]], np.float32)
    second = np.array([[0, 0, 2, 2], [1, 0, 3, 2], [2, 0, 4, 2], [9, 9, 10, 10]], np.float32)
    expected = [[1, 1 / 3, 0, 0], [1 / 4, 0, 0, 0]]
    assert box_iou(first, second).tolist() == expected
    assert box_iou(first, second).dtype == np.float64


def test_inclusive_pixels():
    one_pixel = np.array([[5, 5, 5, 5]])
    assert box_areas(one_pixel, plus_one=True).tolist() == [1]
    assert box_iou(one_pixel, one_pixel, plus_one=True).tolist() == [[1]]
    assert box_iou(np.array([[0, 0, 1, 0]]), np.array([[1, 0, 2, 0]]), plus_one=True).tolist() == [[1 / 3]]


def test_boxes_without_area_overlap_nothing():
    point = np.array([[5, 5, 5, 5]])
    assert box_areas(point).tolist() == [0]
    assert box_iou(point, np.array([[5, 5, 5, 5], [0, 0, 9, 9]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_boxes(shape):
    assert box_iou(np.zeros((shape[0], 4)), np.zeros((shape[1], 4))).shape == shape


@pytest.mark.parametrize("plus_one", [False, True])
def test_equals_the_loop(plus_one):
    random = np.random.default_rng(1)
    first, second = random_boxes(random, 40), random_boxes(random, 50)
    expected = [[slow_iou(one, other, float(plus_one)) for other in second] for one in first]
    assert box_iou(np.array(first), np.array(second), plus_one=plus_one).tolist() == expected


def test_inclusive_boxes_are_continuous_boxes_one_less_at_the_upper_left():
    random = np.random.default_rng(2)
    first, second = np.array(random_boxes(random, 30)), np.array(random_boxes(random, 30))
    shift = np.array([1, 1, 0, 0])
    assert np.array_equal(box_iou(first, second, plus_one=True), box_iou(first - shift, second - shift))
