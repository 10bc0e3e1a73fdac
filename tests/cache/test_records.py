import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cache.records import JSON, Record, differences, plain, read_record, renamed, write_record


def record(**changes):
    values = {
        "artifact": "M1",
        "stage": "train_rpn",
        "version": 1,
        "inputs": {"M0": "a" * 64},
        "data": "d" * 64,
        "config": {"lr": 0.001, "steps": (30, 40), "name": "é"},
        "sha256": "b" * 64,
        "size": 123,
        "seconds": 1.5,
        "versions": {"torch": "2.15"},
        "metrics": {"loss": 0.1 + 0.2, "worst": float("inf")},
    }
    return Record(**{**values, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "M1.json"


@pytest.mark.parametrize("changes", [{}, {"given": "/weights/vgg16.pth", "stage": "", "data": None}])
def test_round_trip_is_exact(path, changes):
    write_record(path, record(**changes))
    assert read_record(path) == record(**changes)


def test_config_is_plain_from_the_start():
    assert record().config["steps"] == [30, 40]
    assert record().metrics["worst"] == "inf"


def test_missing_record_is_silent(path, caplog):
    assert read_record(path) is None
    assert not caplog.records


def altered(path, **changes):
    write_record(path, record())
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "another kind of file"),
        ({"format_version": 2}, "format version 2, this altopt reads 1"),
        ({"surprise": 1}, "surprise"),
        ({"size": "123"}, "size is '123'"),
        ({"config": None}, "None"),
        ({"inputs": {"M0": 5}}, "not a text"),
        ({"data": 5}, "data is 5"),
        ({"seconds": "long"}, "seconds is 'long'"),
    ],
)
def test_foreign_record_counts_as_none_and_says_why(path, caplog, changes, reason):
    altered(path, **changes)
    assert read_record(path) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert reason in caplog.text


def test_record_that_lacks_a_field(path, caplog):
    write_record(path, record())
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert read_record(path) is None
    assert "sha256" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"{}", b"\xff\xfe"])
def test_damaged_record(path, caplog, content):
    path.write_bytes(content)
    assert read_record(path) is None
    assert len(caplog.records) == 1


def test_unharmed_record_logs_nothing(path, caplog):
    caplog.set_level(logging.DEBUG)
    altered(path)
    assert read_record(path) == record()
    assert not caplog.records


# As the version before "pictures" became "images" wrote it, shortened.
OLD = """{
  "artifact": "D5",
  "config": {
    "data": {"classes": ["pictures"], "format": "shapes", "test": ["test:4"]},
    "images_per_batch": 2,
    "per_picture": 100,
    "score": 0.05
  },
  "data": "13d34a4b099c9f4f596590e85b4e5f27c346b050db2971f07b1f83993d3dea4c",
  "format": "altopt record",
  "format_version": 1,
  "given": null,
  "inputs": {"M5": "5a5e1719212fc4d3df66658410d48b5003e12553304fdb7a084d4bc894adb226"},
  "metrics": {"average_recall": 0.2375, "recall_at_0.5": 0.875, "seconds_per_picture": 0.04016},
  "seconds": 0.25,
  "sha256": "b83d26a517bf07e34663803e2634aa34d80c35a4b8098ef2bb72ee0f6d0330f2",
  "size": 27830,
  "stage": "detect_shared",
  "version": 1,
  "versions": {"altopt": "0.1.0", "torch": "2.15.0"}
}"""


def test_record_with_names_of_an_earlier_version(path, caplog):
    path.write_text(OLD)
    found = read_record(path)
    assert found.config == {"data": {"classes": ["pictures"], "format": "shapes", "test": ["test:4"]},
                            "images_per_batch": 2, "per_image": 100, "score": 0.05}
    assert found.metrics == {"average_recall": 0.2375, "recall_at_0.5": 0.875, "seconds_per_image": 0.04016}
    assert not caplog.records
    write_record(path, found)
    assert read_record(path) == found


def test_names_of_an_earlier_version_in_a_score():
    assert renamed({"pictures": 4, "classes": {"pictures": {"ap": 1}}, "limits": {"50": {"proposals_per_picture": 3}}}
                   ) == {"images": 4, "classes": {"pictures": {"ap": 1}}, "limits": {"50": {"proposals_per_image": 3}}}


def test_values_of_an_earlier_version_by_their_field():
    assert renamed({"outputs": "draw-anew", "data": {"folder": "pictures", "train": "draw-anew"}}
                   ) == {"outputs": "re-initialise", "data": {"folder": "pictures", "train": "draw-anew"}}


@dataclass(frozen=True)
class Inner:
    side: int = 16


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    inner: Inner = Inner()
    path: Path = Path("a/b")


def test_plain():
    assert plain(Config()) == {"lr": 0.1, "inner": {"side": 16}, "path": "a/b"}
    assert plain({"a": (1, [2, (3,)]), "b": None, "c": True}) == {"a": [1, [2, [3]]], "b": None, "c": True}
    values = plain([np.float32(0.5), np.int64(3), np.float64(0.1), np.bool_(True), float("-inf"), float("nan")])
    assert json.dumps(values) == '[0.5, 3, 0.1, true, "-inf", "nan"]'
    with pytest.raises(TypeError, match="set cannot be recorded"):
        plain({"a": {1}})
    with pytest.raises(TypeError, match="int cannot be recorded as a name"):
        plain({1: 2})


def test_differences_in_words():
    old: dict[str, JSON] = {"lr": 0.001, "sampling": {"batch": 256, "fg": 0.5}, "gone": "x"}
    new: dict[str, JSON] = {"lr": 0.01, "sampling": {"batch": 128, "fg": 0.5, "iou": [0.3, 0.7]}}
    assert differences(old, new) == [
        "lr was 0.001, is 0.01",
        "sampling.batch was 256, is 128",
        "sampling.iou is new ([0.3, 0.7])",
        'gone was dropped (it was "x")',
    ]


def test_a_setting_that_earlier_versions_lacked_is_new_only_where_it_changes_something():
    assert differences({"lr": 1.0}, {"lr": 1.0, "visits": 0.0, "data": {"exif": "error"}}) == []
    assert differences({}, {"visits": 4.0}) == ["visits is new (4.0)"]


def test_differences_shorten_hashes():
    assert differences({"M0": "a" * 64}, {"M0": "b" * 64}) == ["M0 was aaaaaaaaaaaa..., is bbbbbbbbbbbb..."]


@pytest.mark.parametrize(
    ("old", "new"),
    [({"a": (1, 2)}, {"a": [1, 2]}), ({"a": 1}, {"a": 1.0}), ({}, {}), ({"a": {"b": 1}}, {"a": {"b": 1}})],
)
def test_no_difference(old, new):
    assert differences(old, new) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": [0]}, {"a": [False]}),
        ({"a": None}, {}),
        ({"a": "1"}, {"a": 1}),
        ({"a": {}}, {"a": 0}),
        ({"a": {}}, {}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
    ],
)
def test_small_differences_count(old, new):
    assert len(differences(old, new)) == 1
    assert len(differences(new, old)) == 1
