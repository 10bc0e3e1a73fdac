import json
import os
import shutil

import pytest
import torch
from tiny_runs import ARTIFACTS, TINY, Reports, config_as, hashes, make_all, open_tiny, reasons, verdicts, write_recipe

from altopt.datasets.checking import Finding, Look
from altopt.errors import ArtifactError, UsageError
from cache.checkpoints import load_checkpoint, save_checkpoint
from cache.records import RENAMED, read_record
from stages.pipeline.evaluation import summary
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run, alone, find_step, import_given, open_folder
from stages.shared.events import Caution
from stages.shared.step import Runtime, file_name
from stages.steps.rpn import TrainRPN

ALL_DONE = dict.fromkeys(ARTIFACTS, "done")


def step_of(run, word):
    return find_step(run.recipe.steps, word)


def reports_of(run):
    assert isinstance(run.runtime.report, Reports)
    return run.runtime.report


def only(folder, *artifacts, records=True):
    """Remove all but these artifacts, and their records unless they are to be kept."""
    for path in folder.iterdir():
        if path.name.split(".")[0] not in artifacts or (path.suffix == ".json" and not records):
            path.unlink()


def take(run, words, target="M5"):
    """What --from does, with one word or several: import_artifact, then make what lies between."""
    steps = import_given(run, run.recipe.steps, words.split(), step_of(run, target))
    return [step.output for step in run.bring_up_to_date(steps)]


def run_one(run, step, force):
    """What altopt stage does without --from."""
    return run.bring_up_to_date(alone(run, step, force), force)


def given(folder, artifact):
    return read_record(folder / f"{artifact}.json").given


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def nudge(path):
    """Change one weight of a checkpoint."""
    tensors, description = load_checkpoint(path)
    name = next(iter(tensors))
    save_checkpoint(path, tensors | {name: tensors[name] + 1}, description)


def test_finished_run_is_done_and_nothing_is_made(copied):
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    run = open_tiny(copied)
    assert verdicts(run) == ALL_DONE
    assert make_all(run) == []
    after = {path.name: path.stat().st_mtime_ns for path in copied.iterdir() if path.name != ".hashes.json"}
    assert after.items() <= before.items()


def test_empty_folder_misses_everything(tmp_path):
    run = open_tiny(tmp_path / "tiny")
    assert verdicts(run) == dict.fromkeys(ARTIFACTS, "missing")
    assert reasons(run, "M1") == "not made yet"


def test_changed_setting_makes_its_stage_stale_and_the_others_wait(copied):
    run = open_tiny(copied, "train_rpn.lr=0.01")
    assert verdicts(run) == {"M0": "done", "M1": "stale", "P1": "waits", "M2": "waits", "M3": "waits", "P2": "waits",
                             "M4": "waits", "M5": "waits"}
    assert reasons(run, "M1") == "lr was 0.001, is 0.01"
    assert reasons(run, "M4") == "depends on M3 and P2, which will be made again"


def test_several_reasons_are_all_told(copied):
    run = open_tiny(copied, "train_rpn.freeze=[]", "network.anchor_scales=[2]", "generate_proposals.nms=0.5")
    assert reasons(run, "M1") == ('network.anchor_scales was [1.5, 3.0], is [2.0]; '
                                  'freeze was ["conv1", "conv2"], is []')
    assert "nms was 0.7, is 0.5" in reasons(run, "P1")


def test_changed_input(finished, copied):
    tensors, description = load_checkpoint(copied / "M0.safetensors")
    tensors["conv.conv1.0.bias"] += 1
    save_checkpoint(copied / "M0.safetensors", tensors, description)
    run = open_tiny(copied)
    import_given(run, run.recipe.steps, ["M0"], step_of(run, "M5"))
    old, new = (hashes(folder, "M0")["M0"][:8] for folder in (finished, copied))
    assert verdicts(run) == {"M0": "given", "M1": "stale", "P1": "waits", "M2": "stale"} | dict.fromkeys(
        ("M3", "P2", "M4", "M5"), "waits")
    assert reasons(run, "M1") == f"M0 has changed since (sha256 {new} here, {old} recorded)"


def test_edited_output(copied):
    nudge(copied / "M3.safetensors")
    run = open_tiny(copied)
    assert verdicts(run) == ALL_DONE | {"M3": "stale", "P2": "waits", "M4": "waits", "M5": "waits"}
    assert reasons(run, "M3") == "M3.safetensors was changed after it was made"


def test_output_edited_to_the_same_size_and_time(copied):
    path = copied / "P1.h5"
    verdicts(open_tiny(copied))
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    replace(path, content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert reasons(open_tiny(copied), "P1") == "P1.h5 was changed after it was made"


@pytest.mark.parametrize("text", [None, "", "{}", '{"format": "altopt record", "format_version": 99}'])
def test_missing_or_damaged_record(finished, copied, text):
    record = copied / "M2.json"
    record.unlink()
    if text is not None:
        record.write_text(text)
    run = open_tiny(copied)
    assert verdicts(run)["M2"] == "stale"
    assert reasons(run, "M2") == ("M2.safetensors has no record: it is incomplete, or from elsewhere "
                                  "(take it as it is with --from M2)")
    assert make_all(run) == ["M2"]
    assert hashes(copied) == hashes(finished)


def test_missing_output_made_anew_with_equal_bytes_leaves_what_follows(finished, copied):
    for artifact in ("M0", "P2"):
        (copied / file_name(artifact)).unlink()
    run = open_tiny(copied)
    assert verdicts(run) == {"M0": "missing", "M1": "waits", "P1": "waits", "M2": "waits", "M3": "waits",
                             "P2": "missing", "M4": "waits", "M5": "waits"}
    assert make_all(run) == ["M0", "P2"]
    assert verdicts(open_tiny(copied)) == ALL_DONE
    assert hashes(copied) == hashes(finished)


def test_setting_that_changes_no_byte_stops_there(copied):
    """Early cut-off: with no warm-up to speak of, M0 is what it was, and M1 stays valid."""
    assert make_all(open_tiny(copied, "pretrain_on_crops.warmup=1")) == ["M0"]


def test_changed_images(copied):
    run = open_tiny(copied, "data.seed=1")
    assert verdicts(run)["M0"] == "stale"
    assert reasons(run, "M0").startswith("data.seed was 0, is 1; the images or annotations changed (sha256 ")


def test_change_of_the_test_split_leaves_training_valid(copied):
    run = open_tiny(copied, 'data.test=["test:3"]')
    assert verdicts(run) == ALL_DONE
    verdict = run.verdict(detection("D5"))
    assert verdict.state == "stale"
    assert verdict.reasons[0] == 'data.test was ["test:4"], is ["test:3"]'


def test_change_of_the_train_split_leaves_detections_valid_but_for_the_networks(copied):
    run = open_tiny(copied, 'data.train=["train:5"]')
    assert verdicts(run)["M0"] == "stale"
    assert run.verdict(detection("D5")).state == "done"


def detection(output):
    from stages import DETECTIONS

    return next(step for step in DETECTIONS["alternating"] if step.output == output)


def test_another_version_of_a_stage(copied, monkeypatch):
    monkeypatch.setattr(TrainRPN, "version", TrainRPN.version + 1)
    run = open_tiny(copied)
    assert verdicts(run)["M1"] == "stale"
    assert verdicts(run)["M3"] == "waits"
    assert reasons(run, "M1") == f"train_rpn computes differently since version {TrainRPN.version - 1}"


def test_another_stage_for_the_same_output(copied):
    recipe = write_recipe(copied.parent / "other.toml", TINY.partition("[pretrain_on_crops]")[0])
    run = open_tiny(copied, recipe=recipe)
    assert reasons(run, "M0").startswith("it was made by pretrain_on_crops, and is now made by load_imagenet_weights")


def test_edited_comment_changes_nothing(copied):
    text = TINY.replace("# few", "# quite a few").replace('title = "tiny"', 'title = "a new title"')
    assert verdicts(open_tiny(copied, recipe=write_recipe(copied.parent / "other.toml", text))) == ALL_DONE


def test_touched_and_copied_files_change_nothing(copied):
    for artifact in ARTIFACTS:
        replace(copied / file_name(artifact), (copied / file_name(artifact)).read_bytes())
    assert verdicts(open_tiny(copied)) == ALL_DONE
    moved = copied.rename(copied.with_name("moved"))
    assert verdicts(open_tiny(moved)) == ALL_DONE


def test_runtime_changes_nothing(copied):
    assert verdicts(open_tiny(copied, workers=4, report_every=3, snapshot_seconds=9)) == ALL_DONE


def test_from_in_a_folder_with_records_makes_what_lies_between(finished, copied):
    only(copied, "M0", "M1")
    assert take(open_tiny(copied), "M1", "M2") == ["P1", "M2"]
    assert hashes(copied, "M0", "M1", "P1", "M2") == hashes(finished, "M0", "M1", "P1", "M2")
    assert (given(copied, "M0"), given(copied, "M1")) == (None, None)
    assert not (copied / "M3.safetensors").exists()


def test_from_in_a_folder_without_records_takes_both_as_given(finished, copied):
    only(copied, "M0", "M1", records=False)
    run = open_tiny(copied)
    assert take(run, "M1", "3") == ["P1", "M2"]
    assert hashes(copied, "M2") == hashes(finished, "M2")
    assert (given(copied, "M1"), given(copied, "M0")) == ("--from M1", "--from M1, which needs it")
    assert verdicts(run) | {"M3": "missing"} == verdicts(run)
    assert [verdicts(run)[name] for name in ("M0", "M1", "P1", "M2")] == ["given", "given", "done", "done"]
    assert take(run, "M1", "3") == []


def test_from_makes_m0_where_it_is_missing(finished, copied):
    only(copied, "M1", records=False)
    assert take(open_tiny(copied), "M1", "M2") == ["M0", "P1", "M2"]
    assert given(copied, "M0") is None
    assert hashes(copied, "M0", "M2") == hashes(finished, "M0", "M2")


def test_from_a_file(finished, workplace):
    run = open_tiny(workplace / "runs" / "new")
    assert take(run, f"M1={finished / 'M1.safetensors'}", "M2") == ["M0", "P1", "M2"]
    assert hashes(run.folder, "M0", "M1", "P1", "M2") == hashes(finished, "M0", "M1", "P1", "M2")
    assert given(run.folder, "M1") == f"--from M1={finished / 'M1.safetensors'}"


def test_from_a_file_of_proposals(finished, copied):
    only(copied, "M0")
    run = open_tiny(copied)
    assert take(run, f"P1={finished / 'P1.h5'}", "M2") == ["M2"]
    assert hashes(copied, "P1", "M2") == hashes(finished, "P1", "M2")


@pytest.mark.parametrize("order", [("M0", "M1", "P1"), ("P1", "M1", "M0"), ("M1", "P1", "M0")])
def test_from_several_files_takes_each_and_begins_behind_the_latest(finished, workplace, order):
    files = {name: f"{name}={finished / file_name(name)}" for name in order}
    run = open_tiny(workplace / "runs" / "new")
    assert take(run, " ".join(files.values()), "M2") == ["M2"]
    assert hashes(run.folder, "M0", "M1", "P1", "M2") == hashes(finished, "M0", "M1", "P1", "M2")
    assert {name: given(run.folder, name) for name in order} == {name: f"--from {files[name]}" for name in order}


def test_from_several_leaves_out_what_only_the_earlier_ones_lead_to(finished, workplace):
    run = open_tiny(workplace / "runs" / "new")
    words = [f"{name}={finished / file_name(name)}" for name in ("M0", "P1")]
    assert take(run, " ".join(words), "M3") == ["M2", "M3"]
    assert not (run.folder / "M1.safetensors").exists()
    assert hashes(run.folder, "M3") == hashes(finished, "M3")


def test_from_several_of_which_one_is_in_the_folder(finished, copied):
    """The one from a file takes the place of what was made here; the one without a file is what lies there."""
    nudge(copied / "M0.safetensors")
    nudged = hashes(copied, "M0")
    run = open_tiny(copied)
    assert take(run, f"M0 M1={finished / 'M1.safetensors'}", "M2") == ["M2"]  # P1 was made from an equal M1
    assert (given(copied, "M0"), hashes(copied, "M0")) == ("--from M0", nudged)
    assert hashes(copied, "M2") != hashes(finished, "M2")


@pytest.mark.parametrize(("words", "message"), [
    ("M1=M1.safetensors M1", "--from M1=M1.safetensors and --from M1 are one artifact: name it once"),
    ("M1 1", "--from M1 and --from 1 are one artifact"),
    ("M0=M0.safetensors M4", "--from M4 comes after what is asked for"),
    ("M0=M0.safetensors M9", "there is no stage 'M9'"),
])
def test_nothing_is_adopted_when_one_of_several_cannot_be_taken(copied, words, message):
    before = hashes(copied)
    with pytest.raises(UsageError, match=message):
        take(open_tiny(copied), words, "M2")
    assert hashes(copied) == before
    assert [given(copied, name) for name in ARTIFACTS] == [None] * 8


@pytest.mark.parametrize(("artifact", "other"), [
    ("M1", "P1"), ("P1", "M1"), ("F1", "M1"), ("F1", "P1"), ("S1", "P1"), ("S1", "M1"), ("R1", "P1"), ("R1", "M1")])
def test_file_of_another_kind_is_not_adopted(copied, artifact, other):
    before = hashes(copied)
    with pytest.raises(ArtifactError):
        open_tiny(copied).import_artifact(artifact, copied / file_name(other), "a test")
    assert hashes(copied) == before
    assert not [path for path in copied.iterdir() if path.name.startswith(("F", "S", "R"))]


def test_from_takes_a_stale_artifact_as_it_is(copied):
    nudge(copied / "M2.safetensors")
    nudged = hashes(copied, "M2")
    run = open_tiny(copied)
    assert take(run, "M2") == ["M3", "P2", "M4", "M5"]
    assert hashes(copied, "M2") == nudged
    assert verdicts(run) == {"M0": "not needed", "M1": "not needed", "P1": "not needed", "M2": "given", "M3": "done",
                             "P2": "done", "M4": "done", "M5": "done"}


def test_from_m2_in_a_folder_without_anything_else(finished, copied):
    only(copied, "M2", records=False)
    run = open_tiny(copied)
    assert take(run, "M2") == ["M3", "P2", "M4", "M5"]
    assert hashes(copied, "M3", "P2", "M4", "M5") == hashes(finished, "M3", "P2", "M4", "M5")
    assert make_all(run) == []


def test_given_artifact_that_is_edited_is_stale_again(copied):
    only(copied, "M2", records=False)
    run = open_tiny(copied)
    take(run, "M2")
    nudge(copied / "M2.safetensors")
    assert reasons(open_tiny(copied), "M2") == "M2.safetensors was changed after it was made"


def test_from_a_torch_file_of_torchvisions_names(tmp_path):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    state = squeezenet1_1(weights=None).state_dict()
    torch.save(state, tmp_path / "squeezenet.pth")
    text = TINY.partition("[pretrain_on_crops]")[0].replace('"small"', '"squeezenet1_1"')
    write_recipe(tmp_path / "tiny.toml", text + "[train_rpn]\niterations = 1 # one\n")
    run = open_tiny(tmp_path / "run")
    assert take(run, f"M0={tmp_path / 'squeezenet.pth'}", "M1") == ["M1"]
    tensors = load_checkpoint(tmp_path / "run" / "M1.safetensors")[0]
    assert torch.equal(tensors["conv.conv1.0.weight"], state["features.0.weight"])
    assert not torch.equal(tensors["conv.conv5.0.squeeze.weight"], state["features.11.squeeze.weight"])
    assert verdicts(run)["M0"] == "given"


def test_from_a_file_of_another_network(finished, tmp_path):
    write_recipe(tmp_path / "tiny.toml", TINY.replace('"small"', '"alexnet"'))
    run = open_tiny(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"M1.safetensors holds small, and alexnet is asked for"):
        take(run, f"M1={finished / 'M1.safetensors'}")
    shutil.copy(finished / "M1.safetensors", run.folder)
    with pytest.raises(ArtifactError, match=r"M1.safetensors holds small, and the recipe speaks of alexnet"):
        take(run, "M1")
    assert run.record("M1") is None


@pytest.mark.parametrize(("word", "message"), [
    ("M1", r"M1.safetensors is not in .*: give a file with --from M1=FILE, or make it with altopt stage M1"),
    ("M1=none.safetensors", "none.safetensors, given for M1, is not a file: check the path"),
    ("P1=tiny.toml", "tiny.toml"),
    ("M1=tiny.toml", "tiny.toml"),
])
def test_from_what_is_not_there_or_something_else(workplace, word, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        take(open_tiny(workplace / "runs" / "new"), word)
    assert "\n" not in str(caught.value)
    assert not list((workplace / "runs" / "new").glob("[MP]*"))


@pytest.mark.parametrize(("word", "target"), [("M4", "M2"), ("M5", "M5"), ("M2", "M2")])
def test_from_later_than_the_target(copied, word, target):
    with pytest.raises(UsageError, match=f"--from {word} .*{target}"):
        take(open_tiny(copied), word, target)


def test_from_an_unknown_artifact(copied):
    with pytest.raises(UsageError, match="there is no stage 'M9'"):
        take(open_tiny(copied), "M9")


@pytest.mark.parametrize(("word", "output"), [
    ("0", "M0"), ("3", "M2"), ("M2", "M2"), ("m2", "M2"), ("train_fast_rcnn", "M2"), ("train-fast-rcnn", "M2"),
    ("7", "M5"), ("p2", "P2"), ("generate_proposals", "P1"), ("add_rpn_layers", "M5"), ("pretrain_on_crops", "M0"),
])
def test_names_of_a_step(copied, word, output):
    assert find_step(open_tiny(copied).recipe.steps, word).output == output


@pytest.mark.parametrize("word", ["8", "-1", "", "M6", "trian_rpn"])
def test_no_name_of_a_step(copied, word):
    with pytest.raises(UsageError, match="give 1 to 7, an output such as M5, or a function: ") as caught:
        find_step(open_tiny(copied).recipe.steps, word)
    assert ("did you mean 'train_rpn'?" in str(caught.value)) == (word == "trian_rpn")


def test_init_is_recorded_and_decides_what_is_stale(finished, copied):
    run = open_tiny(copied, "train_fast_rcnn.init=M1")
    assert reasons(run, "M2") == "starts from M1 instead of M0 (init)"
    assert run_one(run, step_of(run, "M2"), force=False)
    record = run.record("M2")
    assert record.config["init"] == "M1"
    assert record.inputs == hashes(copied, "M1", "P1")
    assert hashes(copied, "M2") != hashes(finished, "M2")
    assert verdicts(run)["M2"] == "done"
    plain = open_tiny(copied)
    assert reasons(plain, "M2") == "starts from M0 instead of M1 (init)"
    assert make_all(plain) == ["M2"]
    assert hashes(copied) == hashes(finished)


@pytest.mark.parametrize("init", ["M9", "x", "P1", "M2", "M5", "../M1"])
def test_init_from_what_can_be_no_input(copied, init):
    """Only networks that are made before the stage."""
    with pytest.raises(UsageError, match=r"train_fast_rcnn.init must be ") as caught:
        open_tiny(copied, f"train_fast_rcnn.init={init}")
    assert "M0 or M1" in str(caught.value)


def test_force_makes_the_last_one_anew(finished, copied):
    run = open_tiny(copied)
    before = (copied / "M1.safetensors").stat().st_mtime_ns
    assert run_one(run, step_of(run, "M1"), force=False) == []
    assert [step.output for step in run_one(run, step_of(run, "M1"), force=True)] == ["M1"]
    assert (copied / "M1.safetensors").stat().st_mtime_ns > before
    assert "asked for with --force" in reports_of(run).texts()
    assert hashes(copied) == hashes(finished)


def test_force_makes_a_given_artifact_anew(copied):
    run = open_tiny(copied)
    run.import_artifact("M1", None, "a test")
    assert verdicts(run)["M1"] == "given"
    run_one(run, step_of(run, "M1"), force=True)
    assert verdicts(run)["M1"] == "done"


@pytest.mark.parametrize(("sets", "input_", "state"), [
    (["train_rpn.lr=0.5"], "P1", "waits"), (["generate_proposals.nms=0.5"], "P1", "stale"),
    (["pretrain_on_crops.lr=0.5"], "M0", "stale"),
])
def test_one_stage_refuses_inputs_that_are_not_valid(copied, sets, input_, state):
    run = open_tiny(copied, *sets)
    with pytest.raises(ArtifactError, match=rf"M2 needs {input_}, and {input_} is {state} \(.*\): make it with altopt "
                                            rf"stage {input_}, or take it as it is with --from {input_}"):
        run_one(run, step_of(run, "M2"), force=False)


def test_one_stage_refuses_missing_inputs(copied):
    only(copied, "M0", "M1")
    run = open_tiny(copied)
    with pytest.raises(ArtifactError, match=r"M2 needs P1, and P1 is missing \(not made yet\)"):
        run_one(run, step_of(run, "M2"), force=False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("later", ["M2", "M3"])
def test_one_stage_refuses_stale_inputs_also_when_it_or_a_later_one_is_given(copied, later, force):
    """What is given needs nothing of what comes before; a stage asked for by name does."""
    run = open_tiny(copied, "generate_proposals.nms=0.5")
    run.import_artifact(later, None, "a test")
    if later == "M2" and not force:
        assert run_one(run, step_of(run, "M2"), force) == []
        return
    with pytest.raises(ArtifactError, match="M2 needs P1, and P1 is stale"):
        run_one(run, step_of(run, "M2"), force)


def test_making_names_a_missing_input(tmp_path):
    run = open_tiny(tmp_path / "tiny")
    with pytest.raises(ArtifactError, match=r"train_rpn needs M0.safetensors, which is not in .*: make it with altopt "
                                            r"stage M0, or bring one with --from M0=FILE"):
        run.make(step_of(run, "M1"))


def test_reports_are_kept_in_the_log(finished):
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["artifact"] for line in lines if line["event"] == "finished"] == [*ARTIFACTS, "D2", "D5"]
    progress = [line for line in lines if line["event"] == "progress" and line["artifact"] == "M2"]
    assert [line["iteration"] for line in progress] == [1, 2, 3, 4]
    assert progress[0].keys() >= {"cls", "box", "lr", "images_per_second", "seconds", "time"}
    assert [line["lr"] for line in progress] == pytest.approx([0.001, 0.001, 0.001, 0.0001])


def test_reports_say_why(copied):
    run = open_tiny(copied, "train_rpn_frozen_conv.lr=0.01")
    make_all(run)
    assert reports_of(run).texts()[0] == "lr was 0.001, is 0.01"


def test_warnings_of_the_data_set_come_once(copied, monkeypatch):
    from altopt.datasets.shapes import ShapesDataset

    beware = Finding("kind", "beware", "warning")
    monkeypatch.setattr(ShapesDataset, "look", lambda dataset: Look(dataset.name, [beware], classes=None))
    reports = Reports()
    run = open_tiny(copied, report=reports)
    for word in ("P1", "P2"):
        run.make(step_of(run, word))
    assert [event.text for event in reports.of(Caution)] == ["beware"]


def test_folder_keeps_its_recipe_for_later(workplace):
    runtime = Runtime()
    first = open_folder("tiny.toml", None, ["train_rpn.lr=0.5"], None, runtime)
    assert first.folder.parts == ("runs", "tiny")
    assert not first.folder.exists()
    first.folder.mkdir(parents=True)
    first.keep_recipe()
    later = open_folder(None, "tiny", [], None, runtime)
    assert later.recipe.config(later.recipe.steps[1]) == first.recipe.config(first.recipe.steps[1])
    assert config_as(TrainRPN, later.recipe, later.recipe.steps[1]).lr == 0.5
    assert open_folder(None, None, [], None, runtime).folder.name == "shapes"


def test_data_root_is_the_recipes_unless_told(workplace):
    runtime = Runtime()
    open_folder("tiny.toml", None, [], None, runtime)
    assert str(runtime.data_root) == "."
    open_folder("tiny.toml", None, [], workplace / "data", runtime)
    assert runtime.data_root == workplace / "data"


def test_another_scheme_is_another_list(copied):
    """Three rounds instead of two, without any new code."""
    from stages.shared.step import Step
    from stages.steps.fast_rcnn import train_fast_rcnn_frozen_conv
    from stages.steps.proposals import generate_proposals
    from stages.steps.rpn import train_rpn_frozen_conv

    run = Run(copied, read_recipe(str(copied.parent / "tiny.toml")), Runtime(device="cpu"))
    more = [Step("M6", train_rpn_frozen_conv, "M4"), Step("P3", generate_proposals, "M6"),
            Step("M7", train_fast_rcnn_frozen_conv, "M6", "P3")]
    steps = [*run.recipe.steps[:-1], *more]
    assert [step.output for step in run.bring_up_to_date(steps)] == ["M6", "P3", "M7"]
    assert [each.state for each in run.survey(steps)] == ["done"] * 10


def test_a_network_is_given_to_a_scheme_that_begins_with_proposals(finished, workplace):
    run = open_folder("tiny.toml", None, [], None, Runtime(), "fast-rcnn")
    run.folder.mkdir(parents=True)
    run.import_artifact("M0", finished / "M0.safetensors", "from elsewhere")
    assert run.verdict(run.recipe.steps[0]).state == "given"


def test_run_folder_of_an_earlier_version_is_read(copied, monkeypatch):
    """Records and scores that speak of pictures: nothing is made again, and the summary is that of today."""
    today = summary(open_tiny(copied), "voc07")
    for path in (copied / "D5.json", copied / "D2.json", copied / "P1.json", copied / "metrics.json"):
        text = path.read_text()
        for old, new in RENAMED.items():
            text = text.replace(f'"{new}":', f'"{old}":')
        assert "picture" in text
        replace(path, text.encode())
    monkeypatch.setattr(Run, "make", lambda *arguments: pytest.fail("made again"))
    run = open_tiny(copied)
    assert verdicts(run) == ALL_DONE
    assert summary(run, "voc07") == today
