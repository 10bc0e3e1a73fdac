"""Fast R-CNN's ablations on the tiny recipe's images: what is frozen, scales, box layers, SVMs."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from tiny_runs import Reports, config_as, open_tiny

from altopt.errors import ArtifactError
from cache.checkpoints import load_checkpoint
from cache.files import sha256_file
from stages import SCHEMES
from stages.shared.stage_config import ReadsData
from stages.shared.step import Runtime, Step
from stages.steps.fast_rcnn import train_box_layer, train_classification, train_fast_rcnn
from stages.steps.fast_rcnn_regions import cache_pooled_features, detect_on_proposals, detect_with_svms
from stages.steps.svms import train_svms

with_solver = pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is not installed")
ZERO = ("bbox_pred.weight", "bbox_pred.bias", "bbox_means")


def run_stage(folder, out, stage, *inputs, report=None, **settings):
    """Run a stage function with the tiny recipe's settings, changed, and return what it wrote and its facts."""
    config = replace(open_tiny(out.parent / "tiny").recipe.config(Step("M1", stage, *map(str, inputs))), **settings)
    runtime = Runtime(device="cpu", workers=0, data_root=folder, snapshot_seconds=0, report_every=1,
                      report=report or Reports())
    facts = stage(*inputs, out=out, config=config, runtime=runtime)
    return out, facts


@pytest.fixture
def train(finished, tmp_path):
    """Train Fast R-CNN on the finished run's M0 and P1, with these settings, into a file of this name."""

    def train(name="M1", stage=train_fast_rcnn, init=finished / "M0.safetensors", **settings):
        out = tmp_path / f"{name}.safetensors"
        return run_stage(finished, out, stage, init, finished / "P1.h5", **({"rois_per_batch": 16} | settings))[0]

    return train


@pytest.fixture
def given(finished, tmp_path):
    """Objects of the test split, moved about, as proposals."""
    import numpy as np

    from altopt.datasets.opening import open_dataset
    from cache.proposals import ProposalWriter

    step = Step("D1", detect_on_proposals, "M1", "T0")
    config = config_as(ReadsData, open_tiny(tmp_path / "tiny").recipe, step)
    dataset = open_dataset(config.data, "test", finished)
    with ProposalWriter(tmp_path / "T0.h5", {}) as writer:
        for id in dataset.ids:
            width, height = dataset.size(id)
            boxes = np.concatenate([dataset.objects(id).boxes, [[0, 0, width, height], [4, 4, 40, 30], [9, 2, 20, 13]]])
            writer.append(id, boxes.astype(np.float32), np.linspace(1, 0, len(boxes)))
    return tmp_path / "T0.h5"


@pytest.fixture
def detect(finished, tmp_path, given):
    """Detect with a network on the test split's proposals and return the detections of each image."""

    def detect(network, stage=detect_on_proposals, *more, **settings):
        settings = {"score": 0.0} | settings
        out, _ = run_stage(finished, tmp_path / "D1.detections.json", stage, network, *more, given, **settings)
        return json.loads(out.read_text())

    return detect


def changed(one, other):
    """The layers whose weights are not equal in both files."""
    first, second = (load_checkpoint(path)[0] for path in (one, other))
    return {name.rsplit(".", 1)[0] for name in first if name in second and not torch.equal(first[name], second[name])}


def near(found, others):
    """Whether each detection's box is one of the others, COCO's x, y, width and height, to a thousandth of a pixel."""
    distances = torch.cdist(torch.tensor([each["bbox"] for each in found]), torch.tensor(others), p=torch.inf)
    return distances.min(dim=1).values < 1e-3


@pytest.mark.parametrize(("freeze", "learning"), [
    (("conv*",), set()), (("conv[1-4]",), {"conv5.0", "conv5.2"}),
    (("conv1", "conv2", "conv3.*", "conv4", "conv5.0"), {"conv5.2"}),
])
def test_freezing_by_pattern(finished, train, freeze, learning):
    trained = train(freeze=freeze)
    assert {name for name in changed(finished / "M0.safetensors", trained) if name.startswith("conv")} == {
        f"conv.{name}" for name in learning}


def test_frozen_layers_are_verified_when_the_stage_ends(train, monkeypatch):
    import stages.shared.training as module

    monkeypatch.setattr(module, "freeze", lambda part, names: None)
    with pytest.raises(AssertionError, match=r"train_fast_rcnn changed conv.conv4.1, which is frozen"):
        train(freeze=("conv4.1",))


def test_one_scale_that_is_the_networks_changes_nothing(train):
    assert sha256_file(train("one", scales=(80,), max_side=96)) == sha256_file(train("none"))


def test_scale_is_drawn_at_each_visit_and_by_key(finished, train, monkeypatch):
    import altopt.batches.samples as module

    seen = []
    original = module.read_sample

    def read(dataset, id, network, **settings):
        seen.append(network.short_side)
        return original(dataset, id, network, **settings)

    monkeypatch.setattr(module, "read_sample", read)
    first = sha256_file(train("first", scales=(64, 80, 96), max_side=200, iterations=8))
    assert set(seen) == {64, 80, 96}
    again = list(seen)
    seen.clear()
    assert sha256_file(train("again", scales=(64, 80, 96), max_side=200, iterations=8)) == first
    assert seen == again


def test_detection_at_the_networks_scale_alone_is_the_same(train, detect):
    network = train()
    plain = detect(network)
    assert len(plain) > 10
    scaled = detect(network, scales=(80,), max_side=96, rois_at_once=2)
    assert [(each["image_id"], each["category_id"]) for each in scaled] == [
        (each["image_id"], each["category_id"]) for each in plain]
    for one, other in zip(scaled, plain, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_detection_takes_each_region_at_the_scale_that_suits_it(train, detect):
    """Of two scales with an area that no region comes near, one is never chosen."""
    network = train()
    large = detect(network, scales=(160,), max_side=400)
    assert detect(network, scales=(80, 160), max_side=400, region_area=10**9) == large
    assert detect(network, scales=(80, 160), max_side=400, region_area=40 * 40) != large


def test_regression_can_be_switched_off_at_test(train, detect, given):
    from cache.proposals import ProposalFile

    network = train()
    with_boxes, without = (detect(network, regress_boxes=on, nms=1.0, per_image=10_000) for on in (True, False))
    proposals = ProposalFile(given)
    boxes = [[x1, y1, x2 - x1, y2 - y1]
             for id in proposals.image_ids for x1, y1, x2, y2 in proposals.get(id)[0].tolist()]
    assert near(without, boxes).all()
    assert not near(with_boxes, boxes).all()
    assert sorted(each["score"] for each in with_boxes) == pytest.approx(sorted(each["score"] for each in without))


def test_classification_only_leaves_boxes_as_they_are(train, detect):
    network = train(box_regression="none")
    tensors, _ = load_checkpoint(network)
    assert not any(tensors[f"head.{name}"].any() for name in ZERO)
    assert detect(network) == detect(network, regress_boxes=False)
    assert changed(network, train("other")) > {"conv.conv5.0", "fc.fc6", "head.cls_score"}


def test_weight_of_the_classification_loss(train):
    plain, double = train("plain", iterations=1), train("double", iterations=1, cls_weight=2.0)
    assert "head.cls_score" in changed(plain, double)
    assert sha256_file(train("one", iterations=1, cls_weight=1.0)) == sha256_file(plain)
    assert "head.bbox_pred" not in changed(plain, train("boxes", iterations=1, cls_weight=0.5, clip_gradient=0.0))


def test_stage_wise_trains_the_box_layer_and_nothing_else(finished, train, detect):
    first = train("first", train_classification)
    assert sha256_file(train("same", box_regression="none")) == sha256_file(first)
    second = train("second", train_box_layer, init=first)
    assert changed(first, second) == {"head.bbox_pred", "head"}  # head: means and deviations of its targets
    assert detect(first, regress_boxes=False) == detect(second, regress_boxes=False)
    assert detect(first) != detect(second)


@pytest.mark.parametrize("init", ["M2", "M1", "M0"])
def test_box_layer_alone_starts_from_a_network_without_one(finished, train, init):
    with pytest.raises(ArtifactError, match=rf"{init}.safetensors is not a Fast R-CNN trained without its box"):
        train("second", train_box_layer, init=finished / f"{init}.safetensors")


@with_solver
def test_svms_take_the_place_of_the_softmax(finished, train, detect, tmp_path):
    from cache.region_features import RegionFeatureFile

    network = train()
    out, facts = run_stage(finished, tmp_path / "F1.safetensors", cache_pooled_features, network, finished / "P1.h5",
                           rois_at_once=7)
    assert facts["pooled_regions"] == 0
    with RegionFeatureFile(out) as file:
        assert (file.width("features"), file.description["method"]) == (256, "fast_rcnn")
    svms, facts = run_stage(finished, tmp_path / "S1.safetensors", train_svms, out)
    assert facts["positives"] > 0
    found = detect(network, detect_with_svms, svms, score=-1e9, nms=1.0)
    assert len({each["category_id"] for each in found}) == 5 - facts["classes_without_svm"]
    assert near(found, [each["bbox"] for each in detect(network, nms=1.0, per_image=10_000)]).all()


@with_solver
def test_svms_of_another_network_are_refused(finished, train, detect, tmp_path):
    network, other = train(), train("other", seed=9)
    out, _ = run_stage(finished, tmp_path / "F1.safetensors", cache_pooled_features, network, finished / "P1.h5")
    svms, _ = run_stage(finished, tmp_path / "S1.safetensors", train_svms, out)
    with pytest.raises(ArtifactError, match=r"S1\.safetensors was trained on the features of another network"):
        detect(other, detect_with_svms, svms)


def test_lists_of_the_ablations():
    assert [(step.output, step.name) for step in SCHEMES["fast-rcnn-svm"]] == [
        ("P0", "selective_search"), ("M1", "train_fast_rcnn"), ("F1", "cache_pooled_features"), ("S1", "train_svms")]
    assert [(step.output, step.name) for step in SCHEMES["fast-rcnn-stage-wise"]] == [
        ("P0", "selective_search"), ("M1", "train_classification"), ("M2", "train_box_layer")]
