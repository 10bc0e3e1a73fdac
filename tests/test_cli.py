import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from own_photographs import photographs
from tiny_runs import ARTIFACTS, TINY, hashes, write_recipe

import cli
from stages import ALTERNATING

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(name for name, command in cli.main.commands.items() if not command.hidden)
HOLD = """
import sys, pathlib
from cache.lock import run_lock
with run_lock(pathlib.Path("runs/tiny")):
    print("held", flush=True)
    sys.stdin.read()
"""
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def one_line(answer):
    """The only line on stderr, which begins with the program's name; nothing is on stdout."""
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("altopt: ")
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(altopt, name):
    answer = altopt(name, "--help")
    assert (answer.code, answer.err) == (0, "")
    paragraphs = answer.out.split("\n\n")
    assert len(paragraphs[1].split()) > 4
    examples = [line.strip() for line in answer.out.splitlines() if line.startswith(f"  altopt {name}")]
    assert examples


def example_words():
    for command in cli.main.commands.values():
        for line in (command.help or "").splitlines():
            if line.strip().startswith("altopt "):
                words = shlex.split(line.strip().split("  ")[0].split(" > ")[0])
                yield pytest.param(words[1:], id=" ".join(words))


@pytest.mark.parametrize("words", list(example_words()))
def test_examples_are_understood(words):
    """Parsed, not run."""
    context, rest = click.Context(cli.main), list(words)
    command: click.Command | None = cli.main
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(context, rest)
        context = click.Context(command, parent=context)
    if rest == ["--help"]:
        return
    options, _, _ = command.make_parser(context).parse_args(args=list(rest))
    given = {word for word in rest if word.startswith("--")}
    assert len(options) == len(given) + sum(isinstance(each, click.Argument) for each in command.params)


def test_help_of_the_program_lists_exit_codes_and_commands(altopt):
    answer = altopt("--help")
    assert answer.code == 0
    for code in ("0 done", "1 a bug", "2 usage", "3 data set", "4 artifact", "5 training diverged", "6 disk",
                 "7 download", "75 the run folder", "130 Ctrl-C", "143 SIGTERM"):
        assert code in answer.out
    assert sorted(name for names in cli.GROUPS.values() for name in names) == COMMANDS
    assert all(f"  {name} " in answer.out for name in COMMANDS)
    places = [answer.out.index(f"{group.capitalize()}:") for group in ("train", "look", "use", "data", "keep")]
    assert places == sorted(places)
    assert altopt("-h").out == answer.out


def test_version(altopt):
    assert altopt("--version").out.startswith("altopt")


@pytest.mark.parametrize(("word", "output"), [("1", "M1"), ("M1", "M1"), ("train_rpn", "M1"), ("7", "M5")])
def test_help_of_a_stage_shows_inputs_output_and_settings(altopt, word, output):
    step = next(step for step in ALTERNATING if step.output == output)
    text = altopt("stage", word, "--help").out
    assert f"Inputs: {', '.join(step.inputs)}" in text
    assert f"Output: {output}" in text
    assert ("--set train_rpn.FIELD=VALUE" in text) == (output == "M1")
    assert ("lr = 0.1  (on val:200" in text) == (output == "M1")
    assert ("; default 0.001 (py-faster-rcnn" in text) == (output == "M1")


@pytest.mark.parametrize(("words", "expected"), [
    (["M1", "--scheme", "spp-net"], ("Fine-tune fc6", "Inputs: M0, F1, P0", "levels = [6, 3, 2, 1]")),
    (["5", "--scheme=rcnn", "--device", "cpu"], ("Inputs: F1", "Output: R1", "--set train_regressors.")),
    (["M1", "--recipe", "voc07-alexnet"], ('freeze = ["conv1"]  (Fast R-CNN, section 4.5',)),
    (["1", "--run", "tiny"], ("lr = 0.001  (low)", "iterations = 4  (few); default 80000 (py-faster-rcnn")),
    (["3", "--run", "tiny", "--set", "train_fast_rcnn.init=M1"], ("Inputs: M1, P1", "init = \"M1\"  (--set); default")),
])
def test_help_of_a_stage_is_that_of_the_run(altopt, copied, words, expected):
    answer = altopt("stage", *words, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert [each for each in expected if each not in answer.out] == []


def test_help_of_stages_lists_those_of_the_run(altopt):
    text = altopt("stage", "--scheme", "rcnn", "--help").out
    assert "5  R1: Train a linear regression" in text
    assert "6  " not in text
    assert altopt("stage", "--scheme", "rcnn").code == 2


def test_help_of_a_stage_that_the_scheme_does_not_have(altopt):
    answer = altopt("stage", "M3", "--scheme", "spp-net", "--help")
    assert (answer.code, answer.out) == (2, "")
    assert "there is no stage 'M3'" in answer.err


def test_words_of_the_version_before_are_understood_and_not_shown(altopt, copied):
    assert altopt("beside", "--help").out == altopt("compare-published", "--help").out
    answer = altopt("proposals", "import", copied / "P1.h5", "--as", "P1", "--run", "tiny", "--frame", "xyxy", "--json")
    assert json.loads(answer.out)["box_format"] == "xyxy"
    shown = altopt("--help").out + altopt("proposals", "import", "--help").out + altopt("probe", "--help").out
    assert not any(word in shown for word in ("  beside", "--frame", "--pictures"))
    assert "'--images'" in altopt("probe", "--run", "tiny", "--pictures", "0").err


def test_help_of_stages_lists_all_eight(altopt):
    text = altopt("stage", "--help").out
    assert all(f"  {number}  {output}:" in text for number, output in enumerate(
        ("M0", "M1", "P1", "M2", "M3", "P2", "M4", "M5")))


@pytest.mark.parametrize(("arguments", "words"), [
    (["pln"], "Did you mean 'plan'?"),
    (["evalute"], "Did you mean 'evaluate'?"),
    (["proposals", "selectiv-search"], "Did you mean 'selective-search'?"),
    (["xyz"], "No such command 'xyz'."),
    (["stage", "trian_rpn"], "did you mean 'train_rpn'?"),
    (["stage", "9"], "give 1 to 7"),
    (["plan", "--recipe", "shaps"], "did you mean 'shapes'?"),
    (["plan", "--set", "train_rpn.lrr=1"], "did you mean 'lr'?"),
    (["plan", "--set", "train_rpn.lr=fast"], "train_rpn.lr must be a number (it is 'fast')"),
    (["plan", "--set", "train_rpn.lr=-1"], "train_rpn.lr must be above 0 (it is -1.0)"),
    (["plan", "--sett", "x"], "Did you mean '--set'?"),
    (["evaluate", "M3"], "choose M5 (shared) or M1+M2 (unshared)"),
    (["evaluate", "--protocol", "voc08"], "voc07"),
    (["run-all", "--recipe", "tiny.toml", "--from", "M5"], "--from M5"),
    (["stage", "3", "--recipe", "tiny.toml", "--from", "M4"], "--from M4"),
    (["run-all", "--recipe", "tiny.toml", "--until", "M9"], "no stage 'M9'"),
    (["run-all", "--recipe", "tiny.toml", "--workers", "-1"], "--workers"),
    (["run-all", "--recipe", "tiny.toml", "--snapshot-seconds", "nan"], "nan is not a number of seconds"),
    (["run-all", "--recipe", "tiny.toml", "--run", ""], "'' does not name a folder in runs"),
    (["plan", "--recipe", "tiny.toml", "--run", "../x"], "'../x' does not name a folder in runs"),
    (["plan", "--recipe", "tiny.toml", "--run", "/etc"], "'/etc' does not name a folder in runs"),
    (["plan", "--recipe", "tiny.toml", "--run", "a\nb"], "'a\\nb' does not name a folder in runs"),
    (["plan", "--recipe", "tiny.toml", "--run", "x" * 256], "is too long for a folder"),
    (["compare", "--recipe", "tiny.toml", "--run", "../x"], "'../x' does not name a folder in runs"),
    (["plan", "--recipe", "tiny.toml", "--set", 'data.test=["test:0"]'], '"test:0" is not a split of shapes'),
    (["plan", "--recipe", "tiny.toml", "--set", 'data.classes=["a"]'], "leave the list of classes empty"),
    (["stage", "2", "--recipe", "tiny.toml", "--init", "M0"], "generate_proposals has no field 'init'"),
    (["stage", "3", "--recipe", "tiny.toml", "--init", "M9"], "must be M0 or M1 (the networks made before M2)"),
    (["stage", "1", "--recipe", "tiny.toml", "--device", "cuda:99"], "--device cuda:99"),
    (["stage", "1", "--recipe", "tiny.toml", "--device", "quantum"], "--device quantum"),
    (["recall", "M1", "--recipe", "tiny.toml"], "choose P1 or P2"),
    (["recipe", "shaps"], "did you mean 'shapes'?"),
])
def test_what_is_not_understood_exits_with_2(altopt, copied, arguments, words):
    for name in ("M1", "D5"):
        (copied / f"{name}.json").unlink()
    answer = altopt(*arguments)
    assert answer.code == 2
    assert words in " ".join(answer.err.split())
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_run_all_makes_everything_then_nothing(altopt, workplace, finished):
    answer = altopt("run-all", "--recipe", "tiny.toml", "--workers", "0")
    assert answer.code == 0
    assert hashes(workplace / "runs" / "tiny") == hashes(finished)
    assert "M5 (shared)" in answer.out
    assert "M2 (4 of 8) train_fast_rcnn from M0, P1: not made yet" in answer.err
    assert "train_fast_rcnn from" not in answer.out
    assert "nothing to do" not in answer.err
    before = {path.name: path.stat().st_mtime_ns for path in Path("runs/tiny").glob("[MPD]*")}
    again = altopt("run-all", "--run", "tiny", "--json")
    assert (again.code, again.err) == (0, "runs/tiny is up to date: nothing to do\n")
    assert json.loads(again.out)["folder"] == "runs/tiny"
    assert {path.name: path.stat().st_mtime_ns for path in Path("runs/tiny").glob("[MPD]*")} == before


def test_a_file_in_the_place_of_the_feature_folder(altopt, copied):
    shutil.rmtree(copied / "features", ignore_errors=True)
    (copied / "features").touch()
    answer = altopt("stage", "M4", "--force", "--feature-store", "on", "--recipe", "tiny.toml")
    assert answer.code == 4
    assert "features" in answer.err
    assert "Traceback" not in answer.err


def test_a_test_split_that_is_not_there_is_missed_before_the_first_stage(altopt, workplace):
    photographs(workplace / "VOC2007", trainval="ab")
    answer = altopt("run-all", "--recipe", "tiny.toml", "--data-root", ".", "--set", "data.format=voc",
                    "--set", 'data.train=["VOC2007/trainval"]', "--set", 'data.test=["VOC2007/test"]')
    assert answer.code == 3
    assert "test.txt" in answer.err
    assert not list((workplace / "runs" / "tiny").glob("M*"))


def test_run_all_until(altopt, workplace):
    answer = altopt("run-all", "--recipe", "tiny.toml", "--until", "train_rpn")
    assert (answer.code, answer.out) == (0, "")
    assert sorted(path.name for path in Path("runs/tiny").glob("[MP]*.*")) == [
        "M0.json", "M0.safetensors", "M1.json", "M1.safetensors"]
    again = altopt("run-all", "--run", "tiny", "--until", "M1")
    assert (again.code, again.err) == (0, "runs/tiny is up to date: nothing to do\n")


def test_run_all_from(altopt, copied, finished):
    for name in ("M0", "M1", "P1", "M3", "P2", "M4", "M5"):
        for path in copied.glob(f"{name}.*"):
            path.unlink()
    answer = altopt("run-all", "--run", "tiny", "--from", "M2", "--json")
    assert answer.code == 0
    assert hashes(copied, "M2", "M3", "P2", "M4", "M5") == hashes(finished, "M2", "M3", "P2", "M4", "M5")
    result = json.loads(answer.out)
    assert [each["name"] for each in result["scores"]] == ["M5 (shared)"]
    assert list(result["recall"]) == ["P2"]


@pytest.mark.parametrize("word", ["3", "M2", "train-fast-rcnn"])
def test_stage_from(altopt, copied, finished, word):
    for path in [*copied.glob("[MP][23].*"), *copied.glob("P1.*")]:
        path.unlink()
    answer = altopt("stage", word, "--run", "tiny", "--from", "M1")
    assert (answer.code, answer.out) == (0, "")
    assert hashes(copied, "P1", "M2") == hashes(finished, "P1", "M2")
    assert not (copied / "M3.safetensors").exists()


def test_stage_from_several_files(altopt, workplace, finished):
    words = [word for name in ("P1", "M0") for word in ("--from", f"{name}={next(finished.glob(name + '.[sh]*'))}")]
    answer = altopt("stage", "3", "--recipe", "tiny.toml", *words)
    assert (answer.code, answer.out) == (0, "")
    made = workplace / "runs" / "tiny"
    assert hashes(made, "M0", "P1", "M2") == hashes(finished, "M0", "P1", "M2")
    assert not (made / "M1.safetensors").exists()


def test_run_all_from_several(altopt, copied, finished):
    answer = altopt("run-all", "--run", "tiny", "--from", "M2", "--from", "M0", "--until", "M3")
    assert (answer.code, answer.out) == (0, "")
    assert [json.loads((copied / f"{name}.json").read_text())["given"] for name in ("M0", "M2", "M3")] == [None] * 3
    answer = altopt("run-all", "--run", "tiny", "--from", "M2", "--from", "M3", "--until", "M3")
    assert answer.code == 2
    assert "--from M3 comes after what is asked for (M3)" in answer.err


def test_stage_in_a_fixed_order(altopt, copied, finished):
    answer = altopt("stage", "3", "--run", "tiny", "--deterministic", "--force")
    assert (answer.code, answer.out) == (0, "")
    assert hashes(copied, "M2") == hashes(finished, "M2")
    assert json.loads((copied / "M2.json").read_text())["metrics"]["deterministic"] is True
    again = altopt("stage", "3", "--run", "tiny")
    assert (again.code, again.err) == (0, "M2 is up to date: nothing to do\n")


def test_stage_with_init_keeps_it_in_the_recipe(altopt, copied):
    answer = altopt("stage", "3", "--run", "tiny", "--init", "m1")
    assert answer.code == 0
    assert "starts from M1 instead of M0 (init)" in answer.err
    assert json.loads((copied / "M2.json").read_text())["config"]["init"] == "M1"
    steps = {each["output"]: each for each in json.loads(altopt("status", "--run", "tiny", "--json").out)["steps"]}
    assert steps["M2"]["verdict"] == "done"
    assert steps["M3"]["verdict"] == "stale"
    assert altopt("stage", "3", "--run", "tiny", "--set", "train_fast_rcnn.init=").code == 0
    assert json.loads((copied / "M2.json").read_text())["config"]["init"] == ""


def test_stage_that_is_up_to_date_says_so_unless_forced(altopt, copied):
    answer = altopt("stage", "M5", "--run", "tiny")
    assert (answer.code, answer.out, answer.err) == (0, "", "M5 is up to date: nothing to do\n")
    answer = altopt("stage", "M5", "--run", "tiny", "--force")
    assert (answer.code, answer.out) == (0, "")
    assert "asked for with --force" in answer.err


def test_plan_and_status(altopt, copied):
    answer = altopt("plan", "--run", "tiny", "--set", "train_rpn.lr=0.5")
    assert (answer.code, answer.err) == (0, "")
    assert "lr was 0.001, is 0.5" in answer.out
    answer = altopt("plan", "--run", "tiny", "--json", "--set", "train_rpn.lr=0.5")
    result = json.loads(answer.out)
    assert [each["output"] for each in result["steps"]] == list(ARTIFACTS)
    assert [each["verdict"] for each in result["steps"]] == ["done", "stale"] + ["waits"] * 6
    assert result["steps"][1]["reasons"] == ["lr was 0.001, is 0.5"]
    assert [each["verdict"] for each in json.loads(altopt("status", "--run", "tiny", "--json").out)["steps"]] == [
        "done"] * 8
    assert "lr = 0.001" in (copied / "recipe.toml").read_text()


@pytest.mark.parametrize("arguments", [["plan"], ["status"], ["recipes"], ["recipe", "shapes"], ["plan", "--help"]])
def test_commands_that_only_look_leave_nothing(altopt, workplace, arguments):
    assert altopt(*arguments).code == 0
    assert [path.name for path in workplace.iterdir()] == ["tiny.toml"]


def test_recipes_and_recipe(altopt, workplace):
    names = json.loads(altopt("recipes", "--json").out)
    assert "shapes" in names
    assert all(name in altopt("recipes").out for name in names)
    text = altopt("recipe", "tiny.toml", "--set", "train_rpn.lr=0.5").out
    assert "lr = 0.5  " in text
    write_recipe(workplace / "mine.toml", text)
    assert altopt("recipe", "mine.toml").out == text
    result = json.loads(altopt("recipe", "tiny.toml", "--json").out)
    assert result["train_rpn"]["lr"] == {"value": 0.001, "source": "low"}


def test_evaluate(altopt, copied):
    answer = altopt("evaluate", "--run", "tiny")
    assert (answer.code, answer.err) == (0, "")
    assert "circle" in answer.out
    assert "mean" in answer.out
    result = json.loads(altopt("evaluate", "M1+M2", "--run", "tiny", "--json").out)
    assert (result["name"], result["protocol"]) == ("M1+M2 (unshared)", "voc07")
    assert json.loads(altopt("evaluate", "M5", "--run", "tiny", "--protocol", "coco", "--json").out)["numbers"]


def test_evaluate_what_was_never_made(altopt, workplace):
    answer = altopt("evaluate", "--recipe", "tiny.toml")
    assert answer.code == 4
    assert "M5 is not in runs/tiny: make it with altopt stage M5, or run-all" in one_line(answer)
    assert not (workplace / "runs").exists()


def test_recall(altopt, copied):
    answer = altopt("recall", "p1", "--run", "tiny", "--limit", "7", "--limit", "30")
    assert (answer.code, answer.err) == (0, "")
    assert "P1.h5" in answer.out
    result = json.loads(altopt("recall", "--run", "tiny", "--json", "--limit", "7").out)
    assert list(result["limits"]) == ["7"]


def truth_and_detections(folder, boxes):
    """One image with one object, and detections of it."""
    truth = {"images": [{"id": 1, "width": 100, "height": 100}], "categories": [{"id": 1, "name": "dog"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600,
                              "iscrowd": 0}]}
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("protocol", ["voc07", "voc10", "coco"])
@pytest.mark.parametrize(("box", "expected"), [([10, 10, 40, 40], 1.0), ([60, 60, 20, 20], 0.0)])
def test_score(altopt, workplace, protocol, box, expected):
    truth_and_detections(workplace, [box])
    answer = altopt("score", "truth.json", "found.json", "--protocol", protocol, "--json")
    assert json.loads(answer.out)["map"] == pytest.approx(expected)
    answer = altopt("score", "truth.json", "found.json", "--protocol", protocol)
    assert (answer.code, answer.err) == (0, "")
    assert any(line.split() == ["dog", f"{expected:.3f}"] for line in answer.out.splitlines())


def test_score_at_the_threshold(altopt, workplace):
    truth_and_detections(workplace, [[10, 10, 40, 20]])
    command = ["score", "truth.json", "found.json", "--protocol", "voc10", "--json"]
    assert json.loads(altopt(*command).out)["map"] == 0
    assert json.loads(altopt(*command, "--match", "ge").out)["map"] == 1
    assert json.loads(altopt(*command, "--iou", "0.4").out)["map"] == 1


def test_score_of_nonsense(altopt, workplace):
    (workplace / "truth.json").write_text("{")
    answer = altopt("score", "truth.json", "truth.json", "--protocol", "voc07")
    assert answer.code in (3, 4)
    assert "is not JSON" in one_line(answer)
    assert altopt("score", "none.json", "truth.json", "--protocol", "voc07").code == 2
    truth_and_detections(workplace, [])
    assert altopt("score", "truth.json", "found.json", "--protocol", "coco", "--iou", "0.7").code == 2


def add_voc_image(folder, id, box):
    from PIL import Image

    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (96, 80), "red").save(folder / "JPEGImages" / f"{id}.jpg")
    thing = f"<object><name>dog</name>{BOX.format(*box)}</object>"
    size = "<size><width>96</width><height>80</height></size>"
    (folder / "Annotations" / f"{id}.xml").write_text(f"<annotation>{size}{thing}</annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"{id}\n")


def voc_recipe(folder):
    data = '[data]\nformat = "voc" # x\ntrain = ["2007_train"] # x\ntest = ["2007_train"] # x\nclasses = ["dog"] # x\n'
    head, _, rest = TINY.partition("[data]")
    return write_recipe(folder / "voc.toml", f"{head}{data}\n[all]{rest.partition('[all]')[2]}")


def test_broken_annotation_exits_with_3(altopt, workplace):
    add_voc_image(workplace / "data" / "VOCdevkit" / "VOC2007", "000001", (50, 10, 20, 30))
    voc_recipe(workplace)
    answer = altopt("run-all", "--recipe", "voc.toml", "--data-root", "data")
    assert answer.code == 3
    last = answer.err.splitlines()[-1]
    assert last.startswith("altopt: ")
    assert "000001.xml" in last
    assert not list(Path("runs/voc").glob("M0*"))


def test_sound_annotation_is_trained_on(altopt, workplace):
    """The same data set with its annotation mended; its test split is the same image."""
    add_voc_image(workplace / "data" / "VOCdevkit" / "VOC2007", "000001", (20, 10, 60, 50))
    voc_recipe(workplace)
    assert altopt("stage", "0", "--recipe", "voc.toml", "--data-root", "data").code == 0
    add_voc_image(workplace / "data" / "VOCdevkit" / "VOC2007", "000001", (20, 10, 60, 51))
    answer = altopt("plan", "--run", "voc", "--data-root", "data", "--json")
    assert "the images or annotations changed" in json.loads(answer.out)["steps"][0]["reasons"][0]


def test_missing_data_set_exits_with_3(altopt, workplace):
    voc_recipe(workplace)
    answer = altopt("run-all", "--recipe", "voc.toml", "--data-root", "nowhere")
    assert answer.code == 3
    assert "nowhere is not a folder" in answer.err.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "words"), [
    (["stage", "3"], "M2 needs M0, and M0 is missing (not made yet): make it with altopt stage M0"),
    (["stage", "3", "--from", "M1"], "M1.safetensors is not in runs/tiny: give a file with --from M1=FILE"),
    (["run-all", "--from", "M2=none.safetensors"], "none.safetensors, given for M2, is not a file"),
    (["run-all", "--from", "M0=tiny.toml"], "tiny.toml"),
    (["recall"], "P1.h5 is not in runs/tiny"),
])
def test_missing_or_foreign_artifact_exits_with_4(altopt, workplace, arguments, words):
    answer = altopt(*arguments, "--recipe", "tiny.toml")
    assert answer.code == 4
    assert words in one_line(answer)


def test_stage_alone_refuses_stale_inputs(altopt, copied):
    answer = altopt("stage", "3", "--run", "tiny", "--set", "generate_proposals.nms=0.5")
    assert answer.code == 4
    line = one_line(answer)
    assert "M2 needs P1, and P1 is stale (nms was 0.7, is 0.5)" in line
    assert "make it with altopt stage P1, or take it as it is with --from P1" in line


def test_divergence_exits_with_5_and_keeps_the_batch(altopt, copied):
    from cache.checkpoints import load_checkpoint

    answer = altopt("stage", "1", "--run", "tiny", "--set", "train_rpn.lr=1e30")
    assert (answer.code, answer.out) == (5, "")
    last = answer.err.splitlines()[-1]
    assert last.startswith("altopt: ")
    assert "lower the learning rate (1e+30)" in last
    assert "its pixels are in M1.diverged.safetensors" in last
    tensors, description = load_checkpoint(copied / "M1.diverged.safetensors")
    assert tensors["images"].shape == (2, 3, 80, 96)
    assert len(description["images"]) == 2
    for image in description["images"]:
        assert image.replace(" mirrored", "") in last
    assert f"iteration {description['iteration'] + 1}:" in last
    assert altopt("stage", "1", "--run", "tiny", "--set", "train_rpn.lr=0.001").code == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_lack_of_memory_exits_with_6(altopt, copied, monkeypatch, error):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("altopt.training.loop.make_batch", fail)
    answer = altopt("stage", "1", "--run", "tiny", "--force")
    assert answer.code == 6
    assert "lower images_per_batch or short_side" in answer.err.splitlines()[-1]


def test_other_errors_are_bugs_and_keep_their_traceback(altopt, copied, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("altopt.training.loop.make_batch", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        altopt("stage", "1", "--run", "tiny", "--force")


def test_full_disk_exits_with_6(altopt, copied, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cache.files.os.fsync", fail)
    answer = altopt("stage", "7", "--run", "tiny", "--force")
    assert answer.code == 6
    assert "M5.safetensors cannot be written: the disk is full" in answer.err.splitlines()[-1]
    assert not list(copied.glob(".*partial"))


def test_download_that_fails_exits_with_7(altopt, workplace, monkeypatch):
    url = "http://127.0.0.1:9/squeezenet1_1-b8a52dc0.pth"
    monkeypatch.setattr("altopt.models.imagenet.imagenet_url", lambda name: url)
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    write_recipe(workplace / "squeeze.toml", TINY.partition("[pretrain_on_crops]")[0].replace(
        '"small"', '"squeezenet1_1"'))
    answer = altopt("stage", "0", "--recipe", "squeeze.toml")
    assert answer.code == 7
    last = answer.err.splitlines()[-1]
    assert url in last
    assert "--from M0=FILE" in last
    assert not list(Path("runs/squeeze").glob("M0*"))


@pytest.fixture
def holder(copied):
    """Another process that works in runs/tiny."""
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=copied.parents[1], env={"PYTHONPATH": str(ROOT)},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("arguments", [["run-all"], ["stage", "1"], ["stage", "3", "--from", "M1"], ["evaluate"]])
def test_busy_folder_exits_with_75_and_stays_as_it_is(altopt, copied, holder, arguments):
    before = (copied / "recipe.toml").read_text()
    answer = altopt(*arguments, "--run", "tiny", "--set", "train_rpn.lr=0.5")
    assert answer.code == 75
    assert f"runs/tiny is busy: process {holder.pid} on " in one_line(answer)
    assert (copied / "recipe.toml").read_text() == before


def test_looking_into_a_busy_folder(altopt, copied, holder):
    for command in (["plan"], ["status"], ["recall", "P1"]):
        assert altopt(*command, "--run", "tiny").code == 0


@pytest.mark.parametrize(("number", "code", "words"), [
    (signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "stopped by SIGTERM")])
@pytest.mark.parametrize("event", ["progress", "images"])
def test_signals_exit_with_their_code_and_work_goes_on(altopt, copied, finished, monkeypatch, number, code, words,
                                                       event):
    from stages.console.progress import Reporter

    original = Reporter.__call__

    def report(reporter, each):
        original(reporter, each)
        if each.kind == event:
            signal.raise_signal(number)

    (copied / "M3.safetensors").unlink()
    (copied / "P2.h5").unlink()
    command = ["run-all", "--run", "tiny", "--log-every", "1", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "__call__", report)
        answer = altopt(*command)
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.splitlines()[-1] == f"altopt: {words}; run the same command again to go on"
    answer = altopt(*command)
    assert answer.code == 0
    assert ("goes on after iteration 1" in answer.err) == (event == "progress")
    assert hashes(copied) == hashes(finished)


def test_json_is_pure_while_work_is_done(altopt, copied):
    for name in ("M3.safetensors", "P2.h5", "D5.json"):
        (copied / name).unlink()
    answer = altopt("run-all", "--run", "tiny", "--json", "--log-every", "1")
    assert json.loads(answer.out)["recipe"] == "tiny"
    for artifact in ("M3", "P2", "D5"):
        assert f"{artifact}: done in" in answer.err


def test_program_in_a_process_of_its_own(copied):
    """The real entry: exit code, and stdout closed by who reads it."""
    command = [sys.executable, "-c", "import cli; cli.run()", "plan", "--run"]
    run = {"cwd": copied.parents[1], "env": {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "tiny"], check=False, **run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train_fast_rcnn_frozen_conv" in done.stdout
    done = subprocess.run([*command, "tiny", "--recipe", "shaps"], check=False, **run)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    shell = f"{shlex.join([*command, 'tiny', '--json'])} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], check=False, **run)
    assert done.returncode == 141
    assert done.stderr == ""


def test_an_archive_that_is_not_voc_2007(altopt, tmp_path):
    (tmp_path / "other.tar").write_bytes(b"something else")
    answer = altopt("fetch", "voc07", "--data-root", str(tmp_path / "data"), "--archive", str(tmp_path / "other.tar"))
    assert answer.code == 3
    assert "other.tar" in answer.err
    assert answer.err.count("\n") == 1


def test_fetching_from_mirrors_that_are_not_there(altopt, tmp_path, monkeypatch):
    from altopt.datasets import voc_archives

    archives = tuple(dataclasses.replace(each, urls=("http://127.0.0.1:9/x.tar",)) for each in voc_archives.VOC07)
    monkeypatch.setitem(voc_archives.DATA_SETS, "voc07", archives)
    answer = altopt("fetch", "voc07", "--data-root", str(tmp_path))
    assert answer.code == 7
    for word in ("VOCtrainval_06-Nov-2007.tar", "--archive", "127.0.0.1"):
        assert word in answer.err


@pytest.mark.parametrize("command", [("fetch", "voc07"), ("fetch-voc07",)])
def test_fetching_ends_with_the_folder(altopt, monkeypatch, command):
    from altopt.datasets import voc_archives

    def obtain(root, *, archives, archive_files, mirrors, progress):
        assert archives is voc_archives.VOC07
        progress(1, 2)
        progress(2, 2)
        return root / "VOCdevkit" / "VOC2007" / str(mirrors[0])

    monkeypatch.setattr(voc_archives, "obtain", obtain)
    answer = altopt(*command, "--data-root", "d", "--mirror", "m")
    assert (answer.code, answer.out) == (0, "d/VOCdevkit/VOC2007/m\n")
    assert "fetching" in answer.err


def test_fetching_a_data_set_that_nobody_knows(altopt, tmp_path):
    for arguments, words in ((["voc7"], "knows no data set 'voc7' (did you mean 'voc07'?): choose one of voc07, voc12"),
                             (["voc12", "--subset", "mini"], "voc12 has no subset 'mini': the only one is"),
                             (["voc07", "--subset", "tiny"], "voc07 has no subset 'tiny': the only one is")):
        answer = altopt("fetch", *arguments, "--data-root", str(tmp_path / "data"))
        assert answer.code == 2
        assert words in answer.err
    assert list(tmp_path.iterdir()) == []


def test_check_data_says_what_it_found(altopt, workplace):
    photographs(workplace / "mine", train="ab", test="c")
    answer = altopt("check-data", "--data-root", "mine")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "mine: VOC with lists: train to train, test to test", "no problems", "no warnings",
        "train: VOC train: 2 images of 60 x 40, 4 objects (cat 2, dog 2)",
        "test: VOC test: 1 image of 60 x 40, 2 objects (cat 1, dog 1)"]
    assert not (workplace / "runs").exists()


def test_check_data_exits_with_3_for_a_problem(altopt, workplace):
    photographs(workplace / "mine", train="ab", test="c")
    (workplace / "mine" / "JPEGImages" / "a.jpg").unlink()
    answer = altopt("check-data", "--data-root", "mine", "--json")
    assert (answer.code, answer.err) == (3, "")
    found = json.loads(answer.out)
    assert [(each["kind"], each["severity"]) for each in found["findings"]] == [("missing or doubled file", "problem")]
    assert found["splits"]["test"]["objects"] == 2
    assert "nowhere is not a folder" in one_line(altopt("check-data", "--data-root", "nowhere"))


def test_check_data_of_a_recipe(altopt, workplace):
    answer = altopt("check-data", "--recipe", "tiny.toml")
    assert (answer.code, answer.out.splitlines()[-1]) == (0, "test: shapes test:4: 4 images of 96 x 80")


@pytest.mark.whole
def test_a_run_on_a_test_split_where_nothing_counts_ends_with_dashes(altopt, workplace):
    photographs(workplace / "mine", train="abcd", test="e")
    path = workplace / "mine" / "Annotations" / "e.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    command = ["run-all", "--recipe", "tiny.toml", "--data-root", "mine", "--set", "data.format=voc", "--set",
               'data.train=["train"]', "--set", 'data.test=["test"]']
    answer = altopt(*command)
    assert answer.code == 0
    assert "VOC test has nothing that scoring asks for" in answer.err
    assert answer.err.index("scoring asks for") < answer.err.index("M0")
    assert ["M5", "(shared)", "voc07", "-", "-"] in [line.split()[:5] for line in answer.out.splitlines()]
    scores = json.loads(altopt(*command, "--json").out)["scores"]
    assert [(each["map"], each["recall_at_0.5"], each["average_recall"]) for each in scores] == [(None, None, None)] * 2
    assert "NaN" not in altopt(*command, "--json").out
    coco = altopt("evaluate", "--run", "tiny", "--data-root", "mine", "--protocol", "coco")
    assert (coco.code, "None" in coco.out) == (0, False)
