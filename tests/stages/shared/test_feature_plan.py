import json

import pytest
from tiny_runs import open_tiny

from altopt.config import NetworkConfig
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.extents import maps_bytes
from stages.shared.feature_plan import (
    decide,
    extent,
    foreseen,
    gigabytes,
    known_sizes,
    remember_sizes,
    reserved_bytes,
    sizes_of,
    store_line,
    stored_layers,
)

GIB = 2**30
SHAPES = DataConfig(format="shapes", train=("train:6",), test=("test:4",), width=96, height=80)
VOC = DataConfig(format="voc", train=("trainval",), test=("test",))


@pytest.mark.parametrize(("wish", "needed", "free", "visits", "used", "reason"), [
    ("off", 1, 9 * GIB, 100, False, "not wanted"),
    ("on", 9 * GIB, 1, 1, True, "asked for, 9.7 GB"),
    ("auto", 1, 9 * GIB, 9, False, "9 visits of 10 images: some are never seen"),
    ("auto", 1, 9 * GIB, 10, True, "1.0 visits"),
    ("auto", GIB, 2 * GIB - 1, 100, False, "1.1 GB do not fit"),
    ("auto", GIB, 2 * GIB, 100, True, "1.1 GB, 10.0 visits of each image"),
    ("auto", 20 * GIB, 22 * GIB - 1, 100, False, "and 2.1 GB of them stay so"),
    ("auto", 20 * GIB, 22 * GIB, 100, True, "21.5 GB"),
    ("auto", 0, 9 * GIB, 0, False, "0 visits"),
])
def test_decision(wish, needed, free, visits, used, reason):
    decision = decide(wish, needed, free, visits, 10)
    assert decision.used is used
    assert reason in decision.reason


def test_room_is_kept_for_a_store_that_is_worth_more():
    decision = decide("auto", GIB, 9 * GIB - 1, 100, 10, reserved=7 * GIB)
    assert not decision.used
    assert decision.reason.endswith("1.1 GB do not fit: 9.7 GB are free, and 8.6 GB of them stay so")
    assert decide("auto", GIB, 9 * GIB, 100, 10, reserved=7 * GIB).used
    network = NetworkConfig(name="vgg16")
    sizes = [(800, 600, 10)]
    assert reserved_bytes(sizes, network, True, "float32", 10) == maps_bytes(sizes, network, True, "float32")
    assert reserved_bytes(sizes, network, True, "float32", 30) == 0


@pytest.mark.parametrize(("layers", "text"), [(2, "conv1"), (5, "conv1 to conv2"), (21, "conv1 to conv5")])
def test_layers_in_words(layers, text):
    assert extent("small", layers) == text


@pytest.mark.parametrize(("sets", "layers"), [
    ((), [0, 8, 0, 8, 21, 0, 21, 0]),
    (("train_rpn.freeze=[]", "train_fast_rcnn.freeze=['conv*']"), [0, 0, 0, 21, 21, 0, 21, 0]),
    (("train_fast_rcnn.scales=[64,80]",), [0, 8, 0, 0, 21, 0, 21, 0]),
])
def test_how_many_layers_each_stage_stores(tmp_path, sets, layers):
    run = open_tiny(tmp_path / "tiny", *sets)
    assert [stored_layers(run.recipe.config(step)) for step in run.recipe.steps] == layers


@pytest.mark.parametrize(("size", "text"), [(0, "0 MB"), (46_080_000, "46 MB"), (999_600_000, "1.0 GB"),
                                            (37_600_000_000, "37.6 GB")])
def test_sizes_in_words(size, text):
    assert gigabytes(size) == text


def test_sizes_of_shapes_need_no_look(tmp_path):
    assert known_sizes(tmp_path, SHAPES, None) == [(96, 80, 6)]
    assert sizes_of(open_dataset(SHAPES, "train", None)) == [(96, 80, 6)]


def test_sizes_of_files_are_known_once_they_were_looked_at(tmp_path):
    assert known_sizes(tmp_path, VOC, tmp_path) is None
    remember_sizes(tmp_path, VOC, open_dataset(SHAPES, "train", None), tmp_path)
    assert known_sizes(tmp_path, VOC, tmp_path) == [(96, 80, 6)]
    assert known_sizes(tmp_path, VOC, tmp_path / "elsewhere") is None
    assert known_sizes(tmp_path, DataConfig(format="voc", train=("train",), test=()), tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": 1, "sizes": 2}'])
def test_damage_costs_nothing(tmp_path, text):
    (tmp_path / ".sizes.json").write_text(text)
    assert known_sizes(tmp_path, VOC, tmp_path) is None


def test_frozen_stages_foresee_their_store_and_others_none(tmp_path):
    run = open_tiny(tmp_path / "tiny", "train_rpn_frozen_conv.iterations=7", "all.flips=false")
    found = {step.output: foreseen(run.folder, run.recipe.config(step), None) for step in run.recipe.steps}
    assert {name for name, store in found.items() if store} == {"M1", "M2", "M3", "M4"}
    assert found["M1"]["bytes"] == found["M2"]["bytes"] == 6 * 32 * 10 * 12 * 4
    assert found["M3"]["bytes"] == found["M4"]["bytes"] == 6 * 128 * 5 * 6 * 4
    assert [found[name]["used"] for name in ("M1", "M2", "M3", "M4")] == [True, True, True, True]
    assert store_line("M1", found["M1"]) == \
        "M1: feature store on, conv1 to conv2 (0 MB, 1.3 visits of each image; on the CPU alone)"
    assert store_line("M3", found["M3"]) == "M3: feature store on, conv1 to conv5 (0 MB, 2.3 visits of each image)"


def test_plan_and_status_say_so(altopt, workplace):
    command = ["plan", "--recipe", "tiny.toml"]
    said = altopt(*command).out
    assert "M3: feature store off, conv1 to conv5 (8 visits of 12 images: some are never seen)" in said
    steps = json.loads(altopt(*command, "--json", "--set", "all.iterations=7").out)["steps"]
    assert [each["output"] for each in steps if each["feature_store"]] == ["M1", "M2", "M3", "M4"]
    assert steps[4]["feature_store"] == {"maps": "conv1 to conv5", "bytes": 12 * 128 * 5 * 6 * 4, "used": True,
                                         "reason": "0 MB, 1.2 visits of each image"}
