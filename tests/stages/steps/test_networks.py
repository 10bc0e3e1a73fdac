"""Networks with ImageNet weights from elsewhere go through all seven stages; here with random weights."""

import pytest
import torch
from tiny_runs import ARTIFACTS, make_all, open_tiny

from altopt.config import TORCHVISION_PIXELS
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.network_parts import initialise_all
from cache.checkpoints import first_difference, load_checkpoint, read_description, save_checkpoint
from cache.records import plain
from stages.pipeline.evaluation import summary


def random_weights(path, name):
    """M0 of a network, as ``load_imagenet_weights`` would write it."""
    backbone = backbones.build(name)
    tensors: dict[str, torch.Tensor] = {}
    for part in ("conv", "fc"):
        if part == "fc" and not name.startswith("resnet"):
            continue  # fc6 and fc7 of the others may begin with new random weights
        module = getattr(backbone, part)
        initialise_all(module, generator("networks", name), part)
        tensors |= {f"{part}.{key}": value.detach() for key, value in module.state_dict().items()}
    save_checkpoint(path, tensors, {"network": {"name": name}, "classes": [], "pixels": plain(vars(backbone.pixels))})


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_all_seven_stages(tmp_path, name):
    random_weights(tmp_path / "M0.safetensors", name)
    run = open_tiny(tmp_path / "run", f"network.name={name}", "all.iterations=1", "all.lr_steps=[]", "all.flips=false",
                    "train_fast_rcnn.rois_per_batch=8", "train_fast_rcnn_frozen_conv.rois_per_batch=8",
                    'data.train=["train:2"]', 'data.test=["test:1"]', "all.post_nms=10", "all.proposals=10",
                    feature_store="on")
    run.import_artifact("M0", tmp_path / "M0.safetensors", "random weights")
    assert make_all(run) == list(ARTIFACTS[1:])
    parts = {artifact: load_checkpoint(run.path(artifact))[0] for artifact in ("M2", "M4", "M5")}
    conv = {key: value for key, value in parts["M2"].items() if key.startswith("conv.")}
    assert first_difference(conv, {key: parts["M5"][key] for key in conv}) is None
    trained = [key for key, value in parts["M4"].items() if key.startswith("fc.") and not torch.equal(
        value, parts["M2"][key])]
    norms = [key for key in parts["M4"] if key.startswith("fc.") and (".bn" in key or "downsample.1" in key)]
    assert trained
    assert not set(trained) & set(norms)  # batch normalisation is frozen
    expected = TORCHVISION_PIXELS if name.startswith("resnet") else backbones.build(name).pixels
    assert read_description(run.path("M5"))["pixels"] == plain(vars(expected))
    assert len(summary(run, run.protocol)["scores"]) == 2
