import numpy as np
import pytest
from PIL import ImageFont

from altopt.drawing import boxes as drawing
from altopt.drawing.boxes import class_colour, draw_boxes

RED, BLUE = (255, 0, 0), (0, 0, 255)
NO_BOXES = np.empty((0, 4), np.float32)


def grey(width, height):
    return np.full((height, width, 3), 128, np.uint8)


def drawn(image, boxes, labels, colours):
    return np.asarray(draw_boxes(image, np.array(boxes, np.float32).reshape(-1, 4), labels, colours))


def extent(mask):
    """x1, y1, x2, y2 of what is set, the ends behind the last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_without_boxes_the_image_is_as_it_was():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    before = image.copy()
    assert (drawn(image, NO_BOXES, [], []) == image).all()
    drawn(image, [[5, 5, 20, 20]], ["cat"], [RED])
    assert (image == before).all()


def test_a_box_covers_its_pixels_and_no_others():
    changed = (drawn(grey(100, 80), [[10, 20, 60, 70]], [""], [RED]) == RED).all(axis=2)
    assert extent(changed) == (10, 20, 60, 70)
    assert not changed[25:65, 15:55].any()


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [39, 29, 40, 30], [5, 5, 5, 5], [5.4, 5.4, 5.6, 5.6]])
def test_the_smallest_boxes_are_seen(box):
    assert (drawn(grey(40, 30), [box], [""], [RED]) == RED).all(axis=2).any()


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (640, 480), (3000, 20), (20, 3000)])
def test_labels_stay_inside_at_any_size(size):
    """The field is complete: drawn on a larger image it would be no larger."""
    width, height = size
    corners = [[0, 0, width / 3, height / 3], [width * 0.9, height * 0.9, width, height]]
    for box in corners:
        font = drawing._font(max(drawing.SMALLEST_FONT, round(max(size) * drawing.FONT_SHARE)))
        area, text, _ = drawing._placed(box, "a long name of a class 0.97", RED, font, size, [])
        assert text
        assert area[0] >= 0
        assert area[1] >= 0
        assert area[3] <= max(height, area[3] - area[1])
        if width >= 40:
            assert area[2] <= width
        drawn(grey(*size), [box], ["a long name of a class 0.97"], [RED])


def test_a_label_is_cut_only_if_it_must_be():
    font = drawing._font(11)
    assert drawing._placed([0, 0, 9, 9], "cat 0.97", RED, font, (640, 480), []).text == "cat 0.97"
    text = drawing._placed([0, 0, 9, 9], "cat 0.97", RED, font, (30, 480), []).text
    assert text.endswith("…")
    assert "cat 0.97".startswith(text[:-1])


def test_letters_and_lines_grow_with_the_image():
    def height_of_label(scale):
        image = drawn(grey(640 * scale, 480 * scale), [[100, 100, 300, 300]], ["cat"], [RED])
        field = (image == RED).all(axis=2)
        return 100 - extent(field)[1]

    assert height_of_label(4) > 2.5 * height_of_label(1) > 0


def test_labels_do_not_cover_each_other_where_there_is_room():
    boxes = [[100, 100, 200, 200], [102, 101, 203, 202], [104, 102, 205, 204]]
    fields: list[drawing.Field] = []
    for box in boxes:
        fields.append(drawing._placed(box, "cat 0.97", RED, drawing._font(14), (640, 480), fields))
    assert not any(drawing._overlap(a.area, b.area) for k, a in enumerate(fields) for b in fields[:k])


def test_the_first_is_on_top():
    image = drawn(grey(100, 80), [[10, 20, 60, 70]] * 2, ["", ""], [RED, BLUE])
    assert (image == RED).all(axis=2).any()
    assert not (image == BLUE).all(axis=2).any()


def test_letters_are_read_on_every_colour():
    for index in range(40):
        colour = class_colour(index)
        image = drawn(grey(200, 100), [[10, 50, 90, 90]], ["MMMM"], [colour])
        letters = image[:50].reshape(-1, 3).astype(int)
        luminance = letters @ np.array((0.299, 0.587, 0.114))
        own = np.dot(colour, (0.299, 0.587, 0.114))
        assert np.abs(luminance[(letters != 128).any(axis=1)] - own).max() > 80


def test_colours_of_classes_are_stable_and_distinct():
    assert [class_colour(index) for index in range(3)] == [(242, 12, 12), (12, 242, 242), (70, 12, 242)]
    colours = np.array([class_colour(index) for index in range(20)], int)
    apart = np.abs(colours[:, None] - colours[None]).max(axis=2) + 1000 * np.eye(20, dtype=int)
    assert apart.min() >= 60
    assert class_colour(1000) in [class_colour(index) for index in range(100)]


def test_without_fonts_of_the_system_pillows_own_is_taken(monkeypatch):
    monkeypatch.setattr(drawing, "FONTS", ("no such font.ttf",))
    drawing._font.cache_clear()
    try:
        assert isinstance(drawing._font(12), ImageFont.FreeTypeFont)
        assert (drawn(grey(200, 100), [[10, 50, 90, 90]], ["cat"], [RED]) == RED).all(axis=2)[:50].any()
    finally:
        drawing._font.cache_clear()
