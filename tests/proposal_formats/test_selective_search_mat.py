import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from altopt.errors import ArtifactError, UsageError
from altopt.proposal_formats.selective_search_mat import read_mat

IDS = ("000005", "000007", "000009")
# y1 x1 y2 x2 of first and last pixels counted from 1, and what they cover.
BOXES = [np.array([[21, 1, 40, 10], [1, 1, 1, 1]], np.uint16), np.empty((0, 4), np.uint16),
         np.array([[1, 2, 333, 500]], np.uint16)]
COVERED = [[[0, 20, 10, 40], [0, 0, 1, 1]], [], [[1, 0, 500, 333]]]
SCORES = [np.array([[0.9], [0.8]]), np.empty((0, 1)), np.array([[0.5]])]


def cell(values, shape):
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def version_5(path, **variables):
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(path, variables)
    return path


def version_73(path, cells=(), **matrices):
    """As MATLAB writes it: axes the other way round, cells as references, characters as uint16, empty as extents."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in matrices.items():
            file[name] = values.T
        for name, values in cells:
            references = np.empty((len(values), 1), h5py.ref_dtype)
            for number, value in enumerate(values):
                place = f"#refs#/{name}{number}"
                if isinstance(value, str):
                    file[place] = np.array([[ord(letter)] for letter in value], np.uint16)
                elif value.size:
                    file[place] = value.T
                else:
                    file[place] = np.array(value.shape, np.uint64)
                    file[place].attrs["MATLAB_empty"] = np.uint8(1)
                references[number, 0] = file[place].ref
            file[name] = references
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file")
    return path


def split_5(path, names=IDS, **more):
    named = {"images": cell([np.array([name]) for name in names], (-1, 1))} if names else {}
    return version_5(path, boxes=cell(BOXES, (1, -1)), **named, **more)


def split_73(path, names=IDS, scores=()):
    cells = [("boxes", BOXES)] + ([("images", names)] if names else []) + ([("scores", scores)] if len(scores) else [])
    return version_73(path, cells)


SPLITS = pytest.mark.parametrize("split", [split_5, split_73])


@SPLITS
def test_whole_split(tmp_path, split):
    incoming = read_mat(split(tmp_path / "voc_2007_trainval.mat"), ("others",))
    read = list(incoming)
    assert incoming.box_format == "yxyx-inclusive-1"
    assert [name for name, *_ in read] == list(IDS)
    assert [boxes.tolist() for _, boxes, _ in read] == COVERED
    assert [scores.tolist() for *_, scores in read] == [[1, 0.5], [], [1]]


@SPLITS
def test_whole_split_without_names_goes_by_order(tmp_path, split):
    path = split(tmp_path / "boxes.mat", names=())
    assert [name for name, *_ in read_mat(path, ("a", "b", "c"))] == ["a", "b", "c"]
    with pytest.raises(ArtifactError, match="3 images and the split 2"):
        list(read_mat(path, ("a", "b")))


@SPLITS
def test_names_and_boxes_of_different_number(tmp_path, split):
    with pytest.raises(ArtifactError, match="3 boxes and 2 images"):
        list(read_mat(split(tmp_path / "boxes.mat", names=IDS[:2]), IDS))


def test_scores_in_the_file(tmp_path):
    expected = [[np.float32(0.9), np.float32(0.8)], [], [0.5]]
    cells = cell(SCORES, (-1, 1))
    for path in (split_5(tmp_path / "a.mat", scores=cells), split_73(tmp_path / "b.mat", scores=SCORES)):
        incoming = read_mat(path, IDS)
        assert [scores.tolist() for *_, scores in incoming] == expected
        assert incoming.unscored == 0


@pytest.mark.parametrize("write", [version_5, version_73])
def test_one_image(tmp_path, write):
    boxes = np.array([[0, 20, 9, 39], [0, 0, 499, 332]], np.uint16)
    incoming = read_mat(write(tmp_path / "000005_boxes.mat", boxes=boxes), IDS)
    (name, read, _), = incoming
    assert (name, incoming.box_format) == ("000005", "inclusive-0")
    assert read.tolist() == [[0, 20, 10, 40], [0, 0, 500, 333]]


def test_folder_of_images(tmp_path):
    version_5(tmp_path / "b_boxes.mat", boxes=np.array([[0, 0, 1, 1]], np.uint16))
    version_73(tmp_path / "a.mat", boxes=np.array([[0, 0, 2, 2]], np.uint16))
    assert [(name, boxes.tolist()) for name, boxes, _ in read_mat(tmp_path, IDS)] == [
        ("a", [[0, 0, 3, 3]]), ("b", [[0, 0, 2, 2]])]


def test_folder_without_any(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no \.mat file"):
        read_mat(tmp_path, IDS)


def test_without_scipy(tmp_path, monkeypatch):
    (tmp_path / "boxes.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UsageError, match=r"needs scipy.*\.\[proposals\]"):
        read_mat(tmp_path / "boxes.mat", IDS)
    assert len(list(read_mat(split_73(tmp_path / "boxes73.mat"), IDS))) == 3


HEADER = b"MATLAB 5.0 MAT-file" + b" " * 105 + b"\x00\x01IM"


@pytest.mark.parametrize("content", [b"", b"garbage" * 40, HEADER, HEADER + b"\x07" * 90])
def test_damaged_file_of_version_5(tmp_path, content):
    pytest.importorskip("scipy.io")
    (tmp_path / "boxes.mat").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"boxes\.mat"):
        read_mat(tmp_path / "boxes.mat", IDS)


def test_other_variables(tmp_path):
    rois = np.ones((1, 4))
    for path in (version_5(tmp_path / "a.mat", rois=rois), version_73(tmp_path / "b.mat", rois=rois)):
        with pytest.raises(ArtifactError, match="has no variable boxes"):
            read_mat(path, IDS)


def test_truncated_file_of_version_73(tmp_path):
    path = split_73(tmp_path / "boxes.mat")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ArtifactError, match="is damaged"):
        list(read_mat(path, IDS))


def test_boxes_in_another_file_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(32))
    with h5py.File(tmp_path / "boxes.mat", "w") as file:
        file.create_dataset("boxes", (4, 4), "u2", external=[(str(tmp_path / "secret"), 0, 32)])
    with pytest.raises(ArtifactError, match="lies in another file"):
        read_mat(tmp_path / "boxes.mat", IDS)


@pytest.mark.skipif("ALTOPT_DATA" not in os.environ, reason="ALTOPT_DATA names no folder of data sets")
@pytest.mark.parametrize("name", ["000004", "001551"])
def test_boxes_that_fast_rcnn_ships(name):
    pytest.importorskip("scipy.io")
    folder = Path(os.environ["ALTOPT_DATA"]) / "proposals"
    (image_id, boxes, _), = read_mat(folder / f"{name}_boxes.mat", ())
    same = np.array(json.loads((folder / f"{name}_boxes.json").read_text())["boxes"], np.float32)
    assert image_id == name
    assert np.array_equal(boxes, same + np.array([0, 0, 1, 1]))
    with Image.open(folder / f"{name}.jpg") as image:
        assert (boxes[:, 2:].max(0) == image.size).all()
    assert boxes.min() == 0
