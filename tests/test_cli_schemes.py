"""The six schemes through the command line: each alone, and all of them compared."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, write_recipe

from cache.checkpoints import load_checkpoint
from stages import DETECTIONS, SCHEMES
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import open_folder
from stages.shared.step import Runtime, Step
from stages.steps.detect import detect_unshared
from stages.steps.fast_rcnn import train_fast_rcnn
from stages.steps.proposals import generate_proposals
from stages.steps.rpn import train_rpn

SIX = TINY.replace("[all]\n", "[all]\nrois_per_batch = 16         # few\n") + """
[train_on_warped_regions]
crop_side = 32              # small

[cache_conv_features]
scales = [80]               # the images' own size

[detect_spp_net]
scales = [80]               # the images' own size
"""
NEEDS = {"rcnn": ("cv2", "sklearn"), "spp-net": ("cv2", "sklearn"), "fast-rcnn": ("cv2",)}
POSSIBLE = [scheme for scheme in ("rcnn", "spp-net", "fast-rcnn", "alternating", "approximate-joint", "exact-joint")
            if all(importlib.util.find_spec(name) for name in NEEDS.get(scheme, ()))]
with_opencv = pytest.mark.skipif("fast-rcnn" not in POSSIBLE, reason="OpenCV is not installed")


@pytest.fixture
def six(workplace):
    write_recipe(workplace / "six.toml", SIX)
    return workplace


@pytest.fixture
def fast_rcnn(altopt, six):
    """The folder of a finished Fast R-CNN run, and what the command said."""
    answer = altopt("run-all", "--recipe", "six.toml", "--scheme", "fast-rcnn", "--workers", "0")
    assert answer.code == 0
    return Path("runs/six-fast-rcnn"), answer


def compare(altopt, *words):
    return altopt("compare", "--recipe", "six.toml", "--workers", "0", "--log-every", "1", *words)


def test_compare_all_schemes_then_nothing(altopt, six):
    answer = compare(altopt, "--seeds", "1", "--schemes", ",".join(POSSIBLE))
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in SCHEMES] == POSSIBLE
    assert lines[-1] == "The same in runs/compare-six/compare.json, .csv and .md"
    folder = Path("runs/compare-six")
    table = json.loads((folder / "compare.json").read_text())["rows"]
    assert [row["scheme"] for row in table] == POSSIBLE
    assert all(row["training"] > 0 and row["test_seconds"] > 0 and row["bytes"] > 0 for row in table)
    assert [row["scheme"] for row in csv.DictReader((folder / "compare.csv").read_text().splitlines())] == POSSIBLE
    assert all(scheme in (folder / "compare.md").read_text() for scheme in POSSIBLE)
    taken = [line for line in answer.err.splitlines() if line.startswith("M0: taken over")]
    assert len(taken) == len(POSSIBLE) - 1
    again = compare(altopt, "--seeds", "1", "--schemes", ",".join(POSSIBLE), "--json")
    assert json.loads(again.out) == table
    assert [line.split(",")[0] for line in again.err.splitlines()] == POSSIBLE


def test_interrupted_compare_makes_only_the_rest(altopt, six, monkeypatch):
    from stages.console.progress import Reporter

    original = Reporter.__call__

    def report(reporter, event):
        original(reporter, event)
        if (event.kind, event.artifact) == ("started", "M3"):
            raise KeyboardInterrupt

    words = ("--seeds", "1", "--schemes", "approximate-joint,alternating,exact-joint", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "__call__", report)
        answer = compare(altopt, *words)
    assert (answer.code, answer.out) == (130, "")
    kept = json.loads(Path("runs/compare-six/compare.json").read_text())
    assert [run["scheme"] for run in kept["runs"]] == ["approximate-joint"]
    answer = compare(altopt, *words)
    assert answer.code == 0
    assert [row["scheme"] for row in json.loads(answer.out)] == ["approximate-joint", "alternating", "exact-joint"]
    made = [line.split(":")[0] for line in answer.err.splitlines() if ": done in" in line]
    assert made == ["M3", "P2", "M4", "M5", "D5", "M1", "D1"]
    assert json.loads(Path("runs/compare-six/compare.json").read_text())["runs"][0] == kept["runs"][0]


def test_compare_in_which_one_diverges(altopt, six):
    answer = compare(altopt, "--seeds", "1", "--schemes", "approximate-joint,exact-joint", "--set",
                     "train_approximate_joint.lr=1e30", "--json")
    assert answer.code == 5
    assert [row["scheme"] for row in json.loads(answer.out)] == ["exact-joint"]
    assert "warning: approximate-joint, seed 1 diverged: iteration " in answer.err
    assert answer.err.splitlines()[-1].startswith("altopt: 1 of 2 runs diverged and are not in the table")
    answer = compare(altopt, "--seeds", "1", "--schemes", "approximate-joint", "--set",
                     "train_approximate_joint.lr=1e30")
    assert (answer.code, answer.out) == (5, "")


@pytest.mark.parametrize(("arguments", "words"), [
    (["compare", "--schemes", "fastrcnn"], "did you mean 'fast-rcnn'?"),
    (["compare", "--schemes", ""], "there is no scheme ''"),
    (["compare", "--seeds", "0"], "--seeds"),
    (["compare", "--from", "M9=x.safetensors"], "choose one of M0, P0, T0"),
    (["compare", "--from", "M0"], "name the file to take, --from M0=FILE"),
    (["compare", "--set", "train_rpn.lrr=1"], "did you mean 'lr'?"),
    (["plan", "--scheme", "fast-rcn"], "there is no scheme 'fast-rcn' (did you mean 'fast-rcnn'?)"),
    (["run-all", "--scheme", "joint"], "choose one of alternating, rcnn, "),
    (["stage", "7", "--scheme", "fast-rcnn", "--recipe", "six.toml"], "give 1 to 2"),
    (["stage", "train_rpn", "--scheme", "fast-rcnn", "--recipe", "six.toml"], "there is no stage 'train_rpn'"),
    (["evaluate", "M5", "--scheme", "fast-rcnn"], "choose M1"),
    (["recall", "P1", "--scheme", "fast-rcnn"], "choose P0"),
    (["recall", "P1", "--scheme", "exact-joint"], "the scheme exact-joint keeps none on disk"),
])
def test_what_is_not_understood_exits_with_2_and_leaves_nothing(altopt, six, arguments, words):
    answer = altopt(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert words in " ".join(answer.err.split())
    assert not Path("runs").exists()


def test_compare_with_a_file_that_is_not_there(altopt, six):
    answer = compare(altopt, "--from", "M0=none.pth", "--schemes", "exact-joint")
    assert answer.code == 4
    assert "none.pth, given for M0, is not a file" in answer.err


def test_scheme_has_a_folder_of_its_own_and_keeps_its_tables(six):
    runtime = Runtime()
    assert open_folder("six.toml", None, [], None, runtime, "alternating").folder == Path("runs/six")
    run = open_folder("six.toml", None, ["detect_on_proposals.nms=0.4"], None, runtime, "fast-rcnn")
    assert run.folder == Path("runs/six-fast-rcnn")
    assert open_folder("six.toml", "mine", [], None, runtime, "fast-rcnn").folder == Path("runs/mine")
    assert open_folder(None, None, [], None, runtime, "rcnn").folder == Path("runs/shapes-rcnn")
    run.folder.mkdir(parents=True)
    run.keep_recipe()
    kept = read_recipe(str(run.folder / "recipe.toml"))
    assert kept.scheme == "fast-rcnn"
    assert {"selective_search", "train_fast_rcnn", "detect_on_proposals"} <= kept.tables.keys()
    assert "train_rpn" not in kept.tables
    later = open_folder(None, "six-fast-rcnn", [], None, runtime)
    assert later.recipe.scheme == "fast-rcnn"
    assert [later.recipe.config(step) for step in later.recipe.detections] == [
        run.recipe.config(step) for step in run.recipe.detections]


@pytest.mark.parametrize(("recipe", "asked", "words"), [
    (None, "rcnn", "begun with the scheme fast-rcnn, and rcnn is asked for"),
    (None, "alternating", "and alternating is asked for"), ("six.toml", None, "and alternating is asked for")])
def test_folder_of_one_scheme_refuses_another(altopt, six, recipe, asked, words):
    run = open_folder("six.toml", "mine", [], None, Runtime(), "fast-rcnn")
    run.folder.mkdir(parents=True)
    run.keep_recipe()
    options = [*(["--recipe", recipe] if recipe else []), *(["--scheme", asked] if asked else [])]
    answer = altopt("plan", "--run", "mine", *options)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err
    assert altopt("plan", "--run", "mine", "--scheme", "fast-rcnn").code == 0


def test_recipe_may_name_its_scheme(altopt, six):
    write_recipe(six / "joint.toml", 'scheme = "exact-joint"\n' + SIX)
    result = json.loads(altopt("plan", "--recipe", "joint.toml", "--json").out)
    assert (result["folder"], result["scheme"]) == ("runs/joint", "exact-joint")
    assert [step["output"] for step in result["steps"]] == ["M0", "M1"]
    write_recipe(six / "wrong.toml", 'scheme = "exact"\n' + SIX)
    assert "did you mean 'exact-joint'?" in altopt("plan", "--recipe", "wrong.toml").err


def test_seventh_scheme_is_a_list(altopt, six, monkeypatch):
    """Fast R-CNN on an RPN's proposals, its conv layers trained on from the RPN's."""
    monkeypatch.setitem(SCHEMES, "rpn-first", [
        Step("M1", train_rpn, "M0"),
        Step("P1", generate_proposals, "M1"),
        Step("M2", train_fast_rcnn, "M1", "P1"),
    ])
    monkeypatch.setitem(DETECTIONS, "rpn-first", [Step("D2", detect_unshared, "M1", "M2")])
    answer = altopt("run-all", "--recipe", "six.toml", "--scheme", "rpn-first", "--workers", "0")
    assert answer.code == 0
    assert "M1+M2 (rpn-first)" in answer.out
    assert "M2 (4 of 4) train_fast_rcnn from M1, P1: not made yet" in answer.err
    assert altopt("run-all", "--run", "six-rpn-first").err == "runs/six-rpn-first is up to date: nothing to do\n"
    first, second = (load_checkpoint(Path(f"runs/six-rpn-first/{name}.safetensors"))[0] for name in ("M1", "M2"))
    assert torch.equal(first["conv.conv2.1.weight"], second["conv.conv2.1.weight"])
    assert not torch.equal(first["conv.conv5.0.weight"], second["conv.conv5.0.weight"])


@pytest.mark.parametrize("scheme", ["fast-rcnn-svm", "fast-rcnn-stage-wise"])
def test_ablations_of_fast_rcnn_that_are_schemes(altopt, six, scheme):
    if not {"cv2", "sklearn"} <= set(filter(importlib.util.find_spec, ("cv2", "sklearn"))):
        pytest.skip("OpenCV or scikit-learn is not installed")
    answer = altopt("run-all", "--recipe", "six.toml", "--scheme", scheme, "--workers", "0")
    assert answer.code == 0
    assert f"({scheme})" in answer.out
    assert "is up to date" in altopt("run-all", "--run", f"six-{scheme}").err


@with_opencv
def test_fast_rcnn_from_its_folder_alone(altopt, fast_rcnn):
    folder, answer = fast_rcnn
    assert "M1 (fast-rcnn)" in answer.out
    for command in ("plan", "status"):
        text = altopt(command, "--run", folder.name).out
        assert text.splitlines()[0] == f"{folder}: recipe tiny, scheme fast-rcnn"
        assert [line.split()[1:3] for line in text.splitlines()[2:]] == [
            ["M0", "pretrain_on_crops"], ["P0", "selective_search"], ["M1", "train_fast_rcnn"]]
    result = json.loads(altopt("evaluate", "--run", folder.name, "--json").out)
    assert result["name"] == "M1 (fast-rcnn)"
    recall = json.loads(altopt("recall", "p0", "--run", folder.name, "--limit", "9", "--json").out)
    assert list(recall["limits"]) == ["9"]
    answer = altopt("stage", "2", "--run", folder.name, "--scheme", "fast-rcnn")
    assert (answer.code, answer.err) == (0, "M1 is up to date: nothing to do\n")
    answer = altopt("stage", "M1", "--run", folder.name, "--set", "train_fast_rcnn.lr=0.002", "--workers", "0")
    assert answer.code == 0
    assert "M1 (3 of 3) train_fast_rcnn from M0, P0: lr was 0.001, is 0.002" in answer.err


@with_opencv
def test_stage_by_number_counts_in_the_scheme(altopt, six):
    answer = altopt("stage", "2", "--recipe", "six.toml", "--scheme", "fast-rcnn")
    assert answer.code == 4
    assert "M1 needs M0, and M0 is missing" in answer.err
    answer = altopt("stage", "1", "--recipe", "six.toml", "--scheme", "fast-rcnn", "--workers", "0")
    assert answer.code == 0
    assert [path.name for path in Path("runs/six-fast-rcnn").glob("*.h5")] == ["P0.h5"]
