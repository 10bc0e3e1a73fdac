"""COCO results json: there and back, and every way in which a file can be wrong."""

import json

import numpy as np
import pytest
from evaluation_samples import detections, write_json

from altopt.errors import ArtifactError, DataError
from altopt.evaluation.detections import Detections, check_images, read_detections, to_coco_results

GOOD = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


def read(path, document):
    return read_detections(write_json(path / "found.json", document), ["7", "000005"], [3, "x"])


def test_reads_boxes_scores_and_labels(tmp_path):
    found = read(tmp_path, [GOOD, {"image_id": "000005", "category_id": "x", "bbox": [0.1, 0, 0.5, 2], "score": 1}])
    assert list(found) == ["7", "000005"]
    assert found["7"].boxes.tolist() == [[1, 2, 4, 6]]
    assert (found["7"].scores.tolist(), found["7"].labels.tolist()) == ([0.5], [0])
    assert found["000005"].boxes.tolist() == [[0.1, 0, 0.6, 2]]
    assert found["000005"].labels.tolist() == [1]


def test_ids_are_compared_as_texts(tmp_path):
    found = read(tmp_path, [GOOD | {"image_id": "7", "category_id": "3"}])
    assert len(found["7"]) == 1


def test_order_within_a_image_is_kept(tmp_path):
    scores = [0.1, 0.9, 0.5, 0.5, 0.3]
    assert read(tmp_path, [GOOD | {"score": score} for score in scores])["7"].scores.tolist() == scores


def test_no_detections(tmp_path):
    found = read(tmp_path, [])
    assert [one.boxes.shape for one in found.values()] == [(0, 4), (0, 4)]
    assert found["7"].labels.dtype == np.int64


def test_boxes_without_area_are_allowed(tmp_path):
    assert read(tmp_path, [GOOD | {"bbox": [1, 2, 0, 0]}])["7"].boxes.tolist() == [[1, 2, 1, 2]]


@pytest.mark.parametrize(("change", "message"), [
    ({"image_id": 8}, "names image_id 8, which the ground truth does not list"),
    ({"image_id": "07"}, "names image_id '07', which the ground truth does not list"),
    ({"image_id": 7.0}, "has image_id 7.0: it must be a whole number or a text"),
    ({"image_id": True}, "has image_id True"),
    ({"image_id": None}, "has image_id None"),
    ({"image_id": [7]}, r"has image_id \[7\]"),
    ({"category_id": 4}, "names category_id 4, which the ground truth does not list"),
    ({"score": float("nan")}, "has score nan: it must be a finite number"),
    ({"score": float("inf")}, "has score inf"),
    ({"score": "0.5"}, "has score '0.5'"),
    ({"score": True}, "has score True"),
    ({"score": None}, "has score None"),
    ({"score": 10**400}, "has score 1000"),
    ({"bbox": [1, 2, -3, 4]}, r"has bbox \[1, 2, -3, 4\] of negative size"),
    ({"bbox": [1, 2, 3, -0.5]}, "of negative size"),
    ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]: it must be \[x, y, width, height\]"),
    ({"bbox": None}, "has bbox None"),
    ({"bbox": {"x": 1}}, "has bbox"),
    ({"bbox": [float("nan"), 2, 3, 4]}, "finite pixel coordinates"),
    ({"bbox": [1, 2, float("inf"), 4]}, "finite pixel coordinates"),
    ({"bbox": [1, 2, 3, "4"]}, "finite pixel coordinates"),
    ({"bbox": [1e300, 2, 3, 4]}, "finite pixel coordinates"),
    ({"bbox": [10**400, 2, 3, 4]}, "finite pixel coordinates"),
])
def test_a_wrong_entry_is_named_in_one_line(tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message) as raised:
        read(tmp_path, [GOOD, GOOD | change])
    assert str(raised.value).startswith(f"{tmp_path / 'found.json'}: detections[1] ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(tmp_path, field):
    with pytest.raises(ArtifactError, match=rf"detections\[0\] has {field} None"):
        read(tmp_path, [{name: value for name, value in GOOD.items() if name != field}])


@pytest.mark.parametrize("document", [{"annotations": [GOOD]}, 5, None, "text"])
def test_a_document_that_is_no_list(tmp_path, document):
    with pytest.raises(ArtifactError, match="detections is missing or not a list"):
        read(tmp_path, document)


def test_an_entry_that_is_no_object(tmp_path):
    with pytest.raises(ArtifactError, match=r"detections\[1\] is \[7, 3\]"):
        read(tmp_path, [GOOD, [7, 3]])


@pytest.mark.parametrize("content", [b"", b"[", b'[{"a": 1}', b"\xff\xfe\xfd", b"{]", b"[" * 100_000, b"1" * 5000])
def test_a_file_that_is_not_json(tmp_path, content):
    path = tmp_path / "found.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is not JSON") as raised:
        read_detections(path, [], [])
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.json cannot be read"):
        read_detections(tmp_path / "nowhere.json", [], [])
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_detections(tmp_path, [], [])


def test_writing_and_reading_gives_the_same_float32(tmp_path):
    random = np.random.default_rng(0)
    corners = random.uniform(0, 800, (200, 2))
    boxes = np.hstack([corners, corners + random.uniform(0, 600, (200, 2))])
    written = {"12": detections(boxes, random.random(200), random.integers(0, 2, 200).tolist()),
               "000005": detections([], [])}
    path = write_json(tmp_path / "found.json", to_coco_results(written, [18, 90]))
    found = read_detections(path, written, [18, 90])
    for name, one in written.items():
        assert np.array_equal(found[name].boxes.astype(np.float32), one.boxes)
        assert np.array_equal(found[name].scores.astype(np.float32), one.scores)
        assert np.array_equal(found[name].labels, one.labels)


@pytest.mark.parametrize(("key", "written"), [
    ("139", 139), ("0", 0), ("000005", "000005"), ("2008_000001", "2008_000001"), ("image", "image"), ("", ""),
])
def test_ids_that_read_as_numbers_are_written_as_numbers(key, written):
    assert to_coco_results({key: detections([[1, 2, 4, 8]], [0.5])}, [44]) == [
        {"image_id": written, "category_id": 44, "bbox": [1, 2, 3, 6], "score": 0.5}
    ]
    assert json.dumps(to_coco_results({key: detections([[1, 2, 4, 8]], [0.5])}, [44]))


def test_ids_are_written_as_the_data_set_has_them():
    written = to_coco_results({"139": detections([[1, 2, 4, 8]], [0.5])}, [44], {"139": "139"}.__getitem__)
    assert written[0]["image_id"] == "139"


def test_columns_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 4\) boxes, \(1,\) scores"):
        Detections(np.zeros((2, 4)), np.zeros(1), np.zeros(2, np.int64))


def test_images_without_ground_truth_are_refused():
    check_images(["a", "b"], ["b"])
    with pytest.raises(DataError, match=r"image c has detections but no ground truth \(2 such images\)"):
        check_images(["a"], ["d", "c", "a"])
