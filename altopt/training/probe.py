"""How approximate approximate joint training is: gradients of the shared layers with and without the coordinate path.

Both are taken of the same losses of the same RoIs, sampled by the same op; the one difference is whether the proposals'
coordinates carry a gradient (Faster R-CNN, section 3.2, "the derivative with respect to the proposal boxes'
coordinates").
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from altopt.batches.samples import Batch
from altopt.models.joint import JointTraining

DETECTOR, RPN = ("cls", "box"), ("rpn_cls", "rpn_box")
ALL_BLOCKS = "all"


@dataclass(frozen=True)
class Comparison:
    """The exact gradient of a conv block (or of ``all``) beside the approximate one, over all its parameters.

    ``losses`` names those that it is the gradient of. ``cosine`` of the angle between the two and ``norm_ratio``, exact
    over approximate, are None where they are not defined: where either gradient, or the approximate one, is 0.
    """

    block: str
    losses: tuple[str, ...]
    cosine: float | None
    norm_ratio: float | None


def compare_gradients(module: JointTraining, batches: Iterable[Batch]) -> list[Comparison]:
    """Return a row for each conv block and one for all: of the detector's two losses, then of all four.

    Gradients are summed over the batches before they are compared, as a step on all of them would be. ``module`` is in
    evaluation mode (dropout would be a difference of its own), and samples are prepared.
    """
    owners = [(name.split(".")[0], parameter) for name, parameter in module.trunk.conv.named_parameters()]
    blocks = list(dict.fromkeys(block for block, _ in owners))
    sums = [torch.zeros(3, parameter.numel(), dtype=torch.float64) for _, parameter in owners]
    for batch in batches:
        for total, found in zip(sums, _gradients(module, batch, [each for _, each in owners]), strict=True):
            total += found
    rows = []
    for losses in (DETECTOR, (*RPN, *DETECTOR)):
        for block in [*blocks, ALL_BLOCKS]:
            approximate, exact, of_rpn = torch.cat([total for (owner, _), total in zip(owners, sums, strict=True)
                                                    if block in (owner, ALL_BLOCKS)], dim=1)  # (parameters,) each
            if losses != DETECTOR:
                approximate, exact = approximate + of_rpn, exact + of_rpn
            norms = approximate.norm().item(), exact.norm().item()
            cosine = (approximate @ exact).item() / (norms[0] * norms[1]) if all(norms) else None
            rows.append(Comparison(block, losses, cosine, norms[1] / norms[0] if norms[0] else None))
    return rows


def _gradients(module: JointTraining, batch: Batch, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return ``Tensor[3, numel]`` for each parameter: of the detector's losses without and with path, of the RPN's."""
    found = []
    for share, losses in ((0.0, DETECTOR), (1.0, DETECTOR), (0.0, RPN)):
        values = module.losses(batch, share)
        total = torch.stack([values[name].total / max(values[name].count, 1) for name in losses]).sum()
        # A layer that some loss does not reach has the gradient 0 of it.
        found.append(torch.autograd.grad(total, list(parameters), materialize_grads=True, allow_unused=True))
    # In double precision on the CPU: the cosine is of long vectors that differ little.
    return [torch.stack([each.flatten() for each in of_one]).cpu().double() for of_one in zip(*found, strict=True)]
