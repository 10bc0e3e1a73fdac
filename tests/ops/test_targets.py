"""What losses are taken on: drawn ahead or in the step it is the same, and a step with it asks the device nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import altopt.ops.roi_pool
from altopt.batches.samples import Sample, make_batch
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.config import NetworkConfig, ProposalSettings, TrainingConfig
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.fast_rcnn import FastRCNNTraining
from altopt.models.joint import JointTraining
from altopt.models.region_classifier import PyramidTraining, WarpedTraining
from altopt.models.rpn import AnchorSampling, RPNTraining
from altopt.ops.targets import RoISample
from altopt.training.loop import freeze, make_optimizer, prepared, train_step

CPU = torch.device("cpu")
NETWORK = NetworkConfig(name="small", short_side=80, max_side=96, anchor_scales=(1.5, 3), rpn_channels=8)
ANCHORS = AnchorSampling(0.7, 0.3, 16, 0.5, 3.0, 1.0)
ROIS = RoISampling(RoIThresholds(0.5, 0.5, 0.0), 32, 0.25)
KEY = (3, "targets")
CONFIG = TrainingConfig(lr=0.01, clip_gradient=10.0)


def sample(number: int, objects: int = 2) -> Sample:
    width, height = ((96, 80), (64, 96))[number]
    random = generator("targets", number)
    corners = torch.rand(30, 2, generator=random) * torch.tensor([width - 32, height - 32])
    boxes = torch.cat([corners, corners + 16 + 16 * torch.rand(30, 2, generator=random)], dim=1)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    return Sample(str(number), number == 1, pixels, 1.0, boxes[:objects], torch.arange(objects), boxes[2:])


def network(frozen: tuple[str, ...]) -> FasterRCNN:
    made = FasterRCNN(NETWORK, 2)
    made.conv.to_empty(device="cpu")
    conv = {f"conv.{name}": torch.randn(tensor.shape, generator=generator(name)) * 0.1
            for name, tensor in made.conv.state_dict().items()}
    made.fill(conv, generator("targets"))
    freeze(made.conv, frozen)
    return made.to(memory_format=torch.channels_last).train()


ALL = ("conv1", "conv2", "conv3", "conv4", "conv5")


def rpn(frozen: tuple[str, ...] = ("conv1",)) -> RPNTraining:
    of = network(frozen)
    return RPNTraining(of.conv, of.rpn, ANCHORS, KEY)


def fast_rcnn(frozen: tuple[str, ...] = ("conv1",)) -> FastRCNNTraining:
    of = network(frozen)
    return FastRCNNTraining(of.conv, of.fc, of.head, roi_size=of.roi_size, rois=ROIS, box_weight=1.0, key=KEY)


def joint(frozen: tuple[str, ...] = ("conv1",)) -> JointTraining:
    return JointTraining(network(frozen), anchors=ANCHORS, rois=ROIS, path=None, key=KEY,
                         weights=dict.fromkeys(("rpn_cls", "rpn_box", "cls", "box"), 1.0),
                         proposals=ProposalSettings(pre_nms=200, nms=0.7, post_nms=30, min_side=4))


@pytest.mark.parametrize("make", [rpn, fast_rcnn, joint])
@pytest.mark.parametrize("objects", [2, 0])
def test_drawn_ahead_or_in_the_step_is_the_same(make, objects):
    module, samples = make(), [sample(0, objects), sample(1)]
    ahead = prepared(module, samples, 5, CPU)
    assert all(each.anchors is not None or each.rois is not None for each in ahead)
    now, then = module(make_batch(samples, CPU), 5), module(make_batch(ahead, CPU), 5)
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in now)
    other = module(make_batch(prepared(module, samples, 6, CPU), CPU), 6)
    assert any(not torch.equal(now[name], other[name]) for name in now)


@pytest.mark.parametrize("kind", [PyramidTraining, WarpedTraining, FastRCNNTraining])
def test_prepared_regions_take_the_place_of_the_proposals(kind):
    """Two thousand boxes need not go to the device when some dozens of them are trained on."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.regions = module.rois = ROIS
    module.key = KEY
    ready = module.prepare(sample(0), 2)
    assert ready.proposals is None
    assert isinstance(ready.rois, RoISample)
    assert ready.rois.foreground == int((ready.rois.labels > 0).sum()) > 0
    assert (ready.rois.labels[ready.rois.foreground :] == 0).all()


class Asking(TorchDispatchMode):
    """Fails where the processor would have to wait for a GPU: to learn a value or a size, or to bring it numbers."""

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh", "_unique2")

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        name = op.overloadpacket.__name__
        if name == "index" and any(each is not None and each.dtype == torch.bool for each in arguments[1]):
            name = "nonzero"  # of a mask
        assert name not in self.ASKS, f"{op} in a step"
        return op(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("make", "frozen"), [
    (rpn, ("conv1", "conv2")), (fast_rcnn, ("conv1", "conv2")), (rpn, ALL), (fast_rcnn, ALL),
], ids=["stage 1", "stage 3", "stage 4", "stage 6"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_device(monkeypatch, make, frozen, precision):
    """With RoI pooling as it is on a GPU."""
    chosen = altopt.ops.roi_pool._kernel_for
    monkeypatch.setattr(altopt.ops.roi_pool, "_kernel_for",
                        lambda device, learned: chosen(torch.device("cuda"), learned))
    module = make(frozen)
    config = TrainingConfig(lr=0.01, clip_gradient=10.0, precision=precision)
    optimizer = make_optimizer(module, config)
    make_batch([sample(0)], CPU)  # what is made once has been made
    samples = prepared(module, [sample(0), sample(1)], 0, CPU)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    with Asking():
        taken = train_step(module, optimizer, make_batch(samples, CPU), config, 0, KEY, SingleProcess())
    own, losses = taken.losses()
    assert own == losses
    assert all(loss > 0 for loss in losses.values())
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_what_is_drawn_in_the_step_would_ask():
    """Otherwise the test before this one says nothing."""
    module = rpn()
    with pytest.raises(AssertionError, match="nonzero"), Asking():
        train_step(module, make_optimizer(module, CONFIG), make_batch([sample(0)], CPU), CONFIG, 0, KEY,
                   SingleProcess())
