"""Where a step waits for the device: nowhere in stages 1, 3, 4 and 6, and in joint training as often as is counted."""

import shutil
import warnings
from collections import Counter

import pytest
import torch
from device_runs import Asking, around_steps
from tiny_runs import link_or_copy, open_tiny, write_recipe

from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run

# What a step of joint training on two images asks for: which boxes are inside and large enough, and what suppression
# keeps; and numbers that it compares with. To get it down to one wait in a step is later work.
JOINT = {"lift_fresh": 4, "nonzero": 6, "nms": 2}


def copy_of(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "tiny", copy_function=link_or_copy)


def make(run, artifact):
    run.make(next(step for step in run.recipe.steps if step.output == artifact))


def joint(finished, tmp_path, device="cpu"):
    """A run of approximate joint training, from the finished run's M0."""
    recipe = read_recipe(str(write_recipe(tmp_path / "tiny.toml")), (), "approximate-joint")
    return Run(copy_of(finished, tmp_path), recipe, open_tiny(tmp_path / "other", device=device).runtime)


@pytest.mark.parametrize("artifact", ["M1", "M2", "M3", "M4"])
def test_a_step_asks_for_nothing(finished, tmp_path, monkeypatch, artifact):
    """On the CPU, where ops that would wait can be counted; reading and drawing happen before the step."""
    asked: Counter[str] = Counter()

    def counted(step):
        with Asking() as mode:
            pending = step()
        asked.update(mode.asked)
        return pending

    around_steps(monkeypatch, counted)
    make(open_tiny(copy_of(finished, tmp_path)), artifact)
    assert asked.total() == 0, +asked
    assert asked  # some ops were seen


def test_what_joint_training_asks_for(finished, tmp_path, monkeypatch):
    steps = []

    def counted(step):
        with Asking() as mode:
            pending = step()
        steps.append(dict(+mode.asked))
        return pending

    around_steps(monkeypatch, counted)
    make(joint(finished, tmp_path), "M1")
    assert steps == [JOINT] * 3


@pytest.mark.cuda
@pytest.mark.parametrize("artifact", ["M1", "M2", "M3", "M4"])
def test_a_step_does_not_wait_for_the_gpu(finished, tmp_path, monkeypatch, artifact):
    def watched(step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    around_steps(monkeypatch, watched)
    make(open_tiny(copy_of(finished, tmp_path), device="cuda"), artifact)


@pytest.mark.cuda
def test_joint_training_waits_for_the_gpu(finished, tmp_path, monkeypatch, record_property):
    """Aimed at is one wait in a step; each is reported, with the place."""
    waits = []

    def watched(step):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                pending = step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append([f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)])
        return pending

    around_steps(monkeypatch, watched)
    make(joint(finished, tmp_path, "cuda"), "M1")
    record_property("waits", str(waits[0]))
    print(f"joint training waits {[len(each) for each in waits]} times in a step: {waits[0]}")
    assert len(waits) == 3
    assert all(1 <= len(each) <= 12 for each in waits)


@pytest.mark.cuda
@pytest.mark.parametrize("artifact", ["M1", "M2", "M3", "M4"])
def test_memory_does_not_grow_from_step_to_step(finished, tmp_path, monkeypatch, record_property, artifact):
    peaks = []

    def measured(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        pending = step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        return pending

    around_steps(monkeypatch, measured)
    make(open_tiny(copy_of(finished, tmp_path), "all.iterations=20", device="cuda"), artifact)
    record_property("peak_bytes", peaks[-1])
    assert peaks[-1] <= 1.2 * max(peaks[:5])
