"""Every stage of every scheme on a device, each from inputs that the CPU made: the same outputs but for rounding."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import region_runs
from device_runs import CUDA, exact_float32
from tiny_runs import link_or_copy, open_tiny, write_recipe

from cache.checkpoints import load_checkpoint
from stages.pipeline.evaluation import detection_steps
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run
from stages.shared.step import file_name
from stages.steps.fast_rcnn import TrainBoxLayer, TrainClassification, train_box_layer, train_classification

# One step, at a rate that moves weights by far more than the tolerance.
SETS = ("all.iterations=1", "all.lr=0.01", "all.lr_steps=[]")
STEP = {"iterations": 1, "lr": 0.01, "lr_steps": ()}
# float32 sums of some thousand products in another order: weights, and features of a size around 1.
RELATIVE, OF_WEIGHTS, OF_FEATURES = 1e-3, 2e-5, 1e-3
PIXELS = 0.05
# A box at a threshold of suppression may be kept on one device and not on the other.
LEAST_SHARE = 0.98

STAGE_WISE = [
    ("M1", train_classification, ("M0", "P0"), TrainClassification(**region_runs.SHARED, **region_runs.TRAINING)),
    ("M2", train_box_layer, ("M1", "P0"), TrainBoxLayer(**region_runs.SHARED, **region_runs.TRAINING)),
]


def test_one_step_of_the_alternating_scheme(tmp_path):
    """On the CPU itself, which shows that what follows compares anything."""
    compare(remade("alternating", made("alternating", tmp_path), "cpu"), tmp_path / "tiny")


@pytest.mark.parametrize("scheme", ["alternating", "approximate-joint", "exact-joint"])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_one_step_of_each_stage(tmp_path, scheme, device):
    with exact_float32():
        compare(remade(scheme, made(scheme, tmp_path), device), tmp_path / "tiny")


@pytest.mark.parametrize("scheme", ["spp_net", "rcnn", "fast_rcnn_svm", "stage_wise"])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_one_step_of_each_stage_of_region_schemes(tmp_path, monkeypatch, scheme, device):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(region_runs.STAGES, "stage_wise", STAGE_WISE)
    own, other = tmp_path / "own", tmp_path / "other"
    region_runs.prepare(own)
    stages = [artifact for artifact, *_ in region_runs.STAGES[scheme]]
    for artifact in stages:
        region_runs.make(own, artifact, scheme, changes=one_step(artifact))
    shutil.copytree(own, other)
    with exact_float32():
        for artifact in reversed(stages):
            region_runs.make(other, artifact, scheme, changes=one_step(artifact), device=device)
    compare(other, own)


def one_step(artifact: str) -> dict[str, object]:
    return STEP if artifact.startswith("M") else {}


def made(scheme: str, place: Path) -> Run:
    """A run of this scheme in one folder, made on the CPU with its detections."""
    run = opened(scheme, place / "tiny", "cpu")
    run.bring_up_to_date([*run.recipe.steps, *detection_steps(run)])
    return run


def opened(scheme: str, folder: Path, device: str) -> Run:
    recipe = read_recipe(str(write_recipe(folder.parent / "tiny.toml")), SETS, scheme)
    return Run(folder, recipe, open_tiny(folder, device=device).runtime)


def remade(scheme: str, run: Run, device: str) -> Path:
    """A copy in which each artifact is made again from inputs that the CPU made: the last one first."""
    folder = run.folder.parent / "again" / "tiny"
    shutil.copytree(run.folder, folder, copy_function=link_or_copy)
    again = opened(scheme, folder, device)
    for step in reversed([*again.recipe.steps, *detection_steps(again)]):
        again.make(step)
    return folder


def compare(folder: Path, expected: Path) -> None:
    """Hold every artifact of a folder against that of another one."""
    compared = 0
    for path in sorted(expected.glob("[MPFSRD]?.*")):
        if path.suffix == ".safetensors":
            ours, theirs = (load_checkpoint(each / path.name)[0] for each in (folder, expected))
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                worst = (ours[name] - tensor).abs().sub(RELATIVE * tensor.abs()).max().item() if tensor.numel() else 0.0
                assert worst <= OF_WEIGHTS, f"{path.name}: {name}"
        elif path.suffix == ".h5":
            compare_hdf5(folder / path.name, path)
        elif path.name.endswith(".detections.json"):
            compare_detections(json.loads((folder / path.name).read_text()), json.loads(path.read_text()))
        else:
            continue
        compared += 1
    assert compared > 1


def compare_hdf5(path: Path, expected: Path) -> None:
    """Proposals by boxes that have their like in the other file, maps and features by their values."""
    with h5py.File(path) as ours, h5py.File(expected) as theirs:
        if "boxes" in theirs and "scores" in theirs:
            found = [np.split(file["boxes"][:], file["offsets"][1:-1]) for file in (ours, theirs)]
            share = np.mean([has_like(box, boxes) for boxes, others in zip(*found, strict=True) for box in others])
            assert share >= LEAST_SHARE, f"{path.name}: {share:.3f} of the boxes"
            return
        assert set(ours) == set(theirs)
        for name, dataset in theirs.items():
            if isinstance(dataset, h5py.Dataset) and dataset.dtype.kind == "f":
                np.testing.assert_allclose(ours[name][:], dataset[:], RELATIVE, OF_FEATURES, err_msg=name)


def compare_detections(ours, theirs):
    """A detection has its like where image, class and box agree."""
    found: dict[tuple[object, object], list[list[float]]] = {}
    for each in ours:
        found.setdefault((each["image_id"], each["category_id"]), []).append(each["bbox"])
    likes = [has_like(np.array(each["bbox"]), np.array(found.get((each["image_id"], each["category_id"]), [])))
             for each in theirs]
    assert np.mean(likes or [True]) >= LEAST_SHARE


def has_like(box: np.ndarray, boxes: np.ndarray) -> bool:
    return bool(len(boxes)) and bool((np.abs(boxes - box).max(axis=1) <= PIXELS).any())


@pytest.mark.parametrize(("change", "name"), [("weights", "M1"), ("boxes", "P1")])
def test_what_differs_is_found(finished, tmp_path, change, name):
    """Otherwise the tests before this one say nothing."""
    folder = tmp_path / "tiny"
    shutil.copytree(finished, folder)
    path = folder / file_name(name)
    if change == "weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        next(iter(tensors.values())).add_(1e-3)
        save_file(tensors, path, metadata=dict(load_metadata(finished / file_name(name))))
    else:
        with h5py.File(path, "r+") as file:
            file["boxes"][:5] += 1
    with pytest.raises(AssertionError):
        compare(folder, finished)


def load_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata
