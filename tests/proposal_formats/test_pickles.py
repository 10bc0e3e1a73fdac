import io
import pickle
import pickletools
from enum import IntEnum

import numpy as np
import pytest

from altopt.errors import ArtifactError
from altopt.proposal_formats.pickles import read_pickle, write_detectron2, write_py_faster_rcnn

IDS = ("000005", "000007", "000009")
BOXES = [np.array([[0, 20, 9, 39], [1, 1, 1, 1]], np.uint16), np.empty((0, 4), np.float32), np.array([[5, 6, 7, 8.0]])]
IMAGES = [
    ("b", np.array([[0, 20, 10, 40], [1, 1, 2, 2]], np.float32), np.array([0.9, 0.1], np.float32)),
    ("a", np.empty((0, 4), np.float32), np.empty(0, np.float32)),
    ("c", np.array([[0.25, 0.5, 7.75, 8]], np.float32), np.array([0.5], np.float32)),
]


class BoxMode(IntEnum):
    XYXY_ABS = 0
    XYWH_ABS = 1


@pytest.fixture
def save(tmp_path):
    def make(content):
        path = tmp_path / "boxes.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 2))
        return path

    return make


def assert_equal(read, images):
    for (name, boxes, scores), (expected, *arrays) in zip(read, images, strict=True):
        assert name == expected
        assert np.array_equal(boxes, arrays[0])
        assert np.array_equal(scores, arrays[1])


def test_list_of_arrays_without_scores(save):
    incoming = read_pickle(save(BOXES), IDS)
    read = list(incoming)
    assert incoming.box_format == "inclusive-0"
    assert [name for name, *_ in read] == list(IDS)
    assert read[0][1].tolist() == [[0, 20, 10, 40], [1, 1, 2, 2]]
    assert read[0][2].tolist() == [1, 0.5]
    assert read[1][1].shape == (0, 4)
    assert incoming.unscored == 3


def test_list_of_arrays_with_scores(save):
    incoming = read_pickle(save([np.array([[0, 0, 9, 9, 0.25], [1, 1, 2, 2, 0.75]])]), ("a",))
    (_, boxes, scores), = incoming
    assert scores.tolist() == [0.75, 0.25]
    assert boxes.tolist() == [[1, 1, 3, 3], [0, 0, 10, 10]]
    assert incoming.unscored == 0


def test_list_of_another_length(save):
    with pytest.raises(ArtifactError, match="3 images and the split 2"):
        read_pickle(save(BOXES), IDS[:2])


@pytest.mark.parametrize("names", [("ids", "objectness_logits"), ("indexes", "scores")])
@pytest.mark.parametrize(("mode", "box_format"), [(0, "xyxy"), (1, "xywh"), (None, "xyxy")])
def test_dict_with_ids(save, names, mode, box_format):
    content = {names[0]: [5, "x", np.int64(9)], "boxes": BOXES, names[1]: [np.array([0.2, 0.9]), [], [3.0]]}
    if mode is not None:
        content["bbox_mode"] = mode
    incoming = read_pickle(save(content), IDS)
    read = list(incoming)
    assert incoming.box_format == box_format
    assert [name for name, *_ in read] == ["5", "x", "9"]
    assert read[0][2].tolist() == pytest.approx([0.9, 0.2])


def test_detectron2s_own_box_mode(save, monkeypatch):
    raw = pickle.dumps({"ids": ["a"], "boxes": [BOXES[2]], "bbox_mode": BoxMode.XYWH_ABS}, 2)
    raw = raw.replace(f"c{__name__}\nBoxMode\n".encode(), b"cdetectron2.structures.boxes\nBoxMode\n")
    assert b"detectron2" in raw
    incoming = read_pickle(save(raw), IDS)
    assert incoming.box_format == "xywh"
    assert next(iter(incoming))[1].tolist() == [[5, 6, 12, 14]]


@pytest.mark.parametrize("content", [
    {"ids": ["a"]}, {"ids": ["a"], "boxes": BOXES}, {"boxes": BOXES, "ids": 3}, {1: 2}, "text", 7,
    {"ids": ["a"], "boxes": BOXES[:1], "bbox_mode": 4}, {"ids": ["a"], "boxes": BOXES[:1], "objectness_logits": []},
])
def test_other_contents(save, content):
    with pytest.raises(ArtifactError, match=r"boxes\.pkl"):
        read_pickle(save(content), IDS)


def test_round_trip_with_ids(save):
    output = io.BytesIO()
    write_detectron2(output, iter(IMAGES))
    assert_equal(read_pickle(save(output.getvalue()), ()), IMAGES)


def test_round_trip_by_order(save):
    output = io.BytesIO()
    write_py_faster_rcnn(output, iter(IMAGES))
    plain = pickle.loads(output.getvalue().replace(b"cnumpy.core.", b"cnumpy._core."))
    assert plain[0].tolist() == [[0, 20, 9, 39], [1, 1, 1, 1]]
    read = read_pickle(save(output.getvalue()), ("b", "a", "c"))
    ranks = [np.array([1, 0.5]), np.empty(0), np.ones(1)]
    assert_equal(read, [(name, boxes, each) for (name, boxes, _), each in zip(IMAGES, ranks, strict=True)])


@pytest.mark.parametrize("write", [write_detectron2, write_py_faster_rcnn])
def test_written_for_old_readers(write):
    output = io.BytesIO()
    write(output, iter(IMAGES))
    found = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(output.getvalue())]
    assert found[0] == ("PROTO", 2)
    names = {argument for name, argument in found if name == "GLOBAL"}
    assert {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"} <= names
    assert not any("_core" in name for name in names)


def test_nothing_to_write(save):
    for write in (write_detectron2, write_py_faster_rcnn):
        output = io.BytesIO()
        write(output, iter([]))
        assert list(read_pickle(save(output.getvalue()), ())) == []
