"""Proposals in pickles: py-faster-rcnn's list of arrays (mmdet's too), and detectron2's dict with ids."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from altopt.errors import ArtifactError
from altopt.proposal_formats.reader import Boxes, BoxFormat, ProposalFileReader, Scores, in_order, to_inclusive
from altopt.proposal_formats.safe_pickle import load_pickle

OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron's and early detectron2's
BOX_MODES: dict[int, BoxFormat] = {0: "xyxy", 1: "xywh"}  # detectron2's BoxMode.XYXY_ABS, XYWH_ABS
PROTOCOL = 2  # the last that Python 2, and with it py-faster-rcnn, can read
RECONSTRUCT = b"c%s.multiarray\n_reconstruct\n"


def read_pickle(path: Path, ids: tuple[str, ...]) -> ProposalFileReader:
    """Return the proposals of a pickle, read without executing it; ``ids`` is the split's order, for one without ids.

    A list holds an array [K, 4] for each image, or [K, 5] with the scores last. Raises ArtifactError.
    """
    content = load_pickle(path)
    if isinstance(content, dict):
        return _detectron2(path, {OLD_NAMES.get(str(key), str(key)): value for key, value in content.items()})
    if not isinstance(content, list):
        raise ArtifactError(f"{path} holds neither a list of arrays nor a dict with ids and boxes: see "
                            "altopt proposals import --help for what is read")
    images = zip(in_order(path, len(content), ids), content, strict=True)
    return ProposalFileReader(path, "a list of arrays, as py-faster-rcnn's", "inclusive-0", (
        (image_id, array[:, :4], array[:, 4])
        if isinstance(array, np.ndarray) and array.shape[1:] == (5,) else (image_id, array, None)
        for image_id, array in images))


def write_py_faster_rcnn(file: IO[bytes], images: Iterable[tuple[str, Boxes, Scores]]) -> None:
    """Write a list of arrays [K, 4] of inclusive pixels counted from 0, in the images' order, without scores."""
    _dump(file, [to_inclusive(boxes) for _, boxes, _ in images])


def write_detectron2(file: IO[bytes], images: Iterable[tuple[str, Boxes, Scores]]) -> None:
    """Write a dict of boxes, scores and ids; ``objectness_logits`` are the scores as they are, for their order."""
    kept = list(images)
    _dump(file, {"boxes": [boxes for _, boxes, _ in kept], "objectness_logits": [scores for *_, scores in kept],
                 "ids": [image_id for image_id, *_ in kept], "bbox_mode": 0})


def _dump(file: IO[bytes], content: object) -> None:
    """Pickle with the name that numpy's arrays go by before version 2, which later versions know too.

    The one place that uses pickle itself: it only writes what was made here, while reading, where a pickle could
    execute code, is ``safe_pickle``'s.
    """
    raw = pickle.dumps(content, PROTOCOL)
    # The first occurrence is the name itself: it comes before the bytes of any array, and later ones refer to it.
    file.write(raw.replace(RECONSTRUCT % b"numpy._core", RECONSTRUCT % b"numpy.core", 1))


def _detectron2(path: Path, content: dict[str, object]) -> ProposalFileReader:
    columns: list[Any] = [content.get(name) for name in ("ids", "boxes", "objectness_logits")]
    if columns[2] is None and isinstance(columns[1], list | np.ndarray):
        columns[2] = [None] * len(columns[1])
    if not all(isinstance(each, list | np.ndarray) for each in columns) or len({len(each) for each in columns}) != 1:
        raise ArtifactError(f"{path} does not have lists ids, boxes and perhaps objectness_logits, all of one length: "
                            "bring a dict of proposals such as detectron2's")
    mode = content.get("bbox_mode", 0)
    if mode not in BOX_MODES:
        raise ArtifactError(f"{path} has bbox_mode {mode}: it must be 0 (x1 y1 x2 y2) or 1 (x y width height)")
    ids, boxes, scores = columns
    names = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in ids)
    return ProposalFileReader(path, "a dict with ids, as detectron2's", BOX_MODES[mode],
                              zip(names, boxes, scores, strict=True))
