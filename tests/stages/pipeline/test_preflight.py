"""What is looked at before anything is made, and that nothing is made where it cannot go well."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from own_photographs import save_image, write, xml
from tiny_runs import open_tiny, write_recipe

from altopt.datasets import selective_search
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, DataError, ResourceError, UsageError
from altopt.machine.memory import Memory
from altopt.training import svm
from cache.checkpoints import save_checkpoint
from stages.pipeline import preflight
from stages.pipeline.comparison import Comparison, Variant, outcomes
from stages.pipeline.preflight import look_ahead, prepared, prepared_alone
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run, find_step
from stages.shared.events import Caution
from stages.shared.footprint import footprint, part_bytes
from stages.shared.step import Runtime

GB = 10**9
CLASSES = len(open_dataset(DataConfig(format="shapes", train=("train:1",), test=("test:1",)), "train", None).classes)


def prepare(run, *given, until=None):
    steps = run.recipe.steps
    return [step.output for step in prepared(
        run, find_step(steps, until) if until else steps[-1], given, scored=until is None)]


def cautions(run):
    return [event.text for event in run.runtime.report.of(Caution)]


def artifacts(folder: Path):
    return sorted(path.name for path in folder.glob("[A-Z][0-9]*"))


def refusal(run, kind, *given, until=None):
    """The one line that ends the command, before anything is made."""
    with pytest.raises(kind) as caught:
        prepare(run, *given, until=until)
    assert "\n" not in str(caught.value)
    assert artifacts(run.folder) == []
    return str(caught.value)


@pytest.fixture
def plenty(monkeypatch):
    monkeypatch.setattr(preflight, "memory_left", lambda: Memory(100 * GB, 0))


def with_room(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)


def voc(folder: Path, test: bool = True) -> Path:
    """Six images and their lists; of the last one, which is for testing, the annotation is broken unless ``test``."""
    for number in range(6):
        save_image(folder / "JPEGImages" / f"{number}.png")
        write(folder / "Annotations" / f"{number}.xml", xml() if test or number < 5 else "<annotation>")
    write(folder / "ImageSets/Main/train.txt", "0\n1\n2\n3\n4\n")
    write(folder / "ImageSets/Main/test.txt", "5\n")
    return folder


def voc_run(tmp_path, *sets, **options):
    sets = ("data.format=voc", 'data.train=["train"]', 'data.test=["test"]', 'data.classes=["cat", "dog"]', *sets)
    return open_tiny(tmp_path / "tiny", *sets, data_root=tmp_path / "mine", **options)


def test_a_run_that_can_go_well_is_told_nothing(tmp_path, plenty):
    run = open_tiny(tmp_path / "tiny")
    assert prepare(run) == [step.output for step in run.recipe.steps]
    assert cautions(run) == []
    assert artifacts(run.folder) == []


def test_nothing_to_do_costs_nothing(copied, monkeypatch):
    monkeypatch.setattr(preflight, "look_ahead", lambda plans: pytest.fail("looked ahead for nothing"))
    run = open_tiny(copied)
    assert run.bring_up_to_date(prepared(run, run.recipe.steps[-1], (), scored=True)) == []
    assert prepared_alone(run, run.recipe.steps[1], (), force=False) == []


def test_only_what_will_run_counts(copied, plenty, monkeypatch):
    looked = []
    monkeypatch.setattr(preflight, "look_ahead", lambda plans: looked.extend(plans))
    run = open_tiny(copied, "train_rpn_frozen_conv.lr=0.5")
    prepare(run)
    assert [step.output for _, steps in looked for step in steps] == ["M3", "P2", "M4", "M5", "D5"]
    looked.clear()
    prepare(run, "M4")
    assert looked == []  # what was made of M4 is as it was
    assert [[step.output for step in prepared_alone(run, run.recipe.steps[1], (), force=True)]] == [["M1"]]


def test_a_device_that_is_not_there_comes_first(tmp_path):
    run = voc_run(tmp_path, device="cuda:77")  # no data root either
    assert "--device cuda:77: this PyTorch sees no such device" in refusal(run, UsageError)


@pytest.mark.parametrize(("scheme", "module", "name", "remedy"), [
    ("fast-rcnn", selective_search, "require_opencv", "[selective-search]"),
    ("fast-rcnn-svm", svm, "require_solver", "'.[svm]'")])
def test_optional_packages_of_later_stages_are_missed_at_once(tmp_path, monkeypatch, scheme, module, name, remedy):
    def missing():
        raise UsageError(f"install it with pip install -e {remedy}")

    if scheme == "fast-rcnn-svm":
        monkeypatch.setattr(selective_search, "require_opencv", lambda: None)
    monkeypatch.setattr(module, name, missing)
    recipe = write_recipe(tmp_path / "tiny.toml")
    run = Run(tmp_path / "tiny", read_recipe(str(recipe), (), scheme), Runtime(device="cpu"))
    assert remedy in refusal(run, UsageError)


def test_the_solver_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.svm", None)
    with pytest.raises(UsageError, match=r"install it with pip install -e '\.\[svm\]'$"):
        svm.require_solver()


def test_both_splits_are_looked_at(tmp_path, plenty):
    run = voc_run(tmp_path)
    assert "the data root" in refusal(run, DataError)
    voc(tmp_path / "mine", test=False)
    assert "5.xml" in refusal(voc_run(tmp_path), DataError)
    write(tmp_path / "mine/Annotations/5.xml", xml())
    assert prepare(voc_run(tmp_path))


def test_what_only_the_score_needs_is_a_caution_until_then(tmp_path, plenty):
    voc(tmp_path / "mine")
    (tmp_path / "mine/ImageSets/Main/test.txt").unlink()
    run = voc_run(tmp_path)
    assert prepare(run, until="M1") == ["M0", "M1"]
    [text] = [text for text in cautions(run) if text.startswith("for later stages: ")]
    assert "test.txt" in text
    assert "test" in refusal(voc_run(tmp_path), DataError)


def test_a_stage_looks_at_what_it_reads(copied, plenty, monkeypatch):
    run = open_tiny(copied, device="cuda:77")
    with pytest.raises(UsageError, match="no such device"):
        prepared_alone(run, find_step(run.recipe.steps, "M1"), (), force=True)


@pytest.mark.parametrize(("content", "words"), [
    (None, "given for M0, is not a file"), (b"no weights", "is corrupt or not a checkpoint"),
    ("alexnet", "holds alexnet"), ("shape", "has no conv.conv1.0.weight of shape"),
    ("other", "has no conv.conv1.0.weight")])
def test_a_file_for_m0_is_the_right_network_before_anything_else(tmp_path, finished, content, words):
    file = tmp_path / "mine.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "other":
        file = tmp_path / "mine.pth"
        torch.save({"features.3.weight": torch.zeros(1)}, file)
    elif content:
        name = "small" if content == "shape" else content
        save_checkpoint(file, {"conv.conv1.0.weight": torch.zeros(1)}, {"network": {"name": name}, "classes": []})
    run = voc_run(tmp_path)  # whose data root is not there
    assert words in refusal(run, ArtifactError, f"M0={file}")
    run = open_tiny(tmp_path / "tiny")
    assert prepare(run, f"M0={finished / 'M0.safetensors'}")[0] == "M1"
    assert artifacts(run.folder) == ["M0.json", "M0.safetensors"]


def test_m0_is_not_made_before_the_look(tmp_path, finished, plenty):
    """Behind a given M1 it is still needed, and is made with the rest."""
    run = voc_run(tmp_path)
    assert "the data root" in refusal(run, DataError, f"M1={finished / 'M1.safetensors'}")
    assert prepare(open_tiny(tmp_path / "other"), f"M1={finished / 'M1.safetensors'}")[:2] == ["M0", "P1"]


@pytest.mark.parametrize(("sets", "words"), [
    (["train_rpn.iterations=0"], "train_rpn.iterations is 0: M1 does not learn"),
    (["train_rpn.lr_steps=[2,4]"], "train_rpn.lr_steps 4: never reached in 4 iterations"),
    (["train_rpn.warmup=4"], "train_rpn.warmup of 4 iterations does not end in 4"),
    (["train_rpn.images_per_batch=13"], "images_per_batch is 13, and there are 12 images"),
])
def test_schedules_that_look_wrong_are_said(tmp_path, plenty, sets, words):
    run = open_tiny(tmp_path / "tiny", *sets)
    assert prepare(run)
    [text] = cautions(run)
    assert words in text


def test_a_schedule_of_one_cycle_has_no_steps(tmp_path, plenty):
    run = open_tiny(tmp_path / "tiny", "train_rpn.schedule=one-cycle", "train_rpn.lr_steps=[9]", "train_rpn.warmup=3")
    prepare(run)
    assert cautions(run) == []


def test_a_store_that_does_not_pay_is_said_where_it_is_asked_for(tmp_path, plenty):
    sets = ["train_rpn_frozen_conv.images_per_batch=1", "train_fast_rcnn_frozen_conv.images_per_batch=3"]
    run = open_tiny(tmp_path / "tiny", *sets, feature_store="on")
    prepare(run)
    [text] = cautions(run)
    assert text == "--feature-store on: M3 sees only part of 12 images in 4 visits, a store does not pay"


def test_a_disk_that_cannot_hold_the_outputs(tmp_path, plenty, monkeypatch):
    run = open_tiny(tmp_path / "tiny")
    sizes = part_bytes(run.recipe.network, CLASSES)
    # M0 has conv; M1 and M3, which keep what M0 and M2 have, rpn besides; M5 all.
    least = [sizes["conv"], sizes["conv"] + sizes["rpn"], sum(sizes.values()) - sizes["rpn"], sum(sizes.values()),
             sum(sizes.values()) - sizes["rpn"], sum(sizes.values())]
    with_room(monkeypatch, sum(least) - 1)
    message = refusal(run, ResourceError)
    assert message.startswith(f"{run.folder} needs at least {sum(least) / 1e6:.0f} MB for the outputs up to M5, and")
    with_room(monkeypatch, sum(least))
    run = open_tiny(tmp_path / "tiny")
    assert prepare(run)
    [text] = cautions(run)
    assert "may take up to" in text
    assert "snapshots included" in text


def test_outputs_are_as_large_as_was_said(copied, plenty):
    run = open_tiny(copied, "train_rpn.lr=0.5", "pretrain_on_crops.lr=0.5")
    rooms = {room.output: room for room in preflight._rooms(run, [*run.recipe.steps, *run.recipe.detections])}
    for name in ("M0", "M1", "M2", "M3", "M4", "M5"):
        size = run.path(name).stat().st_size
        assert rooms[name].old == size
        assert 0 <= size - rooms[name].least < 5000  # the header
    for name in ("P1", "P2"):
        assert run.path(name).stat().st_size < rooms[name].most + 100_000  # what HDF5 takes


def test_a_memory_that_cannot_hold_the_weights(tmp_path, monkeypatch):
    run = open_tiny(tmp_path / "tiny")
    looked = footprint(run.recipe.config(run.recipe.steps[3]), run.recipe.network, CLASSES, [(96, 80, 6)])
    monkeypatch.setattr(preflight, "memory_left", lambda: Memory(looked.least - 2, 1))
    message = refusal(run, ResourceError)
    assert message.startswith("M2 (train_fast_rcnn) needs ")
    assert "end other programs" in message
    monkeypatch.setattr(preflight, "memory_left", lambda: Memory(looked.least - 1, 1))
    run = open_tiny(tmp_path / "tiny")
    assert prepare(run)
    [text] = cautions(run)
    assert "may take" in text
    assert "lower images_per_batch" in text


def test_a_system_that_does_not_say_its_memory_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_left", lambda: None)
    assert prepare(open_tiny(tmp_path / "tiny"))


def test_a_comparison_is_looked_at_as_a_whole(tmp_path, plenty, monkeypatch):
    """The last variant's fault ends it before the first has begun."""
    write_recipe(tmp_path / "tiny.toml")
    variants = [Variant("good", "alternating"), Variant("bad", "approximate-joint", ("data.format=voc",))]
    wanted = Comparison(tmp_path / "all", str(tmp_path / "tiny.toml"), variants, [1], data_root=tmp_path / "none")
    with pytest.raises(DataError, match="the data root"):
        list(outcomes(wanted, Runtime(device="cpu"), lambda run: pytest.fail("a run has begun")))
    assert not (tmp_path / "all").exists()
    with pytest.raises(ArtifactError, match="is not a file"):
        list(outcomes(Comparison(tmp_path / "all", str(tmp_path / "tiny.toml"), variants[:1], [1],
                                 given=[f"M0={tmp_path / 'none.pth'}"]), Runtime(device="cpu"), lambda run: None))


def test_what_is_the_same_data_is_looked_at_once(tmp_path, plenty, monkeypatch):
    from stages.pipeline import run as run_module

    seen = []
    look = run_module.look_at_split

    def noted(recipe, split, root):
        seen.append(split)
        return look(recipe, split, root)

    monkeypatch.setattr(run_module, "look_at_split", noted)
    runs = [open_tiny(tmp_path / name / "tiny", recipe=write_recipe(tmp_path / "tiny.toml")) for name in "ab"]
    look_ahead([(run, [*run.recipe.steps, *run.recipe.detections]) for run in runs])
    assert seen == ["train", "test"]


@pytest.mark.parametrize("commands", [["run-all"], ["compare", "--schemes", "alternating"], ["stage", "0"]])
def test_commands_end_with_one_line_and_nothing_made(altopt, workplace, commands):
    answer = altopt(*commands, "--recipe", "tiny.toml", "--device", "cuda:77")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("altopt: --device cuda:77")
    assert not (workplace / "runs").exists()


def test_plan_says_what_it_did_not_look_at(altopt, copied):
    answer = altopt("plan", "--run", "tiny", "--set", "train_rpn.lr=0.5")
    assert answer.out.splitlines()[-1].startswith("not looked at here: each image and object (altopt check-data")
    assert "not looked at" not in altopt("plan", "--run", "tiny").out  # nothing will run
    assert "not looked at" not in altopt("status", "--run", "tiny", "--set", "train_rpn.lr=0.5").out
    assert json.loads(altopt("plan", "--run", "tiny", "--json").out)


