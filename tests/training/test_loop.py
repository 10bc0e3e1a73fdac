"""The training loop: its schedules, its steps by hand, and that interruptions leave no trace."""

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altopt.batches.samples import Batch, Sample
from altopt.config import TrainingConfig
from altopt.errors import DivergedError, UsageError
from altopt.machine.randomness import generator
from altopt.models import backbones
from altopt.models.losses import Loss, LossModule
from altopt.training import loop as training
from altopt.training.loop import LoopRuntime, Progress, freeze, layers_named, learning_rate, make_optimizer, train

CPU = torch.device("cpu")


def config(**settings: Any) -> TrainingConfig:
    return replace(TrainingConfig(iterations=7, lr=0.05, lr_steps=(4,), images_per_batch=2), **settings)


class Classifier(LossModule):
    """Two blocks, dropout, a buffer and a score: all that the loop has to carry through an interruption."""

    def __init__(self, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv1", nn.Conv2d(3, 4, 3))
        self.conv.add_module("conv2", nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
        self.fc = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        random = generator("classifier")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=random)
        freeze(self.conv, frozen)
        self.seen: list[list[str]] = []

    def forward(self, batch: Batch) -> dict[str, Loss]:
        self.seen.append([sample.id for sample in batch.samples])
        logits = self.fc(self.conv(batch.images).mean(dim=(2, 3)))
        labels = torch.cat([sample.gt_labels for sample in batch.samples])
        cls = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return {"cls": Loss(cls, len(labels)), "size": Loss(logits.float().square().sum(), logits.numel())}


def read(iteration: int) -> list[Sample]:
    samples = []
    for k in range(2):
        id = f"{iteration:02}-{k}"
        pixels = torch.randint(0, 256, (3, 8 + k, 9), dtype=torch.uint8, generator=generator(id))
        label = torch.tensor([(iteration + k) % 3])
        samples.append(Sample(id, k == 1, pixels, 1.0, torch.zeros(0, 4), label))
    return samples


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(settings: TrainingConfig, module: Classifier | None = None, **options: Any) -> dict[str, Tensor]:
    module = module or Classifier()
    train(module, read, settings, (3, "test"), LoopRuntime(device=CPU, **options))
    return weights(module)


def test_step_schedule():
    step = config(iterations=80_000, lr=1e-3, lr_steps=(60_000,))
    rates = [learning_rate(step, iteration) for iteration in (0, 59_999, 60_000, 79_999)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    two = config(lr=1.0, lr_steps=(2, 5), lr_gamma=0.5)
    assert [learning_rate(two, iteration) for iteration in range(7)] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert learning_rate(config(lr=0.3, lr_steps=()), 6) == 0.3


def test_warm_up_grows_linearly_and_ends_at_the_full_rate():
    warm = config(lr=1.0, warmup=4, lr_steps=(6,))
    rates = [learning_rate(warm, iteration) for iteration in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1])


def test_one_cycle_warms_up_and_falls_as_a_cosine():
    cycle = config(iterations=12, lr=2.0, schedule="one-cycle", warmup=4, lr_steps=(1,))
    rates = [learning_rate(cycle, iteration) for iteration in range(12)]
    assert rates[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert rates[6] == pytest.approx(2 * 0.5 * (1 + math.sqrt(0.5)))  # a quarter of the way
    assert rates[8] == pytest.approx(1)
    assert rates[10] == pytest.approx(2 * 0.5 * (1 - math.sqrt(0.5)))
    assert 0 < rates[11] < rates[10]
    assert learning_rate(config(iterations=12, lr=2.0, schedule="one-cycle"), 0) == 2


class OneNumber(LossModule):
    """A weight and a bias, each with a gradient of 1 at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    def forward(self, batch: Batch) -> dict[str, Loss]:
        return {"weight": Loss(3 * self.weight.sum(), 3), "bias": Loss(self.bias.sum(), 1)}


def by_hand(start: float, rates: list[float], momentum: float, decay: float) -> float:
    """Return the weight after steps of gradient 1, as Caffe's and torch's SGD make them."""
    value, velocity = start, 0.0
    for rate in rates:
        velocity = momentum * velocity + 1 + decay * value
        value -= rate * velocity
    return value


@pytest.mark.parametrize(("settings", "bias_rate", "bias_decay"), [
    ({}, 2, 0.01), ({"bias_lr": 1.0}, 1, 0.01), ({"bias_decay": 0.0}, 2, 0),
    ({"bias_lr": 4.0, "bias_decay": 0.5}, 4, 0.005),
])
def test_steps_by_hand(settings, bias_rate, bias_decay):
    """Biases learn at twice the rate and decay like weights, unless a recipe says otherwise."""
    module = OneNumber()
    given = config(iterations=3, lr=0.1, lr_steps=(2,), momentum=0.9, weight_decay=0.01, **settings)
    train(module, read, given, (), LoopRuntime(device=CPU))
    rates = [0.1, 0.1, 0.01]
    assert module.weight.item() == pytest.approx(by_hand(2, rates, 0.9, 0.01), rel=1e-12)
    assert module.bias.item() == pytest.approx(by_hand(3, [bias_rate * r for r in rates], 0.9, bias_decay), rel=1e-12)


def test_conv_layers_have_a_rate_of_their_own():
    """The RPN's 3 x 3 convolution is no conv layer in this sense; biases' factor comes on top."""
    module = nn.ModuleDict({"conv": OneNumber(), "trunk": nn.ModuleDict({"conv": OneNumber()}),
                            "rpn": nn.ModuleDict({"conv": OneNumber()})})
    groups = make_optimizer(module, config(conv_lr=0.1)).param_groups
    rates = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    assert {name: rates[id(parameter)] for name, parameter in module.named_parameters()} == pytest.approx({
        "conv.weight": 0.1, "conv.bias": 0.2, "trunk.conv.weight": 0.1, "trunk.conv.bias": 0.2,
        "rpn.conv.weight": 1.0, "rpn.conv.bias": 2.0})


def test_gradients_are_clipped_together():
    module = OneNumber()
    train(module, read, config(iterations=1, lr=1.0, momentum=0.0, weight_decay=0.0, bias_lr=1.0, clip_gradient=0.5),
          (), LoopRuntime(device=CPU))
    assert 2 - module.weight.item() == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)
    assert 3 - module.bias.item() == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)


def test_frozen_blocks_stay_bit_equal_and_out_of_the_optimizer():
    module = Classifier(frozen=("conv1",))
    before = weights(module)
    held = {id(p) for group in make_optimizer(module, config()).param_groups for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in held}
    assert names == {"conv.conv2.0.weight", "conv.conv2.1.weight", "conv.conv2.1.bias",
                     "fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}
    after = trained(config(weight_decay=0.1), module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed >= names
    assert not any(name.startswith("conv.conv1") for name in changed)
    assert module.conv.get_parameter("conv1.weight").grad is None


def test_each_iteration_trains_on_its_own_images():
    module = Classifier()
    trained(config(), module)
    assert module.seen == [[f"{t:02}-0", f"{t:02}-1"] for t in range(7)]


class Drawing(Classifier):
    """Notes what is drawn for an iteration, and which one a batch is for."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, int]] = []
        self.iterations: list[int] = []

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        self.drawn.append((sample.id, iteration))
        return replace(sample, id=f"{sample.id} drawn for {iteration}")

    def forward(self, batch: Batch) -> dict[str, Loss]:
        self.iterations.append(batch.iteration)
        return super().forward(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_prepared_for_their_iteration_where_they_are_read(workers):
    module = Drawing()
    trained(config(), module, workers=workers)
    assert sorted(module.drawn) == [(f"{t:02}-{k}", t) for t in range(7) for k in range(2)]
    assert module.iterations == list(range(7))
    assert module.seen == [[f"{t:02}-{k} drawn for {t}" for k in range(2)] for t in range(7)]
    assert equal(weights(module), trained(config()))


def test_the_same_seed_trains_the_same_weights_and_another_does_not():
    first = trained(config())
    torch.rand(100)  # what ran before does not matter
    assert equal(first, trained(config()))
    module = Classifier()
    train(module, read, config(), (4, "test"), LoopRuntime(device=CPU))
    assert not equal(first, weights(module))  # another seed, another dropout


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_does_not_matter(workers):
    assert equal(trained(config()), trained(config(), workers=workers))


class Kept:
    """Snapshots in memory, taken after every iteration."""

    def __init__(self, begin: tuple[int, dict[str, Tensor], float] | None = None) -> None:
        self.begin = begin
        self.states: dict[int, tuple[int, dict[str, Tensor], float]] = {}

    def load(self) -> tuple[int, dict[str, Tensor], float] | None:
        return self.begin

    def due(self) -> bool:
        return True

    def save(self, iteration: int, tensors: dict[str, Tensor], seconds: float) -> None:
        self.states[iteration] = (iteration, {name: tensor.clone() for name, tensor in tensors.items()}, seconds)


class Seldom(Kept):
    """Snapshots after every second iteration."""

    asked = 0

    def due(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 0


@pytest.mark.parametrize("schedule", ["step", "one-cycle"])
@pytest.mark.parametrize("frozen", [(), ("conv1",)])
def test_a_run_resumed_at_any_iteration_ends_bit_equal(schedule, frozen):
    settings = config(schedule=schedule, warmup=2)
    kept = Kept()
    uninterrupted = trained(settings, Classifier(frozen), snapshots=kept)
    assert sorted(kept.states) == [1, 2, 3, 4, 5, 6]  # none after the last iteration: the checkpoint follows
    assert equal(uninterrupted, trained(settings, Classifier(frozen)))  # saving changes nothing
    for iteration, state in kept.states.items():
        module = Classifier(frozen)
        resumed = trained(settings, module, snapshots=Kept(state), workers=2)
        assert len(module.seen) == 7 - iteration
        assert equal(resumed, uninterrupted), f"resumed at {iteration}"


def test_a_resumed_run_continues_the_clock():
    kept = Kept()
    trained(config(), snapshots=kept)
    iteration, tensors, _ = kept.states[3]
    reports: list[Progress] = []
    seconds = train(Classifier(), read, config(), (3, "test"), LoopRuntime(
        device=CPU, report=reports.append, snapshots=Kept((iteration, tensors, 1000.0))))
    assert 1000 < seconds < 1100
    assert 1000 < reports[-1].seconds <= seconds


def test_a_frozen_parameter_is_not_part_of_the_snapshot():
    kept = Kept()
    trained(config(), Classifier(("conv1",)), snapshots=kept)
    names = set(kept.states[1][1])
    assert not any("conv1" in name for name in names)
    assert {"weight.fc.0.weight", "momentum.fc.0.weight", "buffer.conv.conv2.1.running_mean"} <= names


class Breaking(Classifier):
    """A loss of ``value`` at the fourth iteration."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, batch: Batch) -> dict[str, Loss]:
        losses = super().forward(batch)
        broken = Loss(losses["size"].total * self.value, losses["size"].count)
        return losses | {"size": broken} if batch.iteration == 3 else losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_its_step(value):
    kept: list[Any] = []
    module, batches = Breaking(value), []

    def diverged(batch: Batch, iteration: int) -> str:
        batches.append((batch, iteration))
        return " (kept in batch.pt)"

    with pytest.raises(DivergedError) as error:
        train(module, read, config(), (3, "test"),
              LoopRuntime(device=CPU, diverged=diverged, report=kept.append, report_every=1))
    message = str(error.value)
    assert message == (f"iteration 4: size = {value} on 03-0, 03-1 (mirrored) (kept in batch.pt): "
                       "lower the learning rate (0.05), warm up, or clip gradients")
    assert [progress.iteration for progress in kept] == [1, 2, 3]
    assert [(batch.samples[0].id, iteration) for batch, iteration in batches] == [("03-0", 3)]
    intact = trained(config(iterations=3))
    parameters = {name for name, _ in module.named_parameters()}
    assert equal({name: weights(module)[name] for name in parameters}, {name: intact[name] for name in parameters})


@pytest.mark.parametrize("lag", [1, 3, 20])
def test_losses_may_be_looked_at_late(monkeypatch, lag):
    """As on a GPU: reports, snapshots and the network are what they are where each step is waited for."""
    expected: list[Progress] = []
    plain = trained(config(), report=expected.append, report_every=3)
    monkeypatch.setattr(training, "LAG", {"cpu": lag})
    found: list[Progress] = []
    kept = Seldom()
    late = trained(config(), report=found.append, report_every=3, snapshots=kept)
    assert equal(late, plain)
    assert [(each.iteration, each.losses) for each in found] == [(each.iteration, each.losses) for each in expected]
    assert list(kept.states) == [2, 4, 6]
    assert equal(trained(config(), snapshots=Kept(kept.states[4])), plain)


@pytest.mark.parametrize("lag", [1, 3])
def test_steps_taken_before_divergence_is_seen_change_nothing(monkeypatch, lag):
    monkeypatch.setattr(training, "LAG", {"cpu": lag})
    module = Breaking(math.nan)
    with pytest.raises(DivergedError, match=r"^iteration 4: size = nan on 03-0"):
        trained(config(), module)
    assert len(module.seen) == 4 + lag
    intact = trained(config(iterations=3))
    assert all(torch.equal(parameter, intact[name]) for name, parameter in module.named_parameters())


def test_divergence_needs_no_one_to_keep_the_batch():
    with pytest.raises(DivergedError, match=r"^iteration 4: size = nan on 03-0, 03-1 \(mirrored\): lower"):
        trained(config(), Breaking(math.nan))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_arrives_as_it_is(workers):
    def broken(iteration: int) -> list[Sample]:
        if iteration == 2:
            raise FileNotFoundError("000012.jpg")
        return read(iteration)

    module, before = Classifier(), threading.active_count()
    with pytest.raises(FileNotFoundError, match=r"000012\.jpg"):
        train(module, broken, config(), (), LoopRuntime(device=CPU, workers=workers))
    assert len(module.seen) == 2
    assert threading.active_count() == before


def test_reports_average_what_happened_since_the_last_one():
    each: list[Progress] = []
    some: list[Progress] = []
    trained(config(), report=each.append, report_every=1)
    trained(config(), report=some.append, report_every=3)
    assert [progress.iteration for progress in each] == [1, 2, 3, 4, 5, 6, 7]
    assert [progress.iteration for progress in some] == [3, 6, 7]  # the last one too
    assert [progress.lr for progress in each] == pytest.approx([0.05] * 4 + [0.005] * 3)
    for progress, part in zip(some, (each[:3], each[3:6], each[6:]), strict=True):
        for name in ("cls", "size"):
            assert progress.losses[name] == pytest.approx(sum(one.losses[name] for one in part) / len(part))
    assert all(progress.images_per_second > 0 for progress in some)
    assert all(0 <= progress.wait_share <= 1 for progress in some)


def test_bfloat16_trains_other_weights_that_stay_float32():
    half = trained(config(precision="bfloat16"))
    assert all(tensor.dtype == torch.float32 for name, tensor in half.items() if "num_batches" not in name)
    full = trained(config())
    assert not equal(half, full)
    assert all(torch.allclose(half[name], full[name], atol=0.2) for name in full)


def test_no_iterations_leave_the_weights_alone():
    assert equal(trained(config(iterations=0)), weights(Classifier()))


SMALL = ["conv1.0", "conv2.1", "conv2.3", "conv3.1", "conv3.3", "conv4.1", "conv4.3", "conv5.0", "conv5.2"]


@pytest.mark.parametrize(("patterns", "names"), [
    ((), []), (("conv*",), SMALL), (("*",), SMALL), (("conv2",), SMALL[1:3]), (("conv2.*",), SMALL[1:3]),
    (("conv2.3",), SMALL[2:3]), (("conv5.2", "conv1"), [SMALL[0], SMALL[-1]]), (("conv[12]",), SMALL[:3]),
    (("conv1", "conv1.0"), SMALL[:1]),
])
def test_layers_by_pattern(patterns, names):
    assert layers_named(backbones.small().conv, patterns) == names


def test_layers_within_layers_by_pattern():
    conv = backbones.squeezenet1_1().conv
    assert layers_named(conv, ["conv5.*.squeeze"]) == ["conv5.0.squeeze", "conv5.1.squeeze"]
    assert layers_named(conv, ["conv5.1"]) == ["conv5.1.squeeze", "conv5.1.expand1x1", "conv5.1.expand3x3"]


@pytest.mark.parametrize("pattern", ["conv6", "conv", "conv2.0", "conv2.3.weight", "fc6", ""])
def test_pattern_that_names_no_layer(pattern):
    with pytest.raises(UsageError, match=r"no layer .*: blocks are conv1, .*, conv5, and layers conv1.0, .*, conv5.2$"):
        layers_named(backbones.small().conv, ["conv1", pattern])
