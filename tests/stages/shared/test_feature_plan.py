import json

import pytest
from tiny_runs import open_tiny

from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from stages.shared.feature_plan import (
    decide,
    foreseen,
    freezes_all,
    gigabytes,
    known_sizes,
    remember_sizes,
    sizes_of,
    store_line,
)

GIB = 2**30
SHAPES = DataConfig(format="shapes", train=("train:6",), test=("test:4",), width=96, height=80)
VOC = DataConfig(format="voc", train=("trainval",), test=("test",))


@pytest.mark.parametrize(("wish", "needed", "free", "visits", "used", "reason"), [
    ("off", 1, 9 * GIB, 100, False, "not wanted"),
    ("on", 9 * GIB, 1, 1, True, "asked for, 9.7 GB"),
    ("auto", 1, 9 * GIB, 9, False, "9 visits see only part of 10 images, caching would not pay"),
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


@pytest.mark.parametrize(("sets", "outputs"), [
    ((), ["M3", "M4"]),
    (("train_rpn.freeze=[]", "train_fast_rcnn.freeze=['conv*']"), ["M2", "M3", "M4"]),
    (("train_fast_rcnn.freeze=['conv*']", "train_fast_rcnn.scales=[64,80]"), ["M3", "M4"]),
    (("train_rpn.freeze=['conv1','conv2','conv3','conv4','conv5.0','conv5.2']",), ["M1", "M3", "M4"]),
    (("train_rpn.freeze=['conv1','conv2','conv3','conv4','conv5.0']",), ["M3", "M4"]),
])
def test_which_stages_freeze_all_conv_layers(tmp_path, sets, outputs):
    run = open_tiny(tmp_path / "tiny", *sets)
    assert [step.output for step in run.recipe.steps if freezes_all(run.recipe.config(step))] == outputs


@pytest.mark.parametrize(("size", "text"), [(0, "0 MB"), (46_080_000, "46 MB"), (999_600_000, "1.0 GB"),
                                            (37_600_000_000, "37.6 GB")])
def test_sizes_in_words(size, text):
    assert gigabytes(size) == text


def test_sizes_of_shapes_need_no_look(tmp_path):
    assert known_sizes(tmp_path, SHAPES, None) == [(96, 80, 6)]
    assert sizes_of(open_dataset(SHAPES, "train", None)) == [(96, 80, 6)]


def test_sizes_of_files_are_known_once_they_were_looked_at(tmp_path):
    assert known_sizes(tmp_path, VOC, tmp_path) is None
    remember_sizes(tmp_path, VOC, [(96, 80)] * 6, tmp_path)
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
    assert {name for name, store in found.items() if store} == {"M3", "M4"}
    assert found["M3"] == {"bytes": 6 * 128 * 5 * 6 * 4, "used": True, "reason": "0 MB, 2.3 visits of each image"}
    assert store_line("M3", found["M3"]) == "M3: feature store on: 0 MB, 2.3 visits of each image"


def test_visits_count_for_the_store_too(tmp_path):
    run = open_tiny(tmp_path / "tiny", "train_rpn_frozen_conv.visits=5.0", 'train_rpn_frozen_conv.schedule="one-cycle"')
    store = foreseen(run.folder, run.recipe.config(run.recipe.steps[4]), None)
    assert store is not None
    assert store["reason"] == "0 MB, 2.5 visits of each image"  # mirror images are images here


def test_plan_and_status_say_so(altopt, workplace):
    command = ["plan", "--recipe", "tiny.toml"]
    said = altopt(*command).out
    assert "M3: feature store off: 8 visits see only part of 12 images, caching would not pay" in said
    steps = json.loads(altopt(*command, "--json", "--set", "all.iterations=7").out)["steps"]
    assert [each["output"] for each in steps if each["feature_store"]] == ["M3", "M4"]
    assert steps[4]["feature_store"] == {"bytes": 12 * 128 * 5 * 6 * 4, "used": True,
                                         "reason": "0 MB, 1.2 visits of each image"}
