"""Stages by several processes: what they make does not depend on how many there are, and none is left behind."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import region_runs
import torch
from rank_runs import in_ranks
from tiny_runs import hashes, link_or_copy, open_tiny, write_recipe

from altopt.machine.distributed import SingleProcess
from cache.checkpoints import load_checkpoint, save_checkpoint
from stages.pipeline.evaluation import detection_steps
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run, help_rank_0
from stages.shared.step import file_name

FILES = ("P1", "P2", "D2", "D5")
NETWORKS = ("M1", "M2", "M3", "M4")
SETS = ("all.iterations=6",)  # of two images each, mirror images among them


def remake(ranks, folder):
    """Make every artifact again, each from the inputs that are there: the last one first."""
    run = open_tiny(folder, *SETS, ranks=ranks, feature_store="on")
    if ranks.first:
        for step in reversed([*run.recipe.steps, *detection_steps(run)]):
            if step.output in (*FILES, *NETWORKS):
                run.make(step)
        ranks.announce(None)
    else:
        help_rank_0(ranks)


def joint(ranks, folder):
    recipe = read_recipe(str(folder.parent / "tiny.toml"), SETS, "approximate-joint")
    run = Run(folder, recipe, replace(open_tiny(folder).runtime, ranks=ranks))
    make(ranks, run, "M1")


def make(ranks, run, artifact):
    """Make one artifact, of several ranks."""
    if ranks.first:
        run.make(next(step for step in run.recipe.steps if step.output == artifact))
        ranks.announce(None)
    else:
        help_rank_0(ranks)


def remade(count, finished, folder, work=remake):
    """A copy of the finished run, in which so many processes worked; equal for equal counts."""
    shutil.copytree(finished, folder, copy_function=link_or_copy)
    write_recipe(folder.parent / "tiny.toml")
    if count > 1:
        in_ranks(count, work, folder)
    else:
        with as_many_threads_as_ranks_have():
            work(SingleProcess(), folder)
    return folder


@contextmanager
def as_many_threads_as_ranks_have():
    """Another number of threads would sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def difference(one, other, artifact):
    """The largest difference of two networks' weights."""
    ours, theirs = (load_checkpoint(folder / file_name(artifact))[0] for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def alone(finished, tmp_path_factory):
    return remade(1, finished, tmp_path_factory.mktemp("alone") / "tiny")


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_inputs_give_the_same_files_and_weights_that_differ_by_rounding(alone, finished, tmp_path, count):
    together = remade(count, finished, tmp_path / "tiny")
    assert hashes(together, *FILES) == hashes(alone, *FILES)
    assert all(difference(together, alone, artifact) < 1e-5 for artifact in NETWORKS)
    assert json.loads((together / "M4.json").read_text())["metrics"]["processes"] == count
    assert (together / "features").is_dir()


def test_joint_training_weighs_images_and_rois_each_by_their_own(finished, tmp_path):
    alone, together = (remade(count, finished, tmp_path / str(count) / "tiny", joint) for count in (1, 3))
    assert difference(together, alone, "M1") < 1e-5


def regions(ranks, folder, scheme):
    for artifact, *_ in reversed(region_runs.STAGES[scheme]):
        if artifact not in ("S1", "R1"):
            region_runs.make(folder, artifact, scheme, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["spp_net", "rcnn", "fast_rcnn_svm"])
def test_region_schemes_too(tmp_path, scheme):
    pytest.importorskip("sklearn")
    with as_many_threads_as_ranks_have():
        region_runs.make_all(tmp_path, scheme)
    before = region_runs.hashes(tmp_path, scheme)
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path, alone, ignore=shutil.ignore_patterns("alone"))
    in_ranks(3, regions, tmp_path, scheme)
    after = region_runs.hashes(tmp_path, scheme)
    assert {name for name in before if before[name] != after[name]} <= {"M1"}
    assert difference(tmp_path, alone, "M1") < 1e-5


@pytest.mark.slow
def test_a_hundred_steps_part_no_further_than_a_nudge_does(finished, tmp_path):
    """Another number of processes sums in another order, as a nudge of 1e-7 in the weights would."""
    folders = {}
    for name, count in (("one", 1), ("two", 2), ("three", 3), ("three again", 3)):
        folders[name] = remade(count, finished, tmp_path / name / "tiny", hundred)
    folders["nudged"] = remade(1, finished, tmp_path / "nudged" / "tiny", nudged)
    allowed = difference(folders["nudged"], folders["one"], "M2")
    assert 0 < allowed < 1e-2
    for name in ("two", "three"):
        assert 0 < difference(folders[name], folders["one"], "M2") <= allowed
    assert hashes(folders["three"], "M2") == hashes(folders["three again"], "M2")


def nudged(ranks, folder):
    path = folder / file_name("M0")
    tensors, description = load_checkpoint(path)
    random = torch.Generator().manual_seed(1)
    path.unlink()  # a link to what other tests read
    save_checkpoint(path, {name: tensor + 1e-7 * torch.randn(tensor.shape, generator=random)
                           for name, tensor in tensors.items()}, description)
    hundred(ranks, folder)


def hundred(ranks, folder):
    run = open_tiny(folder, "train_fast_rcnn.iterations=100", ranks=ranks)
    make(ranks, run, "M2")
