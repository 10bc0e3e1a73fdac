"""A network as an ONNX graph: ONNX Runtime beside ours, each part on equal inputs, and the whole."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from exported_networks import (
    CLASSES,
    EACH_NETWORK,
    SETTINGS,
    SHORT,
    SIZES,
    drawn,
    found_by,
    mean_ap,
    random_network,
    settings_of,
    share_found,
    sizes_for,
)
from numpy.typing import NDArray

from altopt.batches.samples import resized
from altopt.config import DetectionSettings
from altopt.evaluation.detections import Detections
from altopt.extents import scale_of
from altopt.models.detector import FasterRCNN
from altopt.models.imagenet import CAFFE_PIXELS
from altopt.models.torchvision_export import as_torchvision

onnx = pytest.importorskip("onnx", reason="ONNX graphs are made by onnx: pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX graphs are run by onnxruntime: pip install -e '.[onnx]'")
Arrays = dict[str, NDArray[Any]]


@cache  # of networks and settings that nothing changes
def graph_of(network: FasterRCNN, settings: DetectionSettings = SETTINGS) -> Any:
    from altopt.models.onnx_export import onnx_model

    model = onnx_model(*as_torchvision(network, network.rpn.network, CLASSES, settings), notes={"altopt": "1"})
    return onnx.shape_inference.infer_shapes(model)


def run(model: Any, **inputs: NDArray[Any]) -> Arrays:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, inputs), strict=True))


def part(model: Any, inputs: list[str], outputs: list[str]) -> Any:
    """The part of a graph between values that have names."""
    return onnx.utils.Extractor(model).extract_model(inputs, outputs)


def detected(outputs: Arrays) -> Detections:
    return Detections(outputs["boxes"], outputs["scores"], outputs["labels"])


def close(theirs: NDArray[Any], ours: Any) -> bool:
    return theirs.shape == tuple(ours.shape) and np.allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-4)


@EACH_NETWORK
def test_every_part_gives_what_ours_gives(name):
    network, settings = random_network(name), settings_of(name)
    model = graph_of(network, settings)
    image = drawn(1, SIZES[1])
    ours = found_by(network, image, settings)
    features = ours.features[None].numpy()
    assert close(run(part(model, ["image"], ["features"]), image=image)["features"][0], ours.features)
    rpn = run(part(model, ["features"], ["rpn_cls_logits", "rpn_bbox_pred"]), features=features)
    assert close(rpn["rpn_cls_logits"], ours.rpn[0][:, 1] - ours.rpn[0][:, 0])
    assert close(rpn["rpn_bbox_pred"], ours.rpn[1])
    pooled = run(part(model, ["features", "proposals"], ["pooled"]), features=features,
                 proposals=ours.proposals.numpy())["pooled"]
    assert np.array_equal(pooled, ours.pooled.numpy())
    head = run(part(model, ["pooled"], ["cls_score", "bbox_pred"]), pooled=ours.pooled.numpy())
    assert close(head["cls_score"], ours.head[0])
    assert close(head["bbox_pred"], ours.head[1].flatten(1))


@EACH_NETWORK
def test_the_whole_finds_what_ours_finds(name):
    network, settings = random_network(name), settings_of(name)
    model = graph_of(network, settings)
    for number, size in enumerate(sizes_for(name)):
        image = drawn(number, size)
        assert share_found(found_by(network, image, settings).detections, detected(run(model, image=image))) >= 0.99


def test_the_map_is_the_same():
    network = random_network("small")
    model = graph_of(network)
    images = [drawn(number, size) for number in range(3) for size in SIZES]
    ours = [found_by(network, image).detections for image in images]
    theirs = [detected(run(model, image=image)) for image in images]
    assert 0.1 < mean_ap(ours, ours) < 0.9
    assert abs(mean_ap(theirs, ours) - mean_ap(ours, ours)) <= 1e-3


@pytest.mark.parametrize("size", [(64, 96), (250, 333), (400, 131), (131, 400), (40, 400)])
def test_images_of_other_sizes_are_resized_as_ours(size):
    """To the same size exactly; pixels may differ by one or two, since ONNX Runtime rounds otherwise than Pillow."""
    network = random_network("small")
    image = drawn(7, size)
    frame = network.rpn.network
    ours = resized(image, scale_of(size, frame.short_side, frame.max_side)).transpose(2, 0, 1)
    model = graph_of(network)
    [resize] = [node.output[0] for node in model.graph.node if node.op_type == "Resize"]
    theirs = run(part(model, ["image"], [resize]), image=image)[resize][0]
    assert theirs.shape == ours.shape
    assert np.abs(theirs.astype(int) - ours).max() <= 2
    found = detected(run(model, image=image))
    assert share_found(found_by(network, image).detections, found, pixels=1.0, score=0.01) > 0.9
    assert found.boxes[:, [0, 2]].max() <= size[0]
    assert found.boxes[:, [1, 3]].max() <= size[1]


def test_sides_of_proposals_are_compared_in_pixels_of_the_image():
    network = random_network("small")
    image = drawn(3, (64, 64))  # which is seen twice as large
    settings = replace(SETTINGS, min_side=24.0, proposals=1000, pre_nms=0)
    proposals = run(part(graph_of(network, settings), ["image"], ["proposals"]), image=image)["proposals"]
    assert len(proposals) == len(found_by(network, image, settings).proposals) > 0
    assert (proposals[:, 2:] - proposals[:, :2]).min() >= 48


@pytest.mark.parametrize("settings", [
    replace(SETTINGS, regress_boxes=False), replace(SETTINGS, score=0.4, nms=0.6, per_image=7),
    replace(SETTINGS, rpn_nms=0.4, pre_nms=20, proposals=12)])
def test_every_setting_counts(settings):
    network = random_network("small")
    image = drawn(4, SIZES[0])
    found = detected(run(graph_of(network, settings), image=image))
    assert share_found(found_by(network, image, settings).detections, found) >= 0.99


def test_pixels_are_what_the_weights_want():
    network = deepcopy(random_network("small"))
    network.pixels = replace(CAFFE_PIXELS, std=(60.0, 60.0, 60.0))
    image = drawn(5, SIZES[0])
    assert share_found(found_by(network, image).detections, detected(run(graph_of(network), image=image))) >= 0.99


@pytest.mark.parametrize("name", ["small", SHORT])  # fully connected layers, and convolutions, on no RoI
def test_an_image_without_proposals_has_no_detections(name):
    found = run(graph_of(random_network(name), replace(SETTINGS, min_side=1000.0)), image=drawn(0, SIZES[0]))
    assert {each: (values.shape, values.dtype.name) for each, values in found.items()} == {
        "boxes": ((0, 4), "float32"), "scores": ((0,), "float32"), "labels": ((0,), "int64")}


def test_the_model_says_what_it_takes_and_gives():
    model = graph_of(random_network("small"))
    onnx.checker.check_model(model, full_check=True)
    said = {each.key: each.value for each in model.metadata_props}
    assert json.loads(said["classes"]) == list(CLASSES)
    assert json.loads(said["settings"])["min_side"] == 10.0
    assert said["altopt"] == "1"
    assert "uint8 [H, W, 3], RGB" in model.doc_string
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["height", "width", 3])]
    assert [each.name for each in session.get_outputs()] == ["boxes", "scores", "labels"]
