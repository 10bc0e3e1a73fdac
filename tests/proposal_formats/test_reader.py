from pathlib import Path

import numpy as np
import pytest

from altopt.errors import ArtifactError
from altopt.proposal_formats.reader import (
    BOX_FORMATS,
    ProposalFileReader,
    in_order,
    rank_scores,
    to_continuous,
    to_inclusive,
)

PATH = Path("boxes.xyz")


def read(boxes, scores=None, box_format="xyxy"):
    return next(iter(ProposalFileReader(PATH, "a test", box_format, [("a", boxes, scores)])))[1:]


def test_ranks_fall_from_one():
    assert rank_scores(4).tolist() == [1, 0.75, 0.5, 0.25]
    assert len(rank_scores(0)) == 0
    many = rank_scores(100_000)
    assert (np.diff(many) < 0).all()
    assert many[-1] > 0


def test_images_without_scores_are_counted():
    given = [("a", [[0, 0, 1, 1]] * 2, None), ("b", [[0, 0, 1, 1]], [0.3])]
    incoming = ProposalFileReader(PATH, "a test", "xyxy", given)
    assert [scores.tolist() for _, _, scores in incoming] == [[1, 0.5], [np.float32(0.3)]]
    assert incoming.unscored == 1


def test_best_first_and_equal_scores_in_order():
    boxes, scores = read([[n, 0, n + 1, 1] for n in range(5)], [0.5, 0.9, 0.5, 0.1, 0.9])
    assert boxes[:, 0].tolist() == [1, 4, 0, 2, 3]
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


@pytest.mark.parametrize("empty", [[], [[]], np.empty((0, 0)), np.empty((0, 4), np.uint16), np.empty((4, 0))])
def test_no_boxes(empty):
    boxes, scores = read(empty)
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))


def test_column_of_scores():
    assert read([[0, 0, 1, 1]] * 2, np.array([[0.9], [0.8]]))[1].shape == (2,)


@pytest.mark.parametrize(("boxes", "scores", "words"), [
    ([[0, 0, 1]], None, r"array \[1, 3\]"),
    ([0, 0, 1, 1], None, r"array \[4\]"),
    ([["0", "0", "1", "1"]], None, "four numbers"),
    ([[0, 0, 1, 1], [0, 0]], None, "four numbers"),
    ([[0, 0, 1, 1]], [0.5, 0.4], "1 boxes and 2 scores"),
    ([[0, 0, 1, 1]], ["high"], "scores"),
    ([[True, True, True, True]], None, "of bool"),
])
def test_what_is_no_box(boxes, scores, words):
    with pytest.raises(ArtifactError, match=words) as caught:
        read(boxes, scores)
    assert str(caught.value).startswith("boxes.xyz cannot be imported as a test: image a has ")


def test_order_instead_of_ids():
    assert in_order(PATH, 2, ("a", "b")) == ("a", "b")
    with pytest.raises(ArtifactError, match="holds 3 images and the split 2:"):
        in_order(PATH, 3, ("a", "b"))
    with pytest.raises(ArtifactError, match="leave the mirrored images out"):
        in_order(PATH, 4, ("a", "b"))


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
