"""What a module's losses come to for samples that it has not prepared yet."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from altopt.batches.samples import Batch
from altopt.models.losses import Loss, LossModule


def prepared(module: LossModule, batch: Batch, iteration: int = 0) -> Batch:
    """Return the batch of an iteration, with what the module draws of its samples."""
    return replace(batch, samples=[module.prepare(each, iteration) for each in batch.samples], iteration=iteration)


def means(losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    """Return each loss as the mean that it stands for."""
    return {name: loss.total / max(loss.count, 1) for name, loss in losses.items()}


def losses_of(module: LossModule, batch: Batch, iteration: int = 0) -> dict[str, Tensor]:
    """Return the losses of a batch of samples that are not prepared."""
    return means(module(prepared(module, batch, iteration)))


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Return what a step goes down: the sum of the losses."""
    return torch.stack([*losses.values()]).sum()
