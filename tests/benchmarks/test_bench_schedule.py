import pytest

from benchmarks.bench.schedule import Figures, ratios, schedule

SECONDS = {
    ("train_rpn", False): 1.0, ("generate_proposals", False): 0.5, ("train_fast_rcnn", False): 2.0,
    ("train_rpn_frozen_conv", False): 0.8, ("train_rpn_frozen_conv", True): 0.1,
    ("generate_proposals", True): 0.2, ("train_fast_rcnn_frozen_conv", False): 1.2,
    ("train_fast_rcnn_frozen_conv", True): 0.4, ("feature_store", False): 0.6,
    ("train_approximate_joint", False): 1.5, ("detect", False): 0.3,
}


def row(name, store, seconds, precision="float32"):
    return {"name": name, "precision": precision, "store": store, "compiled": False, "images": 2,
            "seconds": seconds, "processor_seconds": 2 * seconds, "parts": {"optimizer": 0.1}}


def figures(clock="seconds", without=()):
    rows = [row(name, store, seconds) for (name, store), seconds in SECONDS.items() if name not in without]
    rows += [row("torchvision_training", False, 3.0), row("torchvision_training", False, 6.0, "bfloat16")]
    return Figures(rows, clock)


def test_the_paper_s_schedule_by_hand():
    result = schedule(figures(), "float32")
    stages = [80_000 * 1.0, 5011 * 0.5, 40_000 * 2.0, 10_022 * 0.3, 80_000 * 0.1, 5011 * 0.2, 40_000 * 0.4]
    assert list(result["stages"].values()) == pytest.approx(stages)
    assert result["alternating"] == pytest.approx(sum(stages))
    without = [80_000 * 1.0, 5011 * 0.5, 40_000 * 2.0, 80_000 * 0.8, 5011 * 0.5, 40_000 * 1.2]
    assert result["alternating_without_store"] == pytest.approx(sum(without))
    for seconds, name in ((70_000 * 1.5, ""), (70_000 * 2.9, "_iter_size_2")):
        assert result[f"approximate_joint{name}"] == pytest.approx(seconds)
        assert result[f"alternating_over_joint{name}"] == pytest.approx(sum(stages) / seconds)
        assert result[f"without_store_over_joint{name}"] == pytest.approx(sum(without) / seconds)
    assert result["alternating_over_torchvision_iter_size_2"] == pytest.approx(sum(stages) / (70_000 * 5.9))
    assert result["alternating_over_torchvision_autocast_iter_size_2"] == pytest.approx(sum(stages) / (70_000 * 11.9))


def test_ratios_by_hand():
    result = ratios(figures(), "float32")
    building = 10_022 * 0.3
    assert result["store_rpn_step"] == pytest.approx(8)
    assert result["store_fast_rcnn_step"] == pytest.approx(3)
    assert result["store_rpn_stage_with_building"] == pytest.approx(80_000 * 0.8 / (80_000 * 0.1 + building))
    both = (80_000 * 0.8 + 40_000 * 1.2) / (80_000 * 0.1 + 40_000 * 0.4 + building)
    assert result["store_both_stages_with_building"] == pytest.approx(both)
    assert result["torchvision_default_joint_step"] == pytest.approx(2)
    assert result["torchvision_autocast_joint_step"] == pytest.approx(4)
    assert result["torchvision_default_detection"] is None


def test_the_clock_is_the_one_asked_for():
    result = schedule(figures("processor_seconds"), "float32")
    assert result["approximate_joint"] == pytest.approx(70_000 * 3)


def test_what_was_not_measured_is_not_reckoned():
    result = schedule(figures(without=("feature_store",)), "float32")
    assert result["alternating"] is None
    assert result["alternating_over_joint"] is None
    assert result["alternating_without_store"] is not None
    assert all(value is None for value in ratios(figures(), "bfloat16").values())
