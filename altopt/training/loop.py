"""The one training loop: iterations of stochastic gradient descent over a module that turns a batch into losses."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from altopt.batches.local_batches import LocalBatches
from altopt.batches.reading import Entry, Prefetcher
from altopt.batches.samples import Batch, Sample, make_batch
from altopt.config import TORCHVISION_PIXELS, Pixels, TrainingConfig
from altopt.errors import DivergedError
from altopt.layers import names_matching
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import seed_of
from altopt.models.losses import LossModule

# On a GPU losses are looked at one step late, so that it always has the next step to work on.
LAG = {"cuda": 1}
# Where the modules that are trained hold the network's conv layers, which learn at a rate of their own. The RPN head
# has a layer of that name too (rpn.conv), so it is the beginning that counts.
CONV = ("conv.", "trunk.conv.")


class Snapshots(Protocol):
    """Where the loop keeps its state, so that it can be stopped at any moment."""

    def load(self) -> tuple[int, dict[str, Tensor], float] | None:
        """Return the iterations done, the tensors and the seconds spent so far; None to begin at the beginning."""

    def due(self) -> bool:
        """Return whether it is time to save."""

    def save(self, iteration: int, tensors: dict[str, Tensor], seconds: float) -> None:
        """Keep the state after ``iteration`` iterations."""


@dataclass(frozen=True)
class Progress:
    """What the loop reports, averaged since the last report."""

    iteration: int
    iterations: int
    lr: float
    losses: dict[str, float]
    images_per_second: float
    wait_share: float
    seconds: float


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Return the learning rate of an iteration, counted from 0."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "one-cycle":
        after = max(0, iteration - config.warmup) / max(1, config.iterations - config.warmup)
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
    return config.lr * warm * config.lr_gamma ** sum(iteration >= step for step in config.lr_steps)


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.SGD:
    """Return SGD over the trainable parameters: conv layers, and biases, have rates (and decay) of their own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Caffe multiplies the rate of biases by 2, and decays them as it does weights.
            kind = (name.startswith(CONV), name.endswith("bias"))
            groups.setdefault(kind, []).append(parameter)
    return torch.optim.SGD([{
        "params": parameters,
        "rate": (config.conv_lr if conv else 1.0) * (config.bias_lr if bias else 1.0),
        "weight_decay": config.weight_decay * (config.bias_decay if bias else 1.0),
    } for (conv, bias), parameters in groups.items()], lr=config.lr, momentum=config.momentum, fused=True)


@dataclass(kw_only=True)
class LoopRuntime:
    """Everything around the loop that does not change its result, and the convention of the network's ``pixels``.

    ``diverged(batch, iteration)`` may keep a batch whose losses are not finite, and says where. ``batches`` are those
    that several processes divide; ``group`` is what connects them.
    """

    device: torch.device
    pixels: Pixels = TORCHVISION_PIXELS
    workers: int = 0
    snapshots: Snapshots | None = None
    report: Callable[[Progress], None] | None = None
    report_every: int = 20
    diverged: Callable[[Batch, int], str] | None = None
    group: SingleProcess = field(default_factory=SingleProcess)
    batches: LocalBatches[Entry] | None = None


def train(module: LossModule, read: Callable[[int], list[Sample]], config: TrainingConfig, seed: tuple[object, ...],
          runtime: LoopRuntime) -> float:
    """Train the module in place for ``config.iterations`` and return the seconds it took, resumed parts included.

    ``read(iteration)`` returns this process's samples of an iteration; it is called from threads. ``seed`` is that of
    what a module draws from torch's own generator. Raises ``DivergedError`` at the first loss that is not finite.
    """
    device, group, batches = runtime.device, runtime.group, runtime.batches
    module.to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(module, config)
    start, spent = _resume(module, optimizer, runtime.snapshots)
    meter = _Meter(config, start, spent)
    pending: deque[PendingStep] = deque()

    def prepared(iteration: int) -> list[Sample]:
        # What is trained on is drawn here, by the readers: on a GPU a draw would make the step wait for its size.
        samples = [module.prepare(sample, iteration) for sample in read(iteration)]
        return [sample.pinned() for sample in samples] if device.type == "cuda" else samples

    def flush(left: int) -> None:
        """Look at the losses of all steps but the ``left`` last ones."""
        while len(pending) > left:
            step = pending.popleft()
            own, losses = step.losses()
            if not math.isfinite(sum(losses.values())):
                raise DivergedError(_divergence(own, step, config, runtime))
            meter.add(losses, batches.size(step.iteration) if batches else len(step.batch.samples), ahead.waited)

    with Prefetcher(prepared, range(start, config.iterations), runtime.workers) as ahead:
        for iteration in range(start, config.iterations):
            batch = make_batch(next(ahead), device, iteration, pixels=runtime.pixels)
            # A module may use torch's own generator: what it draws then depends on the iteration alone, resumed or not.
            torch.manual_seed(seed_of(*seed, "iteration", iteration))
            idle = batches is not None and batches.idle(iteration)
            pending.append(train_step(module, optimizer, batch, config, group, idle))
            done = iteration + 1
            reporting = done % runtime.report_every == 0 or done == config.iterations
            flush(0 if reporting else LAG.get(device.type, 0))
            if runtime.report and reporting:
                runtime.report(meter.progress(done))
            if runtime.snapshots and done < config.iterations and runtime.snapshots.due():
                flush(0)  # no snapshot holds what a broken step would have left
                runtime.snapshots.save(done, state_of(module, optimizer), meter.seconds())
    return meter.seconds()


@dataclass(frozen=True, eq=False)
class PendingStep:
    """A step that was taken; its losses are on their way from the device until somebody looks at them."""

    batch: Batch
    names: tuple[str, ...]
    values: Tensor  # (2, L) on the CPU: this process's parts of the losses, and the losses
    arrived: torch.cuda.Event | None

    @property
    def iteration(self) -> int:
        """The iteration of the step."""
        return self.batch.iteration

    def losses(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return this process's parts of the losses, and the losses; waits for the step, not for later ones."""
        if self.arrived is not None:
            self.arrived.synchronize()
        own, whole = (dict(zip(self.names, each, strict=True)) for each in self.values.tolist())
        return own, whole


def train_step(module: LossModule, optimizer: torch.optim.SGD, batch: Batch, config: TrainingConfig,
               group: SingleProcess, idle: bool = False) -> PendingStep:
    """Take a step, unless its losses or those of an earlier step are not finite; nothing here waits for the device.

    An ``idle`` process has no part in the batch: it computes as the others do, and counts nothing.
    """
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(config, batch.iteration) * parameters["rate"]
    device = batch.images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses = module(batch)
    counts = [0 if idle else loss.count for loss in losses.values()]
    if group.count > 1:
        counts = group.all_reduce_sum(torch.tensor(counts)).tolist()
    # A loss is a mean over the images or RoIs of the whole batch; this process has its part of the sum.
    parts = torch.stack([(0.0 if idle else 1.0) / max(count, 1) * loss.total
                         for count, loss in zip(counts, losses.values(), strict=True)])
    optimizer.zero_grad(set_to_none=True)  # what had no gradient in this step does not decay or move
    parts.sum().backward()  # type: ignore[no-untyped-call]
    group.sum_gradients(module.parameters())
    if config.clip_gradient:
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], config.clip_gradient)
    own = parts.detach().double()  # (L,): in double, so that what is reported does not depend on the order
    whole = group.all_reduce_sum(own)
    # The optimizer asks found_inf on the device and then changes nothing, as it does for a gradient scaler. Once set it
    # stays set: a step that was taken before anybody looked at the broken losses must not spoil the weights.
    broken = (~whole.sum().isfinite()).float()
    optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", broken), broken)  # type: ignore[attr-defined]
    optimizer.step()
    values = torch.stack([own, whole]).to("cpu", non_blocking=True)  # (2, L)
    arrived = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return PendingStep(batch, tuple(losses), values, arrived)


def _divergence(losses: dict[str, float], step: PendingStep, config: TrainingConfig, runtime: LoopRuntime) -> str:
    """Return what to say of losses that are not finite: everywhere what the first says whose own are not."""
    text = None
    broken = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    if runtime.group.count == 1 or broken:
        where = runtime.diverged(step.batch, step.iteration) if runtime.diverged else ""
        images = ", ".join(sample.id + (" (mirrored)" if sample.flipped else "") for sample in step.batch.samples)
        text = f"{', '.join(broken) or 'the total loss is not finite'} on {images}{where}"
    found = next(filter(None, runtime.group.all_gather(text)), "the total loss is not finite")
    return (f"iteration {step.iteration + 1}: {found}: lower the learning rate ({config.lr:g}), warm up, or clip "
            "gradients")


def state_of(module: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """Return what a resumed run needs: trained weights, their momenta, and buffers, by name."""
    state = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            state[f"weight.{name}"] = parameter.detach()
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{name}"] = momentum
    return state | {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}


@torch.no_grad()
def _resume(module: nn.Module, optimizer: torch.optim.SGD, snapshots: Snapshots | None) -> tuple[int, float]:
    found = snapshots.load() if snapshots else None
    if found is None:
        return 0, 0.0
    iteration, tensors, seconds = found
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[f"weight.{name}"])
            if f"momentum.{name}" in tensors:
                # In the parameter's own memory layout, or the next step would sum in another order.
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                optimizer.state[parameter]["momentum_buffer"] = momentum
    for name, buffer in module.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    return iteration, seconds


class _Meter:
    """Averages between two reports, and the clock."""

    def __init__(self, config: TrainingConfig, start: int, spent: float) -> None:
        self.config, self.spent = config, spent
        self.began = self.since = time.perf_counter()
        self.waited_before = self.waited = 0.0
        self.sums: dict[str, float] = {}
        self.steps = self.images = 0

    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.began

    def add(self, losses: dict[str, float], images: int, waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps, self.images, self.waited = self.steps + 1, self.images + images, waited

    def progress(self, done: int) -> Progress:
        """Return the averages since the last report, and begin anew."""
        now = time.perf_counter()
        elapsed = max(now - self.since, 1e-9)
        progress = Progress(
            done, self.config.iterations, learning_rate(self.config, done - 1),
            {name: total / self.steps for name, total in self.sums.items()},
            self.images / elapsed, (self.waited - self.waited_before) / elapsed, self.seconds(),
        )
        self.since, self.waited_before, self.sums, self.steps, self.images = now, self.waited, {}, 0, 0
        return progress


def layers_named(conv: nn.Sequential, patterns: Iterable[str]) -> list[str]:
    """Return the layers with weights that a pattern names; ``names_matching`` says how."""
    weighted = [name for name, layer in conv.named_modules() if any(True for _ in layer.parameters(recurse=False))]
    return names_matching(weighted, patterns)


def freeze(part: nn.Module, names: Iterable[str]) -> None:
    """Take the named modules out of training: no gradient, and so not in the optimizer; unknown names are an error."""
    for name in names:
        part.get_submodule(name).requires_grad_(False)
