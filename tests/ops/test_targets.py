"""What losses are taken on is drawn where images are read, and a step with it asks the device nothing."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
from altopt.training.loop import PendingStep, freeze, make_optimizer, train_step

CPU = torch.device("cpu")
NETWORK = NetworkConfig(name="small", short_side=80, max_side=96, anchor_scales=(1.5, 3), rpn_channels=8)
ANCHORS = AnchorSampling(0.7, 0.3, per_image=16, positive_fraction=0.5)
ROIS = RoISampling(RoIThresholds(0.5, 0.5, 0.0), 32, 0.25)
SEED = (3, "targets")
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
    return RPNTraining(of.conv, of.rpn, anchors=ANCHORS, sigma=3.0, box_weight=1.0, seed=SEED)


def fast_rcnn(frozen: tuple[str, ...] = ("conv1",)) -> FastRCNNTraining:
    return FastRCNNTraining(network(frozen), rois=ROIS, cls_weight=1.0, box_weight=1.0, seed=SEED)


def joint(frozen: tuple[str, ...] = ("conv1",)) -> JointTraining:
    return JointTraining(network(frozen), anchors=ANCHORS, sigma=3.0, rois=ROIS, path=None, seed=SEED,
                         weights=dict.fromkeys(("rpn_cls", "rpn_box", "cls", "box"), 1.0),
                         proposals=ProposalSettings(pre_nms=200, nms=0.7, post_nms=30, min_side=4))


@pytest.mark.parametrize("make", [rpn, fast_rcnn, joint])
@pytest.mark.parametrize("objects", [2, 0])
def test_what_is_drawn_depends_on_iteration_and_image_alone(make, objects):
    module, samples = make(), [sample(0, objects), sample(1)]

    def drawn(iteration: int, *of: Sample) -> list[torch.Tensor]:
        ready = [module.prepare(each, iteration) for each in of]
        return [torch.as_tensor(value) for each in ready for part in (each.anchors, each.rois) if part is not None
                for value in vars(part).values()]

    together = drawn(5, *samples)
    assert len(together) in (2 * 4, 2 * 5)
    make()(make_batch([module.prepare(each, 5) for each in samples], CPU))  # what else is done does not matter
    assert all(map(torch.equal, together, [*drawn(5, samples[0]), *drawn(5, samples[1])]))
    assert not all(one.shape == other.shape and torch.equal(one, other)
                   for one, other in zip(together, drawn(6, *samples), strict=True))


@pytest.mark.parametrize("kind", [PyramidTraining, WarpedTraining, FastRCNNTraining])
def test_prepared_regions_take_the_place_of_the_proposals(kind):
    """Two thousand boxes need not go to the device when some dozens of them are trained on."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.regions = module.rois = ROIS
    module.seed = SEED
    ready = module.prepare(sample(0), 2)
    assert ready.proposals is None
    assert isinstance(ready.rois, RoISample)
    assert ready.rois.foreground == int((ready.rois.labels > 0).sum()) > 0
    assert (ready.rois.labels[ready.rois.foreground :] == 0).all()


class Asking(TorchDispatchMode):
    """Counts where the processor would have to wait for a GPU: to learn a value or a size, or to bring it numbers."""

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh", "_unique2",
            "nms", "randperm")

    def __init__(self) -> None:
        super().__init__()
        self.asked = Counter[str]()

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        name = op.overloadpacket.__name__
        if name == "index" and any(each is not None and each.dtype == torch.bool for each in arguments[1]):
            name = "nonzero"  # of a mask
        if name in self.ASKS:
            self.asked[name] += 1
        return op(*arguments, **(keywords or {}))


def step(module, samples: list[Sample], config: TrainingConfig = CONFIG) -> tuple[PendingStep, Counter]:
    """Return a step on samples that are prepared, and how often it asked for what."""
    optimizer = make_optimizer(module, config)
    make_batch([sample(0)], CPU)  # what is made once has been made
    ready = [module.prepare(each, 0) for each in samples]
    with Asking() as asking:
        taken = train_step(module, optimizer, make_batch(ready, CPU), config, SingleProcess())
    return taken, asking.asked


@pytest.mark.parametrize(("make", "frozen"), [
    (rpn, ("conv1", "conv2")), (fast_rcnn, ("conv1", "conv2")), (rpn, ALL), (fast_rcnn, ALL),
], ids=["stage 1", "stage 3", "stage 4", "stage 6"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_device(make, frozen, precision):
    module = make(frozen)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    config = TrainingConfig(lr=0.01, clip_gradient=10.0, precision=precision)
    taken, asked = step(module, [sample(0), sample(1)], config)
    assert not asked
    own, losses = taken.losses()
    assert own == losses
    assert all(loss > 0 for loss in losses.values())
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_what_is_drawn_in_the_step_would_ask():
    """Otherwise the test before this one says nothing."""
    module = rpn()
    with Asking() as asking:
        make_batch([module.prepare(sample(0), 0)], CPU)
    assert asking.asked["nonzero"] > 0


@pytest.mark.parametrize("images", [1, 2])
def test_a_step_of_joint_training_waits_eight_times_for_each_image(images):
    """So it is today; whoever makes it fewer times changes the numbers here.

    The proposals are made in the step, so nobody knows their number: the processor asks which boxes are large enough
    (nonzero), which ones suppression keeps (nms), and which RoIs are foreground and which background (nonzero twice).
    It brings the image's size for clipping, of all boxes and again of those kept (lift_fresh twice), and the draws of
    foreground and background where there is more than is wanted, as here (randperm twice).
    """
    module = joint()
    module.rois = replace(ROIS, per_image=4)
    _, asked = step(module, [sample(number) for number in range(images)])
    assert asked == {"nonzero": 3 * images, "nms": images, "lift_fresh": 2 * images, "randperm": 2 * images}
