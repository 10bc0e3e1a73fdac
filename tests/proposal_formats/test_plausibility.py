import numpy as np
import pytest

from altopt.proposal_formats.plausibility import Plausibility
from altopt.proposal_formats.reader import to_continuous

SIZE = (100, 60)
OBJECTS = np.array([[10, 20, 70, 50], [0, 0, 100, 10]], np.float32)
# Pixels from 0, inclusive: boxes that touch all four edges, and the two objects.
PIXELS = np.array([[0, 0, 99, 59], [0, 5, 99, 20], [10, 0, 40, 59], [10, 20, 69, 49], [0, 0, 99, 9]], np.uint16)
EDGES = PIXELS + np.array([0, 0, 1, 1])


def look(boxes, box_format, objects=OBJECTS, size=SIZE):
    plausibility = Plausibility(box_format)
    continuous = to_continuous(np.asarray(boxes), box_format)
    usable = plausibility.usable("a", continuous, np.ones(len(continuous), np.float32), size)
    plausibility.try_readings(objects, continuous)
    return plausibility, usable


@pytest.mark.parametrize(("boxes", "box_format"), [
    (PIXELS, "inclusive-0"),
    (PIXELS + 1, "inclusive-1"),
    ((PIXELS + 1)[:, [1, 0, 3, 2]], "yxyx-inclusive-1"),
    (EDGES, "xyxy"),
    (np.hstack([PIXELS[:, :2], PIXELS[:, 2:] - PIXELS[:, :2] + 1]), "xywh"),
    (np.random.default_rng(0).uniform(1, 50, (9, 2)).repeat(2, 1).cumsum(1), "xyxy"),
    (np.empty((0, 4)), "xyxy"),
])
def test_nothing_to_say_of_the_right_frame(boxes, box_format):
    plausibility, usable = look(boxes, box_format, size=(1000, 1000) if len(boxes) == 9 else SIZE)
    assert plausibility.warnings() == []
    assert plausibility.problem() == ""
    assert usable.all()


@pytest.mark.parametrize(("boxes", "box_format", "words"), [
    (PIXELS + 1, "inclusive-0", "every x1 and y1 is at least 1 and 4 boxes end one pixel outside"),
    (PIXELS + 1, "xyxy", "at least 1 though 4 boxes end at the image's edge"),
    (PIXELS, "xyxy", "4 boxes begin at 0, 4 end one pixel before the image's edge, none at it"),
    (PIXELS, "inclusive-1", "4 boxes begin at pixel 0: they look counted from 0"),
])
def test_another_count_of_pixels(boxes, box_format, words):
    plausibility, _ = look(boxes, box_format)
    assert any(words in text for text in plausibility.warnings())
    assert "--box-format inclusive-" in plausibility.warnings()[0]


@pytest.mark.parametrize(("boxes", "box_format", "advice"), [
    (PIXELS[:, [1, 0, 3, 2]], "inclusive-0", "with x and y exchanged, on the first 1 images with objects: the "
                                             "boxes look like that (--box-format yxyx-inclusive-1)"),
    (PIXELS + 1, "yxyx-inclusive-1", "(--box-format inclusive-1)"),
    (np.hstack([PIXELS[:, :2], PIXELS[:, 2:] - PIXELS[:, :2] + 1]), "xyxy", "with x y width height"),
    ([[60, 40, 90, 55]], "xywh", "with x1 y1 x2 y2"),
])
def test_another_reading_covers_more(boxes, box_format, advice):
    objects = OBJECTS if len(boxes) > 1 else np.array(boxes, np.float32)
    plausibility, _ = look(boxes, box_format, objects)
    assert any(advice in text and "average recall is " in text for text in plausibility.warnings())


def test_boxes_that_cannot_be_used():
    boxes = [[0, 0, 10, 10], [0, 0, np.nan, 1], [20, 0, 10, 10], [0, 0, 101.5, 10], [-2, 0, 5, 5], [-1, -1, 101, 61]]
    plausibility, usable = look(boxes, "xyxy")
    assert usable.tolist() == [True, False, False, False, False, True]
    assert plausibility.problem() == ("of 6 boxes read as xyxy, 1 not finite and 1 ending before they begin and 2 "
                                      "outside their image, first (0, 0, nan, 1) of image a, 100 x 60 pixels")


def test_scores_that_are_not_finite():
    plausibility = Plausibility("xyxy")
    boxes = np.array([[0, 0, 1, 1]] * 2, np.float32)
    assert plausibility.usable("a", boxes, np.array([np.nan, 1], np.float32), SIZE).tolist() == [False, True]


def test_a_negative_number_that_went_through_uint16():
    plausibility, _ = look(np.array([[-1, 0, 9, 9]]).astype(np.uint16), "inclusive-0")
    assert "a negative number that went through uint16" in plausibility.problem()


def test_boxes_without_width():
    plausibility, usable = look([[5, 5, 5, 9], [0, 0, 100, 60]], "xyxy")
    assert usable.all()
    assert plausibility.warnings() == ["1 of 2 boxes have no width or no height: they are kept"]
