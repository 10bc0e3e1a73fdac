"""Faster R-CNN put together: filling its parts, and running it on images."""

import pytest
import torch
from torch import Tensor

from altopt.batches.samples import Batch, Sample, make_batch
from altopt.config import DetectionSettings, NetworkConfig, ProposalSettings
from altopt.errors import ArtifactError
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN, detect_on, own_proposals, propose
from altopt.models.dropout import FullyConnected
from altopt.models.fast_rcnn import postprocess_detections
from altopt.models.network_parts import initialise
from altopt.models.rpn import make_proposals
from altopt.models.trunk import image_maps
from altopt.ops import boxes as bx
from altopt.ops.roi_pool import roi_pool
from altopt.ops.roi_sample import roi_sample

CPU = torch.device("cpu")
NETWORK = NetworkConfig(name="small", anchor_scales=(1.0, 2.0), rpn_channels=8)
CLASSES = 3
PARTS = ("conv", "rpn", "fc", "head")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Return the weights of a whole network."""
    network = FasterRCNN(NETWORK, CLASSES)
    network.conv.to_empty(device=CPU)
    random = generator("conv")
    for name, layer in network.conv.named_modules():
        initialise(name, layer, random)
    conv = {f"conv.{name}": tensor for name, tensor in network.conv.state_dict().items()}
    network.fill(conv, generator("heads"))
    with torch.no_grad():
        network.head.bbox_pred.weight.mul_(50)
        network.head.cls_score.weight.mul_(20)
        network.head.renormalise(torch.full((CLASSES + 1, 4), 0.01), torch.full((CLASSES + 1, 4), 0.2))
    return network.tensors(PARTS)


def network_of(tensors: dict[str, Tensor], fresh: tuple[str, ...] = ()) -> FasterRCNN:
    network = FasterRCNN(NETWORK, CLASSES)
    network.fill(tensors, generator("fill"), fresh)
    return network.eval()


def only(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in parts}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def images(*sizes: tuple[int, int]) -> Batch:
    random = generator("images")
    return make_batch([
        Sample(str(n), False, torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random), 1.0,
               torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        for n, (width, height) in enumerate(sizes)], CPU)


def proposed(network: FasterRCNN, batch: Batch, settings: ProposalSettings) -> list[tuple[Tensor, Tensor]]:
    return propose(network, image_maps(network.conv, batch), batch, settings)


def test_weights_go_in_and_come_out_bit_equal(tensors):
    network = FasterRCNN(NETWORK, CLASSES)
    assert network.fill(tensors, generator(0)) == []
    assert equal(network.tensors(PARTS), tensors)
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in network.parameters())


def test_every_tensor_of_a_checkpoint_is_plain(tensors):
    assert {name.split(".")[0] for name in tensors} == set(PARTS)
    assert {"head.bbox_means", "head.bbox_stds", "conv.conv1.0.weight", "fc.fc6.weight"} <= set(tensors)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    network = network_of(tensors).to(memory_format=torch.channels_last)
    assert not network.conv.get_parameter("conv2.1.weight").is_contiguous()
    assert all(tensor.is_contiguous() for tensor in network.tensors(PARTS).values())


def test_only_the_named_parts_come_out(tensors):
    found = network_of(tensors).tensors(["rpn", "conv"])
    assert equal(found, only(tensors, "conv", "rpn"))


def test_missing_parts_are_drawn_and_named(tensors):
    network = FasterRCNN(NETWORK, CLASSES)
    assert network.fill(only(tensors, "conv", "fc"), generator(1)) == ["rpn", "head"]
    assert equal(network.tensors(["conv", "fc"]), only(tensors, "conv", "fc"))
    assert network.rpn.conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert network.head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert network.head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert network.head.bbox_means.eq(0).all()
    assert network.head.bbox_stds.eq(1).all()
    for layer in (network.rpn.conv, network.rpn.cls_score, network.rpn.bbox_pred, network.head.cls_score):
        assert layer.bias.eq(0).all()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_fully_connected_layers_are_drawn_by_he(tensors):
    network = FasterRCNN(NETWORK, CLASSES)
    assert network.fill(only(tensors, "conv"), generator(1)) == ["rpn", "fc", "head"]
    assert network.fc.get_parameter("fc6.weight").std().item() == pytest.approx((2 / (128 * 36)) ** 0.5, rel=0.02)
    assert network.fc.get_parameter("fc7.bias").eq(0).all()


def test_fresh_parts_are_drawn_although_they_are_there(tensors):
    network = FasterRCNN(NETWORK, CLASSES)
    assert network.fill(tensors, generator(1), fresh=("head", "rpn")) == ["rpn", "head"]
    assert not torch.equal(network.rpn.conv.weight, tensors["rpn.conv.weight"])
    assert network.head.bbox_stds.eq(1).all()
    assert equal(network.tensors(["conv", "fc"]), only(tensors, "conv", "fc"))


def test_a_fresh_head_is_small_in_the_units_of_its_statistics_and_a_trained_one_keeps_its_boxes(tensors):
    means, stds = torch.full((CLASSES + 1, 4), 0.1), torch.full((CLASSES + 1, 4), 0.05)
    fresh = network_of(tensors, fresh=("head",))
    trained = network_of({name: tensor.clone() for name, tensor in tensors.items()})
    hidden = torch.rand(3, fresh.head.bbox_pred.in_features)
    before = trained.head.deltas(trained.head(hidden)[1])
    for network in (fresh, trained):
        network.use_box_statistics(means, stds)
        assert torch.equal(network.head.bbox_stds, stds)
    assert fresh.head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    torch.testing.assert_close(trained.head.deltas(trained.head(hidden)[1]), before)


def test_what_is_drawn_depends_on_the_generator_alone(tensors):
    given = only(tensors, "conv")
    torch.manual_seed(1)
    one, again, other = FasterRCNN(NETWORK, 3), FasterRCNN(NETWORK, 3), FasterRCNN(NETWORK, 3)
    one.fill(given, generator("a"))
    torch.manual_seed(2)
    again.fill(given, generator("a"))
    other.fill(given, generator("b"))
    assert equal(one.tensors(PARTS), again.tensors(PARTS))
    assert not torch.equal(*(each.fc.get_parameter("fc6.weight") for each in (one, other)))


def test_missing_convolutions_are_an_error(tensors):
    with pytest.raises(ArtifactError, match="conv"):
        FasterRCNN(NETWORK, CLASSES).fill(only(tensors, "rpn", "fc", "head"), generator(0))


@pytest.mark.parametrize("fresh", [(), ("conv",)])
def test_a_missing_convolution_or_one_of_another_shape_is_an_error(tensors, fresh):
    lacking = {name: tensor for name, tensor in tensors.items() if name != "conv.conv3.1.weight"}
    with pytest.raises(ArtifactError, match=r"conv\.conv3\.1"):
        FasterRCNN(NETWORK, CLASSES).fill(lacking, generator(0), fresh)
    other = tensors | {"conv.conv3.1.weight": tensors["conv.conv3.1.weight"][:, :5]}
    with pytest.raises(ArtifactError, match=r"conv\.conv3\.1"):
        FasterRCNN(NETWORK, CLASSES).fill(other, generator(0), fresh)


def test_a_head_of_other_classes_is_drawn_anew(tensors):
    network = FasterRCNN(NETWORK, CLASSES + 1)
    assert network.fill(tensors, generator(0)) == ["head"]
    assert network.new_head
    assert network.head.bbox_stds.eq(1).all()
    assert network.head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)


def test_two_networks_filled_from_the_same_tensors_compute_the_same(tensors):
    batch = images((96, 64))
    one, other = network_of(tensors), network_of(tensors)
    with torch.no_grad():
        assert torch.equal(one.conv(batch.images), other.conv(batch.images))
    first, second = (proposed(network, batch, ProposalSettings())[0] for network in (one, other))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_proposals_of_a_batch_are_those_of_its_images(tensors):
    network, batch = network_of(tensors), images((96, 64), (64, 96))
    settings = ProposalSettings(post_nms=50)
    for sample, (boxes, scores) in zip(batch.samples, proposed(network, batch, settings), strict=True):
        with torch.inference_mode():
            features = network.conv(make_batch([sample], CPU).images)
            logits, deltas = network.rpn(features)
            expected = make_proposals(logits[0], deltas[0], network.rpn.anchors_on(features[0]), sample, settings)
        assert torch.equal(boxes, expected[0])
        assert torch.equal(scores, expected[1])
        assert 0 < len(boxes) <= 50
        assert bx.inside(boxes, sample.size).all()


SETTINGS = DetectionSettings(score=0.01, proposals=40, per_image=30)


def detected(network: FasterRCNN, batch: Batch, proposals: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return detect_on(network, image_maps(network.conv, batch), batch, proposals, SETTINGS)


def test_detections_leave_the_units_of_the_head_and_keep_their_image(tensors):
    network, batch = network_of(tensors), images((96, 64), (64, 96))
    proposals = [boxes for boxes, _ in proposed(network, batch, ProposalSettings(post_nms=20))]
    proposals[1] = proposals[1][:7]
    found = detected(network, batch, proposals)
    with torch.inference_mode():
        for b, rois in enumerate(proposals):
            pooled = roi_pool(network.conv(make_batch(batch.samples[b : b + 1], CPU).images), [rois], 6, 1 / 16)
            logits, normalised = network.head(network.fc(pooled.flatten(1)))
            plain = normalised * 0.2 + 0.01  # the statistics of the fixture
            expected = postprocess_detections(logits, plain, rois, batch.samples[b].size, SETTINGS)
            assert len(expected[0]) > 3
            for one, other in zip(found[b], expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_new_statistics_leave_detections_as_they_are(tensors):
    batch = images((96, 64))
    network, other = network_of(tensors), network_of({name: tensor.clone() for name, tensor in tensors.items()})
    other.head.renormalise(torch.full((CLASSES + 1, 4), -0.3), torch.full((CLASSES + 1, 4), 0.05))
    assert not torch.allclose(network.head.bbox_pred.weight, other.head.bbox_pred.weight)
    proposals = [proposed(network, batch, ProposalSettings(post_nms=20))[0][0]]
    for one, two in zip(detected(network, batch, proposals)[0], detected(other, batch, proposals)[0], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_images_without_proposals_have_no_detections(tensors):
    network, batch = network_of(tensors), images((96, 64), (96, 64))
    none = torch.zeros(0, 4)
    some = torch.tensor([[0.0, 0, 60, 60]])
    for proposals in ([none, none], [none, some]):
        found = detected(network, batch, proposals)
        assert [len(boxes) == 0 for boxes, _, _ in found] == [len(each) == 0 for each in proposals]
        assert found[0][0].shape == (0, 4)


def test_the_smallest_image_goes_through(tensors):
    network, batch = network_of(tensors), images((16, 16))
    proposals = [boxes for boxes, _ in proposed(network, batch, ProposalSettings(min_side=4))]
    assert len(detected(network, batch, proposals)) == 1


def test_rois_are_pooled_by_the_op_that_the_network_says(tensors):
    network, features = network_of(tensors), [torch.randn(128, 6, 8, generator=generator("features"))]
    boxes = [torch.tensor([[0.0, 0, 80, 60], [20, 20, 21, 21]])]
    assert torch.equal(network.pool(features, boxes), roi_pool(features, boxes, 6, 1 / 16))
    network.samples_per_bin = 2
    assert torch.equal(network.pool(features, boxes), roi_sample(features, boxes, 6, 1 / 16, 2))
    assert not torch.allclose(network.pool(features, boxes), roi_pool(features, boxes, 6, 1 / 16))


def test_proposals_at_test_time_follow_the_detection_settings():
    settings = own_proposals(DetectionSettings(pre_nms=11, rpn_nms=0.6, proposals=5, min_side=3.0))
    assert settings == ProposalSettings(pre_nms=11, nms=0.6, post_nms=5, min_side=3.0)


def test_unfilled_networks_take_no_memory():
    network = FasterRCNN(NetworkConfig(name="vgg16"), 20)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert isinstance(network.fc, FullyConnected)
    assert network.roi_size == 7
