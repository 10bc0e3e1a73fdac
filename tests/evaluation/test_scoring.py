"""The one entry to the scorers: options, refusals, and two COCO files scored by each protocol."""

from typing import Any, cast

import pytest
from evaluation_samples import detections, objects, write_json

from altopt.errors import UsageError
from altopt.evaluation.scoring import PROTOCOLS, score, score_files
from altopt.evaluation.voc import VocRules, VocScore

TRUTH = {"1": objects([[0, 0, 10, 10]])}
HALF = {"1": detections([[0, 0, 10, 5]], [1])}


def test_each_protocol_has_its_rules():
    results = {protocol: score(protocol, TRUTH, HALF, ["thing"]) for protocol in PROTOCOLS}
    assert {name: result.map for name, result in results.items()} == {
        "voc07": 0, "voc10": 0, "coco": pytest.approx(0.1)  # of COCO's ten thresholds 0.5 is met exactly
    }
    assert [result.as_dict()["protocol"] for result in results.values()] == ["voc07", "voc10", "coco"]
    assert len({result.convention for result in results.values()}) == 3


def test_options_reach_the_rules():
    options: dict[str, Any] = {"iou": 0.4, "strict": False, "plus_one": True, "devkit_rounding": True}
    result = score("voc10", TRUTH, HALF, ["thing"], **options)
    assert isinstance(result, VocScore)
    assert result.rules == VocRules("voc10", 0.4, strict=False, plus_one=True, devkit_rounding=True)
    assert score("voc07", TRUTH, HALF, ["thing"], strict=False).map == pytest.approx(1)


@pytest.mark.parametrize("option", [{"iou": 0.7}, {"strict": False}, {"plus_one": True}, {"devkit_rounding": True}])
def test_coco_takes_no_voc_option(option):
    with pytest.raises(UsageError, match="leave them out for coco"):
        score("coco", TRUTH, HALF, ["thing"], **option)


@pytest.mark.parametrize("iou", [0, -0.5, 1.5, float("nan")])
def test_meaningless_thresholds(iou):
    with pytest.raises(UsageError, match="IoU threshold"):
        score("voc07", TRUTH, HALF, ["thing"], iou=iou)


def test_unknown_protocol():
    with pytest.raises(UsageError, match="unknown protocol 'voc12': choose one of voc07, voc10, coco"):
        score(cast(Any, "voc12"), TRUTH, HALF, ["thing"])


def test_files(tmp_path):
    truth = write_json(tmp_path / "truth.json", {
        "images": [{"id": 4}, {"id": 2}],
        "categories": [{"id": 44, "name": "cup"}, {"id": 7, "name": "bird"}],
        "annotations": [
            {"image_id": 4, "category_id": 44, "bbox": [0, 0, 10, 10]},
            {"image_id": 2, "category_id": 44, "bbox": [0, 0, 10, 10], "difficult": 1},
            {"image_id": 2, "category_id": 7, "bbox": [5, 5, 20, 20], "area": 100},
        ],
    })
    found = write_json(tmp_path / "found.json", [
        {"image_id": 2, "category_id": 44, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 4, "category_id": 44, "bbox": [0, 0, 10, 10], "score": 0.8},
        {"image_id": 4, "category_id": 7, "bbox": [5, 5, 20, 20], "score": 0.7},
    ])
    for protocol in PROTOCOLS:
        result = score_files(protocol, truth, found)
        assert result.ap == {"cup": pytest.approx(1), "bird": 0}
        assert result.map == pytest.approx(0.5)
    assert score_files("voc07", truth, found, iou=0.6, strict=False).convention.startswith("11-point, IoU >= 0.6")
