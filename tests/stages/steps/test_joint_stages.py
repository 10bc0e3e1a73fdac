"""Joint training as a stage: what it writes, that it resumes, and that the result detects."""

import dataclasses
import json
import signal
from collections.abc import Callable

import pytest
import torch
from tiny_runs import Reports, config_as, open_tiny

from altopt.errors import ArtifactError, UsageError
from altopt.machine.determinism import fixed_order
from cache.checkpoints import load_checkpoint, read_description, save_checkpoint
from cache.files import sha256_file
from stages import DETECTIONS
from stages.shared.detection import Detect
from stages.shared.events import Resumed, TrainingProgress, WeightsDrawn
from stages.shared.inference import Inference
from stages.shared.stage_config import PARTS
from stages.shared.step import Facts, Runtime, Step
from stages.steps.detect import detect_shared
from stages.steps.joint import train_approximate_joint, train_exact_joint

STAGES: list[Callable[..., Facts]] = [train_approximate_joint, train_exact_joint]
EACH_STAGE = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)


def config_of(folder, stage, **settings):
    """The tiny recipe's settings for the stage; the coordinate path is on from the second iteration."""
    config = open_tiny(folder).recipe.config(Step("M1", stage, "M0"))
    if stage is train_exact_joint:
        settings = {"coordinate_warmup": 1} | settings
    return dataclasses.replace(config, **settings)


def made(folder, stage, out, report=None, *, init="M0", seconds=1000.0, workers=1, **settings):
    """Run the stage on a network of the finished run and return the path of what it wrote."""
    runtime = Runtime(device="cpu", workers=workers, data_root=folder, snapshot_seconds=seconds, report_every=1,
                      report=report or Reports())
    stage(folder / f"{init}.safetensors", out=out, config=config_of(out.parent / "tiny", stage, **settings),
          runtime=runtime)
    return out


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """Networks trained jointly from M0, by stage; not to be changed."""
    folder = tmp_path_factory.mktemp("joint")
    return {stage: made(finished, stage, folder / f"{stage.__name__}.safetensors") for stage in STAGES}


def difference(one, other):
    """Names of the tensors that are not equal in both files."""
    first, second = (load_checkpoint(path)[0] for path in (one, other))
    return {name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])}


@EACH_STAGE
def test_one_network_with_all_parts_comes_out(trained, stage):
    tensors, description = load_checkpoint(trained[stage])
    assert {name.split(".")[0] for name in tensors} == set(PARTS)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["head.bbox_means"].eq(0).all()
    assert tensors["head.bbox_stds"].eq(torch.tensor([0.1, 0.1, 0.2, 0.2])).all()
    assert description["classes"] == ["circle", "square", "triangle", "cross", "ring"]
    assert not list(trained[stage].parent.glob("*.snapshot.*"))


@EACH_STAGE
def test_frozen_blocks_stay_and_the_others_learn(finished, trained, stage):
    changed = difference(finished / "M0.safetensors", trained[stage])
    assert {name.split(".")[1] for name in changed} == {"conv3", "conv4", "conv5"}


@EACH_STAGE
def test_another_run_with_other_workers_gives_the_same_bytes(finished, trained, stage, tmp_path):
    again = made(finished, stage, tmp_path / "again.safetensors", seconds=0.0, workers=2)
    assert sha256_file(again) == sha256_file(trained[stage])


@EACH_STAGE
def test_in_a_fixed_order_the_cpu_gives_the_same_bytes(finished, trained, stage, tmp_path):
    with fixed_order():
        again = made(finished, stage, tmp_path / "again.safetensors")
    assert sha256_file(again) == sha256_file(trained[stage])


@EACH_STAGE
def test_interrupted_and_continued_gives_the_same_bytes(finished, trained, stage, tmp_path):
    out = tmp_path / "out.safetensors"
    stop = Reports(at=lambda event: isinstance(event, TrainingProgress) and event.iteration == 2,
                   act=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        made(finished, stage, out, stop)
    assert not out.exists()
    again = Reports()
    made(finished, stage, out, again)
    assert [event.iteration for event in again.of(Resumed)] == [2]
    assert sha256_file(out) == sha256_file(trained[stage])


def test_the_loop_reports_four_losses(finished, tmp_path):
    reports = Reports()
    made(finished, train_exact_joint, tmp_path / "out.safetensors", reports, iterations=1)
    progress = reports.of(TrainingProgress)
    assert len(progress) == 1
    assert {"rpn_cls", "rpn_box", "cls", "box"} == progress[0].losses.keys()
    assert [event.drawn for event in reports.of(WeightsDrawn)] == [("rpn", "fc", "head")]


def test_the_coordinate_path_is_off_before_its_warmup_ends(finished, trained, tmp_path):
    """With one iteration warm-up has no way to matter; with four it has."""
    for iterations, same in ((1, True), (4, False)):
        one, other = (
            made(finished, train_exact_joint, tmp_path / f"{warmup}.safetensors", iterations=iterations,
                 coordinate_warmup=warmup) for warmup in (1, 100))
        assert (difference(one, other) == set()) == same
    late = difference(tmp_path / "1.safetensors", tmp_path / "100.safetensors")
    assert "rpn.bbox_pred.weight" in late


def test_a_limit_on_the_coordinate_gradient_is_part_of_the_result(finished, trained, tmp_path):
    cut = made(finished, train_exact_joint, tmp_path / "cut.safetensors", coordinate_clip=1e-9)
    assert "rpn.bbox_pred.weight" in difference(cut, trained[train_exact_joint])


def test_training_goes_on_from_a_network_with_all_parts(finished, tmp_path):
    reports = Reports()
    made(finished, train_approximate_joint, tmp_path / "out.safetensors", reports, init="M5", iterations=0)
    assert [event.drawn for event in reports.of(WeightsDrawn)] == [()]
    changed = difference(finished / "M5.safetensors", tmp_path / "out.safetensors")
    assert changed <= {"head.bbox_means", "head.bbox_stds", "head.bbox_pred.weight", "head.bbox_pred.bias"}


def test_unknown_blocks_cannot_be_frozen(finished, tmp_path):
    with pytest.raises(UsageError, match=r"there is no layer 'conv9'"):
        made(finished, train_exact_joint, tmp_path / "out.safetensors", freeze=("conv9",))


def detections(folder, network, out):
    config = config_as(Detect, open_tiny(folder / "tiny").recipe, DETECTIONS["alternating"][1])
    facts = detect_shared(network, out=out, config=dataclasses.replace(config, score=0.0),
                          runtime=Runtime(device="cpu", data_root=folder))
    recall = facts["recall_at_0.5"]
    assert isinstance(recall, float)
    assert 0 <= recall <= 1
    return json.loads(out.read_text())


def test_the_result_detects(trained, tmp_path):
    found = [detections(tmp_path, trained[stage], tmp_path / "found.json") for stage in STAGES]
    assert all(found)


def test_a_network_detects_with_the_op_that_it_was_trained_with(trained, tmp_path):
    exact = trained[train_exact_joint]
    assert "samples_per_bin" not in read_description(trained[train_approximate_joint])
    tensors, description = load_checkpoint(exact)
    assert description.pop("samples_per_bin") == 2
    other = tmp_path / "pooled.safetensors"
    save_checkpoint(other, tensors, description)
    assert detections(tmp_path, exact, tmp_path / "a.json") != detections(tmp_path, other, tmp_path / "b.json")
    config = config_as(Detect, open_tiny(tmp_path / "tiny").recipe, DETECTIONS["alternating"][1])
    runtime = Runtime(device="cpu", data_root=tmp_path)
    networks = Inference([(exact, PARTS), (other, PARTS)], config, runtime).networks
    assert [network.samples_per_bin for network in networks] == [2, 0]


@EACH_STAGE
def test_a_network_of_another_kind_is_refused(finished, stage, tmp_path):
    config = config_of(tmp_path / "tiny", stage)
    other = dataclasses.replace(config, network=dataclasses.replace(config.network, name="alexnet"))
    with pytest.raises(ArtifactError, match=r"M0.safetensors holds small, and alexnet is asked for"):
        stage(finished / "M0.safetensors", out=tmp_path / "out.safetensors", config=other, runtime=Runtime())


@EACH_STAGE
def test_every_default_has_a_source(stage):
    own = [each for each in dataclasses.fields(Step("M1", stage, "M0").config_class)
           if each.name not in ("network", "data")]
    assert [each.name for each in own if not each.metadata.get("source")] == []


def test_defaults_are_those_of_the_joint_solver():
    for stage in STAGES:
        defaults = {each.name: each.default for each in dataclasses.fields(Step("M1", stage, "M0").config_class)}
        expected = {"iterations": 70_000, "lr": 1e-3, "lr_steps": (50_000,), "images_per_batch": 1,
                    "rois_per_batch": 128, "anchors_per_image": 256, "pre_nms": 12_000, "post_nms": 2000, "nms": 0.7,
                    "min_side": 16.0, "dropout": 0.5, "freeze": ("conv1", "conv2")}
        assert defaults | expected == defaults
