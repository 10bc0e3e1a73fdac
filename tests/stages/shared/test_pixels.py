"""What weights want of an image travels with them: every stage of every scheme gives it to the network."""

from pathlib import Path

import pytest
import region_runs
import torch
from tiny_runs import ARTIFACTS, make_all, open_tiny

from altopt.config import TORCHVISION_PIXELS, Pixels
from altopt.errors import ArtifactError
from cache.checkpoints import load_checkpoint, read_description, save_checkpoint
from cache.proposals import ProposalFile
from cache.records import plain
from stages.pipeline.evaluation import summary
from stages.shared.step import file_name
from stages.steps.assemble import Assemble, add_rpn_layers

# The same numbers in another order, so that a network with its first layer turned round computes the same.
MIRRORED = Pixels("BGR", 255.0, TORCHVISION_PIXELS.mean[::-1], TORCHVISION_PIXELS.std[::-1])


def turn_round(path: Path) -> None:
    """Rewrite a network so that it takes BGR and computes what it did."""
    tensors, description = load_checkpoint(path)
    tensors["conv.conv1.0.weight"] = tensors["conv.conv1.0.weight"].flip(1).contiguous()
    save_checkpoint(path, tensors, description | {"pixels": plain(vars(MIRRORED))})


def assert_like(there: Path, here: Path) -> None:
    expected, found = load_checkpoint(there)[0], load_checkpoint(here)[0]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        other = found[name].flip(1) if name == "conv.conv1.0.weight" else found[name]
        torch.testing.assert_close(other, tensor, rtol=2e-3, atol=2e-4, msg=f"{here.name}: {name}")


@pytest.mark.parametrize("scheme", ["alternating", "approximate-joint", "exact-joint"])
def test_a_network_that_takes_bgr_gives_what_its_mirror_gives(tmp_path, scheme):
    folders = [tmp_path / "rgb", tmp_path / "bgr"]
    for folder in folders:
        run = open_tiny(folder)
        run.recipe.header["scheme"] = scheme
        run.make(run.recipe.steps[0])
        if folder.name == "bgr":
            turn_round(run.path("M0"))
            run.import_artifact("M0", None, "turned round")
        make_all(run)
        summary(run, run.protocol)
    assert read_description(folders[0] / "M1.safetensors")["pixels"] == plain(vars(TORCHVISION_PIXELS))
    for name in [step.output for step in run.recipe.steps]:
        here, there = (folder / file_name(name) for folder in folders)
        if name.startswith("M"):
            assert_like(here, there)
            assert read_description(there)["pixels"] == plain(vars(MIRRORED))
        else:
            with ProposalFile(here) as one, ProposalFile(there) as other:
                for id in one.image_ids:
                    assert abs(one.get(id)[0][:5] - other.get(id)[0][:5]).max() < 0.1
    assert not scheme.startswith("alternating") or set(ARTIFACTS) == {step.output for step in run.recipe.steps}


@pytest.mark.parametrize("scheme", ["rcnn", "spp_net"])
def test_region_schemes_too(tmp_path, scheme):
    scores = {}
    for name in ("rgb", "bgr"):
        folder = tmp_path / name
        region_runs.prepare(folder)
        if name == "bgr":
            turn_round(folder / "M0.safetensors")
        for artifact, *_ in region_runs.STAGES[scheme]:
            region_runs.make(folder, artifact, scheme)
        scores[name] = load_checkpoint(folder / "S1.safetensors")[0]["weights"]
    assert_like(tmp_path / "rgb" / "M1.safetensors", tmp_path / "bgr" / "M1.safetensors")
    assert read_description(tmp_path / "bgr" / "M1.safetensors")["pixels"] == plain(vars(MIRRORED))
    torch.testing.assert_close(scores["bgr"], scores["rgb"], rtol=0.02, atol=0.002)


def test_networks_that_want_other_pixels_do_not_go_together(tmp_path):
    run = open_tiny(tmp_path / "run")
    make_all(run)
    for name in ("M1", "M3"):
        path = run.path(name)
        tensors, description = load_checkpoint(path)
        save_checkpoint(path, tensors, description | {"pixels": plain(vars(MIRRORED))})
    with pytest.raises(ArtifactError, match="anchors, image sizes or pixels"):
        add_rpn_layers(run.path("M4"), run.path("M3"), out=tmp_path / "M5", config=Assemble(), runtime=run.runtime)
    unshared = run.recipe.detections[0]
    with pytest.raises(ArtifactError, match=r"M1\.safetensors and M2\.safetensors want an image's values differently"):
        run.make(unshared)
