import numpy as np
import pytest

from altopt.proposal_formats.box_formats import BOX_FORMATS, to_continuous, to_inclusive

# The box of the pixels 0..9 across and 20..39 down, in every convention.
SAME = {
    "xyxy": (0, 20, 10, 40),
    "inclusive-0": (0, 20, 9, 39),
    "inclusive-1": (1, 21, 10, 40),
    "yxyx-inclusive-1": (21, 1, 40, 10),
    "xywh": (0, 20, 10, 20),
}


def test_every_frame_is_tried():
    assert set(SAME) == set(BOX_FORMATS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("box_format", SAME)
def test_one_box_in_every_frame(box_format, dtype):
    boxes = to_continuous(np.array([SAME[box_format]], dtype), box_format)
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[0, 20, 10, 40]]


def test_uint16_does_not_wrap():
    assert to_continuous(np.array([[0, 0, 0, 0]], np.uint16), "inclusive-1").tolist() == [[-1, -1, 0, 0]]
    assert to_continuous(np.array([[0, 0, 65535, 65535]], np.uint16), "inclusive-0").tolist() == [[0, 0, 65536, 65536]]
    assert to_continuous(np.array([[60000, 0, 60000, 9]], np.uint16), "xywh").tolist() == [[60000, 0, 120000, 9]]


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_no_boxes_and_an_input_left_alone(box_format):
    assert to_continuous(np.empty((0, 4)), box_format).shape == (0, 4)
    boxes = np.array([[1.0, 2, 3, 4]])
    to_continuous(boxes, box_format)
    assert boxes.tolist() == [[1, 2, 3, 4]]


def test_inclusive_and_back():
    boxes = np.array([[0, 1, 10, 20], [3.25, 4.5, 5.75, 6]], np.float32)
    assert np.array_equal(to_continuous(to_inclusive(boxes), "inclusive-0"), boxes)
