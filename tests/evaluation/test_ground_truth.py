"""Ground truth from COCO json: any ids, flags, areas, and every way in which a file can be wrong."""

import numpy as np
import pytest
from evaluation_samples import objects, write_json

from altopt.errors import DataError
from altopt.evaluation.ground_truth import read_ground_truth

BOX = {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 4]}


def document(*annotations):
    return {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": "000005"}],
        "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": "z", "name": "zebra"}],
        "annotations": list(annotations),
    }


def read(path, content):
    return read_ground_truth(write_json(path / "truth.json", content))


def test_reads_objects_in_the_order_of_the_file(tmp_path):
    truth = read(tmp_path, document(BOX, BOX | {"category_id": "z"}, BOX | {"category_id": 2, "bbox": [0, 0, 0.5, 1]}))
    assert list(truth.objects) == ["9", "000005"]
    assert (truth.classes, truth.category_ids) == (("dog", "cat", "zebra"), (90, 2, "z"))
    assert truth.objects["9"].boxes.tolist() == [[1, 2, 4, 6], [1, 2, 4, 6], [0, 0, 0.5, 1]]
    assert truth.objects["9"].labels.tolist() == [0, 2, 1]
    assert truth.objects["000005"].boxes.shape == (0, 4)


def test_areas_are_the_annotated_or_the_boxes(tmp_path):
    assert read(tmp_path, document(BOX, BOX | {"area": 5.5})).objects["9"].areas.tolist() == [12, 5.5]


@pytest.mark.parametrize(("flags", "difficult", "crowd"), [
    ({}, False, False),
    ({"difficult": 1}, True, False),
    ({"difficult": True}, True, False),
    ({"ignore": 1}, True, False),
    ({"difficult": 0, "ignore": 1}, True, False),
    ({"difficult": 0, "ignore": 0, "iscrowd": 0}, False, False),
    ({"iscrowd": 1}, False, True),
])
def test_flags(tmp_path, flags, difficult, crowd):
    one = read(tmp_path, document(BOX | flags)).objects["9"]
    assert (one.difficult.tolist(), one.crowd.tolist()) == ([difficult], [crowd])


def test_what_counts():
    assert objects([[0, 0, 1, 1]] * 4, difficult=[0, 1], crowd=[1, 2]).counted.tolist() == [False, False, False, True]
    assert objects([]).counted.dtype == np.bool_


def test_nothing_annotated(tmp_path):
    truth = read(tmp_path, {"images": [], "categories": [], "annotations": []})
    assert (truth.objects, truth.classes) == ({}, ())


@pytest.mark.parametrize(("change", "message"), [
    ({"image_id": 8}, "names image_id 8, which the ground truth does not list"),
    ({"category_id": 1}, "names category_id 1, which the ground truth does not list"),
    ({"bbox": [1, 2, -3, 4]}, "of negative size"),
    ({"bbox": [1, 2, 3]}, "has bbox"),
    ({"bbox": [1, 2, 3, float("nan")]}, "finite pixel coordinates"),
    ({"area": "12"}, "has area '12': it must be a finite number"),
    ({"difficult": "maybe"}, "has difficult 'maybe': it must be 0 or 1"),
    ({"ignore": 2}, "has ignore 2"),
    ({"iscrowd": None}, "has iscrowd None"),
])
def test_a_wrong_annotation_is_named_in_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path, document(BOX, BOX | change))
    assert str(raised.value).startswith(f"{tmp_path / 'truth.json'}: annotations[1] ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "entries", "message"), [
    ("images", [{"id": 1}, {"id": "1"}], r"images\[1\] repeats id '1' of images\[0\]"),
    ("images", [{"file_name": "a"}], r"images\[0\] has id None"),
    ("categories", [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], r"categories\[1\] repeats id '1'"),
    ("categories", [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], r"categories\[1\] repeats name 'a'"),
    ("categories", [{"id": 1}], r"categories\[0\] has name None"),
    ("annotations", None, "annotations is missing or not a list"),
    ("annotations", [5], r"annotations\[0\] is 5"),
])
def test_wrong_lists(tmp_path, name, entries, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, document() | {name: entries})


@pytest.mark.parametrize("name", ["images", "categories", "annotations"])
def test_missing_lists(tmp_path, name):
    content = document()
    del content[name]
    with pytest.raises(DataError, match=f"{name} is missing or not a list"):
        read(tmp_path, content)


def test_a_results_file_in_place_of_ground_truth(tmp_path):
    with pytest.raises(DataError, match="is not COCO ground truth"):
        read(tmp_path, [BOX])
    with pytest.raises(DataError, match="cannot be read"):
        read_ground_truth(tmp_path / "nowhere.json")
