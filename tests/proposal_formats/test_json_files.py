import io
import json

import numpy as np
import pytest

from altopt.errors import ArtifactError
from altopt.proposal_formats.json_files import read_json, write_json


@pytest.fixture
def read(tmp_path):
    def save_and_read(content):
        path = tmp_path / "boxes.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_json(path, ())

    return save_and_read


def test_plain_form(read):
    incoming = read({"image_ids": ["a", 7], "boxes": [[[0, 20, 10, 40], [1, 1, 2, 2]], []], "scores": [[0.1, 0.9], []]})
    (name, boxes, scores), (second, none, _) = incoming
    assert (name, second, none.shape) == ("a", "7", (0, 4))
    assert boxes.tolist() == [[1, 1, 2, 2], [0, 20, 10, 40]]
    assert scores.tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("key", ["box_format", "frame"])
def test_plain_form_without_scores_and_in_another_format(read, key):
    incoming = read({"image_ids": ["a"], "boxes": [[[0, 20, 9, 39]]], key: "inclusive-0"})
    assert next(iter(incoming))[1].tolist() == [[0, 20, 10, 40]]
    assert incoming.unscored == 1


def test_coco_results_in_any_order(read):
    incoming = read([
        {"image_id": 9, "bbox": [0, 20, 10, 20], "score": 0.1, "category_id": 1},
        {"image_id": "b", "bbox": [0, 0, 1, 1], "score": 0.5},
        {"image_id": 9, "bbox": [1.5, 2, 3, 4], "score": 0.9},
    ])
    (name, boxes, scores), (second, _, _) = incoming
    assert (name, second, incoming.box_format) == ("9", "b", "xywh")
    assert boxes.tolist() == [[1.5, 2, 4.5, 6], [0, 20, 10, 40]]
    assert scores.tolist() == pytest.approx([0.9, 0.1])


def test_coco_results_without_scores(read):
    assert next(iter(read([{"image_id": 9, "bbox": [0, 0, 1, 1]}])))[2].tolist() == [1]
    assert list(read([])) == []


@pytest.mark.parametrize(("content", "words"), [
    (b"{", "not JSON"),
    ({"boxes": []}, "neither"),
    (5, "neither"),
    ({"image_ids": ["a"], "boxes": []}, "boxes is not a list with an entry for each"),
    ({"image_ids": ["a"], "boxes": [[]], "scores": 3}, "scores is not a list"),
    ({"image_ids": "a", "boxes": [[]]}, "image_ids is not a list"),
    ({"image_ids": [], "boxes": [], "box_format": "polar"}, "'polar' is none of xyxy"),
    ([{"bbox": [1, 2, 3, 4]}], "image_id"),
    ([{"image_id": 1, "bbox": [1, 2]}], "no bbox"),
    ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": "x"}], "finite number"),
    ([3], "an object"),
])
def test_other_contents(read, content, words):
    with pytest.raises(ArtifactError, match=words):
        read(content)


def test_some_with_scores_and_some_without(read):
    with pytest.raises(ArtifactError, match="2 boxes and 1 scores"):
        list(read([{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 1}, {"image_id": 1, "bbox": [0, 0, 1, 1]}]))


def test_round_trip_is_exact(read):
    random = np.random.default_rng(0)
    images = [(f"{n}", random.random((n, 4), np.float32), np.sort(random.random(n, np.float32))[::-1])
                for n in (3, 0, 5)]
    output = io.BytesIO()
    write_json(output, iter(images))
    for (name, boxes, scores), (expected, *arrays) in zip(read(output.getvalue()), images, strict=True):
        assert name == expected
        assert np.array_equal(boxes, arrays[0])
        assert np.array_equal(scores, arrays[1])
