import pytest
import torch

from altopt.batches.samples import Sample
from altopt.config import DetectionSettings, NetworkConfig, ProposalSettings
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.detector import FasterRCNN
from altopt.models.network_parts import initialise
from altopt.training.loop import freeze
from benchmarks.bench.torchvision_detector import torchvision_detector, torchvision_input

CONFIG = NetworkConfig(name="small", short_side=64, max_side=96, anchor_scales=(1.0, 2.0), rpn_channels=128)


@pytest.fixture
def network():
    conv = backbones.build("small").conv
    random = generator("conv")
    for name, layer in conv.named_modules():
        initialise(name, layer, random)
    network = FasterRCNN(CONFIG, 5)
    network.fill({f"conv.{name}": tensor for name, tensor in conv.state_dict().items()}, generator("rest"))
    freeze(network, ["conv.conv1"])
    with torch.no_grad():
        for name, each in network.named_parameters():
            if name.endswith("bias"):
                each.normal_(generator=generator(name))
    return network.eval()


@pytest.fixture
def detector(network):
    return torchvision_detector(network, CONFIG, ProposalSettings(pre_nms=500, post_nms=100),
                                DetectionSettings(pre_nms=50, proposals=20), rois_per_image=16).eval()


@torch.no_grad()
def test_it_computes_what_the_network_computes(network, detector):
    features = network.conv(torch.randn(1, 3, 64, 96, generator=generator("image")))
    torch.testing.assert_close(detector.backbone(torch.zeros(1, 3, 64, 96)), network.conv(torch.zeros(1, 3, 64, 96)))
    logits, deltas = network.rpn(features)
    (objectness,), (regression,) = detector.rpn.head([features])
    scores = objectness.permute(0, 2, 3, 1).reshape(1, -1)
    torch.testing.assert_close(scores.sigmoid(), logits.softmax(dim=2)[..., 1])
    count = len(CONFIG.anchor_ratios) * len(CONFIG.anchor_scales)
    torch.testing.assert_close(regression.unflatten(1, (count, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3), deltas)
    pooled = torch.randn(3, 128, 6, 6, generator=generator("pooled"))
    expected_logits, expected_deltas = network.head(network.fc(pooled.flatten(1)))
    found_logits, found_deltas = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))
    torch.testing.assert_close(found_logits, expected_logits)
    torch.testing.assert_close(found_deltas, expected_deltas.flatten(1))


def test_it_has_as_many_anchors_in_the_same_order(network, detector):
    cells = detector.rpn.anchor_generator.cell_anchors[0]
    assert len(cells) == len(CONFIG.anchor_ratios) * len(CONFIG.anchor_scales)
    sides = cells[:, 2:] - cells[:, :2]
    assert (sides[:2, 0] > sides[:2, 1]).all()  # ratio 0.5 first: wide
    assert sides[3].tolist() == [32, 32]  # then squares, of the smaller scale first


def test_the_same_layers_are_frozen_and_the_weights_are_its_own(network, detector):
    assert [each.requires_grad for each in detector.backbone.parameters()] == \
        [each.requires_grad for each in network.conv.parameters()]
    pairs = zip(detector.backbone.parameters(), network.conv.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in pairs)


def test_it_trains_and_detects(detector):
    pixels = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8, generator=generator("pixels"))
    sample = Sample("a", False, pixels, 1.0, torch.tensor([[10.0, 10, 40, 50]]), torch.tensor([2]))
    image, target = torchvision_input(sample, torch.device("cpu"))
    assert image.max() <= 1
    assert target["labels"].tolist() == [3]
    losses = detector.train()([image], [target])
    assert len(losses) == 4
    assert all(loss.isfinite() for loss in losses.values())
    assert set(detector.eval()([image])[0]) == {"boxes", "labels", "scores"}
