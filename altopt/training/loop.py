"""The one training loop: iterations of stochastic gradient descent over a module that turns a batch into losses."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from altopt.batches.local_batches import LocalBatches
from altopt.batches.reading import Prefetcher
from altopt.batches.samples import Batch, Sample, make_batch
from altopt.config import TrainingConfig
from altopt.errors import DivergedError
from altopt.layers import names_matching
from altopt.machine.distributed import SingleProcess
from altopt.machine.randomness import seed_of

LAG = {"cuda": 1}  # by kind of device
CONV = ("conv.", "network.conv.")  # where the modules that are trained hold the network's conv layers


class Snapshots(Protocol):
    """Where the loop keeps its state, so that it can be stopped at any moment."""

    def load(self) -> tuple[int, dict[str, Tensor], float] | None:
        """Return the iterations done, the tensors and the seconds spent so far; None to begin at the beginning."""

    def due(self) -> bool:
        """Return whether it is time to save."""

    def save(self, iteration: int, tensors: dict[str, Tensor], seconds: float) -> None:
        """Keep the state after ``iteration`` iterations."""


@runtime_checkable
class Prepares(Protocol):
    """A module that draws what it trains on before it sees the image."""

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with what was drawn; may be called from any thread."""


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
            kind = (name.startswith(CONV), name.endswith("bias"))
            groups.setdefault(kind, []).append(parameter)
    return torch.optim.SGD([{
        "params": parameters,
        "rate": (config.conv_lr if conv else 1.0) * (config.bias_lr if bias else 1.0),
        "weight_decay": config.weight_decay * (config.bias_decay if bias else 1.0),
    } for (conv, bias), parameters in groups.items()], lr=config.lr, momentum=config.momentum, fused=True)


def train(module: nn.Module, read: Callable[[int], list[Sample]], config: TrainingConfig, *, key: tuple[object, ...],
          device: torch.device, workers: int = 0, snapshots: Snapshots | None = None,
          report: Callable[[Progress], None] | None = None, report_every: int = 20,
          diverged: Callable[[Batch, int], str] | None = None, slices: LocalBatches[Any] | None = None) -> float:
    """Train the module in place for ``config.iterations`` and return the seconds it took, resumed parts included.

    ``module(batch, iteration)`` returns a dict of losses; ``read(iteration)`` the iteration's samples, called from
    threads. ``key`` (with the seed in it) makes the randomness of the whole run. Raises ``DivergedError`` at the first
    loss that is not finite, after ``diverged(batch, iteration)`` had the chance to keep the batch and say where.
    With ``slices``, ``read`` returns this rank's samples, and the losses are its parts of the whole batch's.

    Losses are looked at ``LAG`` steps late, so that a GPU always has the next step to work on.
    """
    ranks = slices.ranks if slices else SingleProcess()
    module.to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(module, config)
    start, spent = _resume(module, optimizer, snapshots)
    meter = _Meter(config, start, spent)
    taken: deque[PendingStep] = deque()

    def read_prepared(iteration: int) -> list[Sample]:
        return prepared(module, read(iteration), iteration, device)

    def settle(left: int) -> None:
        """Look at the losses of all steps but the ``left`` last ones."""
        while len(taken) > left:
            step = taken.popleft()
            own, losses = step.losses()
            if not math.isfinite(sum(losses.values())):
                raise DivergedError(_divergence(own, step.batch, step.iteration, config, diverged, ranks))
            meter.add(losses, slices.images(step.iteration) if slices else len(step.batch.samples), ahead.waited)

    with Prefetcher(read_prepared, range(start, config.iterations), workers) as ahead:
        for iteration in range(start, config.iterations):
            batch = make_batch(next(ahead), device)
            if slices:
                batch = slices.begin(batch, iteration)
            taken.append(train_step(module, optimizer, batch, config, iteration, key, ranks))
            done = iteration + 1
            reporting = done % report_every == 0 or done == config.iterations
            settle(0 if reporting else LAG.get(device.type, 0))
            if report and reporting:
                report(meter.progress(done))
            if snapshots and done < config.iterations and snapshots.due():
                settle(0)
                snapshots.save(done, state_of(module, optimizer), meter.seconds())
    return meter.seconds()


def prepared(module: nn.Module, samples: Sequence[Sample], iteration: int, device: torch.device) -> list[Sample]:
    """Return the samples with what the module trains on already drawn, in memory that the device copies from best."""
    ready = [module.prepare(sample, iteration) if isinstance(module, Prepares) else sample for sample in samples]
    return [sample.pinned() for sample in ready] if device.type == "cuda" else ready


@dataclass(frozen=True, eq=False)
class PendingStep:
    """A step that was taken; its losses are on their way from the device until somebody looks at them."""

    iteration: int
    batch: Batch
    names: tuple[str, ...]
    values: Tensor  # (2, L) on the CPU: this rank's parts of the losses, and the losses
    arrived: torch.cuda.Event | None

    def losses(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return this rank's parts of the losses, and the losses, by name; waits for the step, not for later ones."""
        if self.arrived is not None:
            self.arrived.synchronize()
        own, whole = (dict(zip(self.names, each, strict=True)) for each in self.values.tolist())
        return own, whole


def train_step(module: nn.Module, optimizer: torch.optim.SGD, batch: Batch, config: TrainingConfig, iteration: int,
              key: tuple[object, ...], ranks: SingleProcess) -> PendingStep:
    """Take a step, unless its losses or those of an earlier step are not finite; nothing here waits for the device.

    The optimizer asks ``found_inf`` on the device, as it does for a gradient scaler.
    """
    lr = learning_rate(config, iteration)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
    torch.manual_seed(seed_of(*key, "dropout", iteration))  # dropout alone reads torch's own generator
    device = batch.images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses: dict[str, Tensor] = module(batch, iteration)
    optimizer.zero_grad(set_to_none=True)
    parts = torch.stack(list(losses.values()))
    parts.sum().backward()  # type: ignore[no-untyped-call]
    ranks.sum_gradients(module.parameters())
    if config.clip_gradient:
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], config.clip_gradient)
    own = parts.detach().double()
    whole = ranks.all_reduce_sum(own)
    broken = (~whole.sum().isfinite()).float()
    optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", broken), broken)  # type: ignore[attr-defined]
    optimizer.step()
    values = torch.stack([own, whole]).to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return PendingStep(iteration, batch, tuple(losses), values, arrived)


def _divergence(losses: dict[str, float], batch: Batch, iteration: int, config: TrainingConfig,
                diverged: Callable[[Batch, int], str] | None, ranks: SingleProcess) -> str:
    """Return what to say of losses that are not finite: on every rank what the first says whose own are not."""
    text = None
    if ranks.count == 1 or not math.isfinite(sum(losses.values())):
        where = diverged(batch, iteration) if diverged else ""
        text = _broken(losses, batch, where)
    found = next(filter(None, ranks.all_gather(text)), "the total loss is not finite")
    return f"iteration {iteration + 1}: {found}: lower the learning rate ({config.lr:g}), warm up, or clip gradients"


def _broken(losses: dict[str, float], batch: Batch, where: str) -> str:
    images = ", ".join(sample.id + (" (mirrored)" if sample.flipped else "") for sample in batch.samples)
    broken = ", ".join(f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value))
    return f"{broken or 'the total loss is not finite'} on {images}{where}"


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


def describe(progress: Progress) -> dict[str, Any]:
    """Return a report as plain values, for the log."""
    return {
        "iteration": progress.iteration, "lr": progress.lr, "images_per_second": round(progress.images_per_second, 3),
        "wait_share": round(progress.wait_share, 4), "seconds": round(progress.seconds, 3), **progress.losses,
    }
