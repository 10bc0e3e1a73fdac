"""Proposals in json: altopt's own plain form, and COCO's list of results.

    {"image_ids": ["000005", ...], "boxes": [[[x1, y1, x2, y2], ...], ...], "scores": [[0.9, ...], ...]}
    [{"image_id": 5, "bbox": [x, y, width, height], "score": 0.9}, ...]

In the first the lists have an entry for each image; "scores" may be missing, and "box_format" (once "frame") may name
another convention than continuous x1 y1 x2 y2.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from altopt.datasets.dataset import Json
from altopt.errors import ArtifactError
from altopt.evaluation.coco_json import JsonFile
from altopt.proposal_formats.reader import BOX_FORMATS, Boxes, ProposalFileReader, Scores

Images = Iterable[tuple[str, Boxes, Scores]]


def read_json(path: Path, ids: tuple[str, ...]) -> ProposalFileReader:
    """Return the proposals of a json file of either form; it names its images, so ``ids`` is not needed.

    Raises ArtifactError for a file that is not json, or of another form.
    """
    file = JsonFile(path, ArtifactError)
    document = file.load()
    if isinstance(document, list):
        return _coco_results(file, document)
    if isinstance(document, dict) and {"image_ids", "boxes"} <= document.keys():
        return _plain(path, document)
    raise ArtifactError(f"{path} is neither an object with image_ids and boxes nor a list of COCO results: see "
                        "altopt proposals import --help for what is read")


def write_json(file: IO[bytes], images: Images) -> None:
    """Write altopt's plain form; numbers are exact, so that reading gives the same float32."""
    rows = [(image_id, boxes.tolist(), scores.tolist()) for image_id, boxes, scores in images]
    ids, boxes, scores = ([row[column] for row in rows] for column in range(3))
    file.write(json.dumps({"image_ids": ids, "box_format": "xyxy", "boxes": boxes, "scores": scores}).encode())


def _plain(path: Path, document: Json) -> ProposalFileReader:
    ids, boxes, scores = document["image_ids"], document["boxes"], document.get("scores")
    box_format = document.get("box_format", document.get("frame", "xyxy"))
    for name, value in {"image_ids": ids, "boxes": boxes, "scores": scores}.items():
        if value is None and name == "scores":
            continue
        if not isinstance(value, list) or not isinstance(ids, list) or len(value) != len(ids):
            raise ArtifactError(f"{path}: {name} must be a list with an entry for each of image_ids: export it again")
    if box_format not in BOX_FORMATS:
        raise ArtifactError(f"{path}: the box_format {box_format!r} is none of {', '.join(BOX_FORMATS)}: write one of "
                            "them")
    return ProposalFileReader(path, "altopt's json", box_format,
                              zip(map(str, ids), boxes, [None] * len(ids) if scores is None else scores, strict=True))


def _coco_results(file: JsonFile, document: list[object]) -> ProposalFileReader:
    boxes: dict[str, list[object]] = {}
    scores: dict[str, list[float]] = {}
    for place, entry in file.entries(document, "results"):
        image_id = file.key(place, entry, "image_id")
        if not isinstance(entry.get("bbox"), list) or len(entry["bbox"]) != 4:
            raise file.problem(place, "has no bbox [x, y, width, height]: export it again")
        boxes.setdefault(image_id, []).append(entry["bbox"])
        if "score" in entry:
            scores.setdefault(image_id, []).append(file.number(place, entry, "score"))
    return ProposalFileReader(file.path, "COCO results json", "xywh",
                              ((image_id, rows, scores.get(image_id)) for image_id, rows in boxes.items()))
