"""A network as a Faster R-CNN of torchvision's: each part beside ours on equal inputs, and the whole."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from exported_networks import (
    CLASSES,
    EACH_NETWORK,
    SETTINGS,
    SIZES,
    config_of,
    drawn,
    found_by,
    mean_ap,
    random_network,
    settings_of,
    share_found,
    sizes_for,
)
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from altopt.config import DetectionSettings
from altopt.errors import UsageError
from altopt.evaluation.detections import Detections
from altopt.models.detector import FasterRCNN as OurFasterRCNN
from altopt.models.exported_detector import Detector, layers
from altopt.models.imagenet import CAFFE_PIXELS
from altopt.models.torchvision_export import as_torchvision, plain, plan


def exported(network: OurFasterRCNN, settings: DetectionSettings = SETTINGS) -> Detector:
    return as_torchvision(network, network.rpn.network, CLASSES, settings)[0]


@torch.inference_mode()
def detected(detector: Detector, image: np.ndarray) -> Detections:
    """What the detector finds; labels from 0, as ours."""
    [found] = detector([torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255])
    return Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1)


def close(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@EACH_NETWORK
@torch.inference_mode()
def test_every_part_gives_what_ours_gives(name):
    network = random_network(name)
    detector = exported(network)
    assert isinstance(detector, FasterRCNN)
    ours = found_by(network, drawn(1, SIZES[1]), settings_of(name))
    assert close(detector.backbone(ours.batch.images)[0], ours.features)
    [objectness], [deltas] = detector.rpn.head([ours.features[None]])  # (1, A, h, w), (1, 4 * A, h, w)
    logits = ours.rpn[0][:, 1] - ours.rpn[0][:, 0]
    assert close(objectness[0].permute(1, 2, 0).flatten(), logits)
    assert close(deltas[0].permute(1, 2, 0).reshape(-1, 4), ours.rpn[1])
    pooled = detector.roi_heads.box_roi_pool({"0": ours.features[None]}, [ours.proposals], [])
    assert torch.equal(pooled, ours.pooled)
    scores, boxes = detector.roi_heads.box_predictor(detector.roi_heads.box_head(ours.pooled))
    assert close(scores, ours.head[0])
    assert close(boxes.unflatten(1, (-1, 4)), ours.head[1])


@EACH_NETWORK
def test_the_whole_finds_what_ours_finds(name):
    network, settings = random_network(name), settings_of(name)
    detector = exported(network, settings)
    for number, size in enumerate(sizes_for(name)):
        image = drawn(number, size)
        ours = found_by(network, image, settings).detections
        assert len(ours) >= 5
        assert len(np.unique(ours.labels)) > 1
        assert share_found(ours, detected(detector, image)) >= 0.99


def test_the_map_is_the_same():
    network = random_network("small")
    detector = exported(network)
    images = [drawn(number, size) for number in range(3) for size in SIZES]
    ours = [found_by(network, image).detections for image in images]
    theirs = [detected(detector, image) for image in images]
    assert 0.1 < mean_ap(ours, ours) < 0.9
    assert abs(mean_ap(theirs, ours) - mean_ap(ours, ours)) <= 1e-3


@pytest.mark.parametrize("size", [(64, 96), (250, 333), (400, 131), (40, 400)])
def test_images_of_other_sizes_are_resized_as_ours(size):
    network = random_network("small")
    image = drawn(7, size)
    assert share_found(found_by(network, image).detections, detected(exported(network), image)) >= 0.99


def test_sides_of_proposals_are_compared_in_pixels_of_the_image():
    network = random_network("small")
    image = drawn(3, (64, 64))  # which is seen twice as large
    found = [found_by(network, image, replace(SETTINGS, min_side=side, proposals=1000, pre_nms=0)) for side in (0, 24)]
    assert 0 < len(found[1].proposals) < len(found[0].proposals)
    detector = exported(network, replace(SETTINGS, min_side=24.0, proposals=1000, pre_nms=0))
    sizes: list[int] = []
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, given: sizes.append(len(given[1][0])))
    detected(detector, image)
    assert sizes == [len(found[1].proposals)]


@pytest.mark.parametrize("settings", [
    replace(SETTINGS, regress_boxes=False), replace(SETTINGS, score=0.4, nms=0.6, per_image=7),
    replace(SETTINGS, rpn_nms=0.4, pre_nms=20, proposals=12)])
def test_every_setting_counts(settings):
    network = random_network("small")
    image = drawn(4, SIZES[0])
    ours, usual = (found_by(network, image, each).detections for each in (settings, SETTINGS))
    assert share_found(ours, usual) < 0.9
    assert share_found(ours, detected(exported(network, settings), image)) >= 0.99


def test_pixels_are_what_the_weights_want():
    network = deepcopy(random_network("small"))
    network.pixels = replace(CAFFE_PIXELS, std=(60.0, 60.0, 60.0))
    image = drawn(5, SIZES[0])
    ours = found_by(network, image).detections
    assert share_found(ours, found_by(random_network("small"), image).detections) < 0.5
    assert share_found(ours, detected(exported(network), image)) >= 0.99


def test_an_image_without_proposals_has_no_detections():
    found = detected(exported(random_network("small"), replace(SETTINGS, min_side=1000.0)), drawn(0, SIZES[0]))
    assert (found.boxes.shape, found.labels.dtype) == ((0, 4), np.int64)


def test_several_images_give_what_each_gives():
    detector = exported(random_network("small"))
    images = [torch.from_numpy(drawn(n, size).transpose(2, 0, 1).copy()).float() / 255 for n, size in enumerate(SIZES)]
    with torch.inference_mode():
        together, alone = detector(images), [detector([image])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["boxes"], other["boxes"])


def test_a_plan_makes_the_same_layers_again():
    plain_layers = plain(random_network("squeezenet1_1").conv)
    again = layers(plan(plain_layers))
    again.load_state_dict(plain_layers.state_dict())
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(again(image), plain_layers(image))


def test_what_cannot_be_exported_is_refused():
    network = deepcopy(random_network("small"))
    network.samples_per_bin = 2
    with pytest.raises(UsageError, match=r"samples RoIs bilinearly.*export one of another scheme"):
        as_torchvision(network, config_of("small"), CLASSES, SETTINGS)
    with pytest.raises(TypeError, match="Softplus has no counterpart"):
        plain(nn.Sequential(nn.Softplus()))
