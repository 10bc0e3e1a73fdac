import json
import math

import pytest
import torch

from benchmarks.bench import stage_contenders, torchvision_contenders
from benchmarks.bench.__main__ import main
from benchmarks.bench.measuring import CONTENDERS, float32_switches, make_plan, measure, set_tf32
from benchmarks.bench.stopwatch import PARTS, Stopwatch
from benchmarks.bench.watching import watched
from benchmarks.bench.workplace import Workplace

ROW = {"name", "precision", "store", "compiled", "images", "seconds", "least", "greatest", "processor_seconds",
       "steps", "parts", "shares", "held_bytes", "peak_bytes"}
FROZEN = ("train_rpn_frozen_conv", "train_fast_rcnn_frozen_conv", "generate_proposals")
TRAINED = {name for name in CONTENDERS if name.startswith("train_")} | {"torchvision_training"}


@pytest.fixture(scope="module")
def report():
    """A bench of everything on the smallest images."""
    plan = make_plan(networks="small", sizes="48x64", device="cpu", rounds=1, precision="float32")
    return measure(plan, "python -m benchmarks.bench", lambda text: None)


@pytest.fixture(scope="module")
def rows(report):
    return report["results"][0]["contenders"]


def by_name(rows):
    return {(row["name"], row["precision"], row["store"]): row for row in rows}


def test_a_report_says_what_it_is_of(report):
    assert set(report) == {"version", "command", "machine", "settings", "results"}
    assert {"processor", "cores", "threads", "bf16_flags", "gpus", "memory_bytes", "python", "torch", "torchvision",
            "system", "load_average"} == set(report["machine"])
    assert {"networks", "sizes", "contenders", "devices", "precision", "rounds", "clock",
            "compiled", "tf32"} == set(report["settings"])
    (result,) = report["results"]
    assert set(result) == {"network", "size", "device", "contenders", "ratios", "schedule"}
    assert (result["network"], result["size"], result["device"]) == ("small", "48x64", "cpu")
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_contender_is_there(rows):
    found = by_name(rows)
    assert {name for name, _, _ in found} == set(CONTENDERS)
    for name in FROZEN:
        assert {(name, "float32", False), (name, "float32", True)} <= set(found)
    for name in torchvision_contenders.NAMES:
        assert {(name, "float32", False), (name, "bfloat16", False)} <= set(found)
    assert all(set(row) == ROW for row in rows)


def test_shares_add_up_to_the_step(rows):
    for row in rows:
        assert tuple(row["parts"]) == tuple(row["shares"]) == PARTS
        assert math.isclose(sum(row["shares"].values()), 1, rel_tol=1e-6)
        assert 0 < row["least"] <= row["seconds"] <= row["greatest"]
        assert row["steps"] == 1
        snapshot = row["parts"]["write"] if row["name"] in TRAINED else 0
        assert sum(row["parts"].values()) - snapshot == pytest.approx(row["seconds"], rel=0.1, abs=0.01)


def test_each_step_has_the_parts_that_it_consists_of(rows):
    for row in rows:
        parts = {name for name, seconds in row["parts"].items() if seconds > 0}
        assert ("backward" in parts) == ("optimizer" in parts) == (row["name"] in TRAINED)
        stored = row["store"] and row["name"] in FROZEN
        assert ("trunk" in parts) == (row["name"] != "add_rpn_layers") or stored
        assert not stored or row["parts"]["trunk"] < row["seconds"] / 10  # putting maps together
        assert ("rpn" in parts) == (row["name"] not in ("train_fast_rcnn", "train_fast_rcnn_frozen_conv",
                                                        "feature_store", "add_rpn_layers"))
        pooled = "rcnn" in row["name"] or "joint" in row["name"] or "detect" in row["name"] or "torch" in row["name"]
        assert ("roi_pool" in parts) == ("head" in parts) == pooled
        assert ("sampling" in parts) == (row["name"] in TRAINED)
    assert by_name(rows)["feature_store", "float32", False]["parts"]["write"] > 0


def test_memory_is_at_least_what_the_network_takes(rows):
    found = by_name(rows)
    small, whole = found["train_rpn", "float32", False], found["train_approximate_joint", "float32", False]
    assert whole["held_bytes"] > small["held_bytes"] > 4 * 400_000
    assert all(row["peak_bytes"] is None or row["peak_bytes"] >= row["held_bytes"] for row in rows)


def test_ratios_and_schedule_are_of_the_rows(report, rows):
    found, result = by_name(rows), report["results"][0]
    ratios, schedule = result["ratios"]["float32"], result["schedule"]["float32"]
    plain, stored = (found["train_rpn_frozen_conv", "float32", store]["seconds"] for store in (False, True))
    assert ratios["store_rpn_step"] == pytest.approx(plain / stored)
    joint = found["train_approximate_joint", "float32", False]["seconds"]
    autocast = found["torchvision_training", "bfloat16", False]["seconds"]
    assert ratios["torchvision_autocast_joint_step"] == pytest.approx(autocast / joint)
    assert ratios["compiled_joint_step"] is None
    assert schedule["approximate_joint"] == pytest.approx(70_000 * joint)
    assert schedule["alternating"] == pytest.approx(sum(schedule["stages"].values()))


def test_contenders_keep_equal_weights(tmp_path):
    """So that none of them has other proposals to suppress than the others."""
    watch = Stopwatch()
    names = {"train_rpn", "train_fast_rcnn_frozen_conv", "train_approximate_joint", "torchvision_training"}
    with watched(watch), Workplace("small", (192, 160), torch.device("cpu"), tmp_path / "bench", watch) as place:
        before = [{name: each.clone() for name, each in network.state_dict().items()}
                  for network in (place.learning, place.frozen)]
        made = [*stage_contenders.stage_contenders(place, names, ("float32",), compiled=False),
                *torchvision_contenders.torchvision_contenders(place, names)]
        for each in made:
            each.prepare()
            each.step(0)
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in each.module.parameters())
            each.finish()
            assert all(parameter.grad is None for parameter in each.module.parameters())
        assert len(made) == 6
        for network, kept in zip((place.learning, place.frozen), before, strict=True):
            assert all(torch.equal(each, kept[name]) for name, each in network.state_dict().items())


def test_the_command_prints_saves_and_fills_the_document(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "RESULTS.md"
    document.write_text("# Mine\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nthe rest\n")
    assert main(["--networks", "small", "--sizes", "48x64", "--rounds", "1", "--device", "cpu", "--contenders",
                 "detect,generate_proposals", "--clock", "processor", "--json", "--precision", "float32", "--tf32",
                 "torch", "--save", "benchmarks/bench.json", "--markdown", "RESULTS.md"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert json.loads((tmp_path / "benchmarks" / "bench.json").read_text()) == printed
    assert printed["settings"]["clock"] == "processor_seconds"
    assert printed["command"].startswith("python -m benchmarks.bench")
    assert [row["name"] for row in printed["results"][0]["contenders"]] == \
        ["generate_proposals", "generate_proposals", "detect"]
    text = document.read_text()
    assert text.startswith("# Mine\n\n<!-- bench -->\n")
    assert text.endswith("<!-- /bench -->\n\nthe rest\n")
    assert "old" not in text
    assert "`generate_proposals`, store" in text
    assert "torchvision" in text
    assert "round 1 of 1" in err


@pytest.mark.parametrize(("option", "word", "said"), [
    ("--networks", "vgg61", "did you mean 'vgg16'"), ("--contenders", "train_rnp", "did you mean 'train_rpn'"),
    ("--sizes", "600", "HEIGHTxWIDTH"), ("--sizes", "600x30", "at least 40"),
    ("--device", "cuda:99", "no such device"),
])
def test_words_that_mean_nothing_are_usage_errors(capsys, option, word, said):
    assert main([option, word]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("wanted", "precision"), [("on", "tf32"), ("off", "ieee")])
def test_tf32_is_switched_for_products_and_convolutions(wanted, precision):
    places = float32_switches()
    before = [place.fp32_precision for place in places]
    try:
        set_tf32(wanted)
        set_tf32("torch")  # which changes nothing
        assert [place.fp32_precision for place in places] == [precision, precision]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_without_a_compiler_compile_says_so_in_a_line(monkeypatch):
    from altopt.errors import UsageError
    from benchmarks.bench.compiled_trunk import CompiledTrunk

    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmany\nlines")

    monkeypatch.setattr(torch, "compile", lambda module: fail)
    trunk = CompiledTrunk(torch.nn.Sequential())
    with pytest.raises(UsageError, match=r"^--compile: .*No working C\+\+ compiler found\): install"):
        trunk(torch.zeros(1))
