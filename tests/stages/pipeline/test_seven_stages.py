import json
import multiprocessing
import signal
import time
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from tiny_runs import ARTIFACTS, STAGES, Reports, hashes, make_all, open_tiny, verdicts, work, work_until_killed

from altopt.config import NetworkConfig
from altopt.datasets.shapes import ShapesDataset
from altopt.errors import ArtifactError
from altopt.machine.interruption import Terminated
from cache.checkpoints import load_checkpoint, read_description, save_checkpoint
from cache.proposals import ProposalFile
from stages.shared.events import Resumed, TrainingProgress
from stages.shared.step import Runtime, file_name
from stages.steps.assemble import Assemble, add_rpn_layers

# A fresh process takes ten seconds to import torchvision; one that is forked from a server that did takes none.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "h5py"])


@pytest.fixture(scope="module", autouse=True)
def _server_starts_while_other_tests_run():
    forkserver.ensure_running()


def tensors_of(folder, artifact, *parts):
    tensors, _ = load_checkpoint(folder / file_name(artifact))
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in parts or not parts}


def parts_of(folder, artifact):
    return {name.split(".")[0] for name in tensors_of(folder, artifact)}


def assert_equal(a, b):
    assert a
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def test_every_stage_leaves_an_artifact_and_a_record(finished):
    for artifact, stage in zip(ARTIFACTS, STAGES, strict=True):
        assert (finished / file_name(artifact)).stat().st_size > 0
        record = json.loads((finished / f"{artifact}.json").read_text())
        assert (record["artifact"], record["stage"], record["given"]) == (artifact, stage, None)
        assert record["sha256"] == hashes(finished, artifact)[artifact]
        assert record["seconds"] >= 0
    assert not list(finished.glob("*.snapshot.*"))
    assert not list(finished.glob(".*.partial"))


def test_parts_of_every_network(finished):
    assert {name: parts_of(finished, name) for name in ("M0", "M1", "M2", "M3", "M4", "M5")} == {
        "M0": {"conv"}, "M1": {"conv", "rpn"}, "M2": {"conv", "fc", "head"}, "M3": {"conv", "rpn", "fc", "head"},
        "M4": {"conv", "fc", "head"}, "M5": {"conv", "rpn", "fc", "head"},
    }


@pytest.mark.parametrize("later", ["M3", "M4", "M5"])
def test_conv_layers_of_the_last_four_networks_are_bit_equal(finished, later):
    assert_equal(tensors_of(finished, "M2", "conv"), tensors_of(finished, later, "conv"))


def test_rpn_training_keeps_the_detector_and_assembly_keeps_the_rpn(finished):
    assert_equal(tensors_of(finished, "M2", "fc", "head"), tensors_of(finished, "M3", "fc", "head"))
    assert_equal(tensors_of(finished, "M3", "rpn"), tensors_of(finished, "M5", "rpn"))
    assert_equal(tensors_of(finished, "M4"), tensors_of(finished, "M5", "conv", "fc", "head"))


def test_fast_rcnn_starts_from_m0_and_not_from_m1(finished):
    """Blocks 1 and 2 are frozen in both; the later ones learn, from M0 each time."""
    initial, rpn, detector = (tensors_of(finished, name, "conv") for name in ("M0", "M1", "M2"))
    for name, tensor in initial.items():
        frozen = name.startswith(("conv.conv1.", "conv.conv2."))
        assert torch.equal(tensor, rpn[name]) == torch.equal(tensor, detector[name]) == frozen, name
        assert frozen or not torch.equal(rpn[name], detector[name])


def test_stage_6_learns(finished):
    before, after = tensors_of(finished, "M3", "fc"), tensors_of(finished, "M4", "fc")
    assert not torch.equal(before["fc.fc6.weight"], after["fc.fc6.weight"])


@pytest.mark.parametrize("artifact", ["P1", "P2"])
def test_proposals_lie_in_their_images_best_first(finished, artifact):
    dataset = ShapesDataset(("train:6",), width=96, height=80)
    with ProposalFile(finished / file_name(artifact)) as file:
        assert tuple(file.image_ids) == dataset.ids
        for id in dataset.ids:
            boxes, scores = file.get(id)
            assert 0 < len(boxes) == len(scores) <= 40
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= (96, 80)).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 4 - 1e-4).all()
            assert ((scores >= 0) & (scores <= 1)).all()
            assert (np.diff(scores) <= 0).all()


def test_proposals_name_the_network_that_made_them(finished):
    with ProposalFile(finished / "P1.h5") as file:
        assert file.attributes["model"] == hashes(finished, "M1")["M1"]


def test_another_run_with_other_workers_gives_the_same_bytes(finished, tmp_path):
    run = open_tiny(tmp_path / "tiny", workers=3, snapshot_seconds=0)
    assert make_all(run) == list(ARTIFACTS)
    assert hashes(tmp_path / "tiny") == hashes(finished)


def test_another_seed_gives_other_bytes(finished, copied):
    """Otherwise the test before this one says nothing."""
    make_all(open_tiny(copied, "train_rpn_frozen_conv.seed=4"))
    ours, theirs = hashes(copied), hashes(finished)
    assert {name for name in ARTIFACTS if ours[name] != theirs[name]} == {"M3", "P2", "M4", "M5"}


@pytest.mark.parametrize(("artifact", "number", "error", "seconds"), [
    ("M0", signal.SIGINT, KeyboardInterrupt, 0), ("M1", signal.SIGTERM, Terminated, 1000),
    ("M2", signal.SIGINT, KeyboardInterrupt, 1000), ("M3", signal.SIGTERM, Terminated, 0),
    ("M4", signal.SIGINT, KeyboardInterrupt, 1000),
])
def test_interrupted_and_continued_gives_the_same_bytes(finished, copied, artifact, number, error, seconds):
    """A signal is held back until a snapshot is written, whatever the clock says."""
    before = signal.getsignal(signal.SIGTERM)
    (copied / file_name(artifact)).unlink()
    reports = Reports(at=lambda event: isinstance(event, TrainingProgress) and event.iteration == 2,
                      act=lambda: signal.raise_signal(number))
    with pytest.raises(error):
        make_all(open_tiny(copied, report=reports, snapshot_seconds=seconds))
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (copied / file_name(artifact)).exists()
    again = Reports()
    assert make_all(open_tiny(copied, report=again, snapshot_seconds=seconds)) == [artifact]
    assert [event.iteration for event in again.of(Resumed)] == [2]
    assert [event.iteration for event in again.of(TrainingProgress)] == [3, 4]
    assert hashes(copied) == hashes(finished)
    assert not list(copied.glob("*.snapshot.*"))


def test_in_a_fixed_order_the_cpu_gives_the_same_bytes_and_goes_on_from_no_other_snapshot(finished, copied):
    (copied / "M2.safetensors").unlink()
    reports = Reports(at=lambda event: isinstance(event, TrainingProgress) and event.iteration == 2,
                      act=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        make_all(open_tiny(copied, report=reports))
    assert (copied / "M2.snapshot.safetensors").exists()
    again = Reports()
    run = open_tiny(copied, report=again, deterministic=True)
    assert make_all(run) == ["M2"]
    assert not [event for event in again.events if event.kind == "resumed"]
    assert hashes(copied) == hashes(finished)
    assert [run.record(name).metrics.get("deterministic") for name in ("M1", "M2")] == [None, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_exception_inside_a_stage_leaves_the_snapshot_before_it(finished, copied):
    (copied / "M2.safetensors").unlink()

    def interrupt():
        raise KeyboardInterrupt

    reports = Reports(at=lambda event: isinstance(event, TrainingProgress) and event.iteration == 3, act=interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_all(open_tiny(copied, report=reports, snapshot_seconds=0))
    again = Reports()
    assert make_all(open_tiny(copied, report=again)) == ["M2"]
    assert [event.iteration in (1, 2) for event in again.of(Resumed)] == [True]
    assert hashes(copied) == hashes(finished)


def test_snapshot_of_other_settings_is_not_resumed(finished, copied):
    (copied / "M3.safetensors").unlink()
    stop = Reports(at=lambda event: event.kind == "progress", act=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        make_all(open_tiny(copied, "train_rpn_frozen_conv.lr=0.5", report=stop))
    assert (copied / "M3.snapshot.safetensors").exists()
    again = Reports()
    make_all(open_tiny(copied, report=again))
    assert not [event for event in again.events if event.kind == "resumed"]
    assert hashes(copied) == hashes(finished)


def run_and_join(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def test_killed_and_continued_gives_the_same_bytes(finished, tmp_path):
    """kill -9 in the middle of a training, after its second snapshot, and in the middle of writing proposals."""
    folder = tmp_path / "tiny"
    open_tiny(folder)
    assert run_and_join(work_until_killed, folder, "M2", "progress", 3) == -signal.SIGKILL
    assert (folder / "M2.snapshot.safetensors").exists()
    assert run_and_join(work_until_killed, folder, "P2", "images", 2) == -signal.SIGKILL
    assert list(folder.glob(".P2.*partial"))
    assert verdicts(open_tiny(folder))["P2"] == "missing"
    assert make_all(open_tiny(folder)) == ["P2", "M4", "M5"]
    assert hashes(folder) == hashes(finished)
    assert not list(folder.glob(".*partial"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_any_moment_and_continued_gives_the_same_bytes(finished, tmp_path, moment):
    folder = tmp_path / "tiny"
    open_tiny(folder)
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=work, args=(folder, started))
    process.start()
    assert started.wait(60)
    time.sleep(0.1 * moment)
    process.kill()
    process.join()
    make_all(open_tiny(folder))
    assert hashes(folder) == hashes(finished)


def changed(path, out, name, change):
    tensors, description = load_checkpoint(path)
    tensors[name] = change(tensors[name])
    save_checkpoint(out, tensors, description)
    return out


def assemble(detector, rpn, out):
    return add_rpn_layers(detector, rpn, out=out, config=Assemble(), runtime=Runtime())


def test_assembly_refuses_a_changed_conv_layer_and_names_it(finished, tmp_path):
    name = "conv.conv4.3.bias"
    other = changed(finished / "M4.safetensors", tmp_path / "other.safetensors", name,
                    lambda bias: torch.nextafter(bias, bias + 1))
    with pytest.raises(ArtifactError, match=rf"do not share their conv layers: {name} differs in 128 of 128 values"):
        assemble(other, finished / "M3.safetensors", tmp_path / "M5.safetensors")
    assert not (tmp_path / "M5.safetensors").exists()


def test_assembly_refuses_networks_that_share_nothing(finished, tmp_path):
    with pytest.raises(ArtifactError, match=r"conv\.conv3\.\d\.\w+ differs .* make M2 again .* \(altopt stage M2\)"):
        assemble(finished / "M2.safetensors", finished / "M1.safetensors", tmp_path / "M5.safetensors")


def test_assembly_refuses_a_network_without_rpn(finished, tmp_path):
    with pytest.raises(ArtifactError, match=r"M2.safetensors has no RPN layers"):
        assemble(finished / "M4.safetensors", finished / "M2.safetensors", tmp_path / "M5.safetensors")


@pytest.mark.parametrize("key", ["anchor_scales", "short_side"])
def test_assembly_refuses_other_anchors_and_sizes(finished, tmp_path, key):
    tensors, description = load_checkpoint(finished / "M3.safetensors")
    description["network"][key] = None
    save_checkpoint(tmp_path / "other.safetensors", tensors, description)
    with pytest.raises(ArtifactError, match="different anchors, image sizes or pixels"):
        assemble(finished / "M4.safetensors", tmp_path / "other.safetensors", tmp_path / "M5.safetensors")


@pytest.mark.parametrize("missing", ["M4", "M3"])
def test_assembly_of_a_missing_file(finished, tmp_path, missing):
    paths = [tmp_path / "no.safetensors" if name == missing else finished / f"{name}.safetensors"
             for name in ("M4", "M3")]
    with pytest.raises(ArtifactError, match=r"no\.safetensors is missing"):
        assemble(paths[0], paths[1], tmp_path / "M5.safetensors")


def test_networks_say_what_they_are(finished):
    config = NetworkConfig(name="small", short_side=80, max_side=96, anchor_scales=(1.5, 3.0), rpn_channels=8)
    for artifact in ("M1", "M2", "M3", "M4", "M5"):
        network = read_description(finished / file_name(artifact))["network"]
        assert network == json.loads(json.dumps(config.__dict__))
    assert read_description(finished / "M5.safetensors")["classes"] == ["circle", "square", "triangle", "cross", "ring"]


def test_stage_of_another_network_is_refused(copied):
    (copied / "M1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"M0.safetensors holds small, and alexnet is asked for"):
        open_tiny(copied, "network.name=alexnet").make(open_tiny(copied).recipe.steps[1])


def test_rpn_of_other_anchors_is_refused(copied):
    run = open_tiny(copied, "network.anchor_scales=[2, 4]")
    with pytest.raises(ArtifactError, match=r"M1.safetensors was trained with anchor_scales = \[1.5, 3.0\], and the "
                                            r"recipe says \[2.0, 4.0\]"):
        run.make(run.recipe.steps[2])


def test_proposals_of_other_images_are_refused(copied):
    run = open_tiny(copied, 'data.train=["train:7"]')
    with pytest.raises(ArtifactError, match=r"P1.h5 has no proposals for image train-00006"):
        run.make(run.recipe.steps[3])
