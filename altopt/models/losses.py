"""The losses of all networks, each a sum and the number of what it is a mean over.

Letters: N anchors, R RoIs, K classes without background.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.batches.samples import Batch, Sample
from altopt.ops.targets import AnchorSample, RoISample


@dataclass(frozen=True, eq=False)
class Loss:
    """A mean that is still to be taken: ``total``, a scalar, over ``count`` images or RoIs.

    Where several processes have parts of a batch, the training loop adds up both before it divides, so their sizes need
    not be equal.
    """

    total: Tensor
    count: int


class LossModule(nn.Module):
    """What the training loop trains: a module from a batch of prepared samples to losses, by name."""

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return the losses of a batch."""
        raise NotImplementedError

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with what is drawn of it for an iteration; may be called from any thread."""
        return sample


def at_least_float(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, or in double if it is: losses and boxes need more than bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def smooth_l1(predicted: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Return the sum of Fast R-CNN's robust loss, a scalar; quadratic where the difference is below 1 / sigma^2."""
    return F.smooth_l1_loss(predicted, target, beta=1 / sigma**2, reduction="sum")


def rpn_losses(outputs: Sequence[tuple[Tensor, Tensor]], targets: Sequence[AnchorSample], sigma: float,
               box_weight: float = 1.0) -> dict[str, Loss]:
    """Return ``rpn_cls``, softmax loss over the sampled anchors, and ``rpn_box``, smooth L1 over positive ones.

    ``outputs`` are logits ``Tensor[N, 2]`` and deltas ``Tensor[N, 4]`` of each image. Both losses are divided by the
    number of sampled anchors of an image, and are means over images (Faster R-CNN, section 3.1.2).
    """
    classification, box = [], []
    for (logits, deltas), chosen in zip(outputs, targets, strict=True):
        count = max(len(chosen.used), 1)
        classification.append(F.cross_entropy(logits[chosen.used], chosen.labels, reduction="sum") / count)
        box.append(smooth_l1(deltas[chosen.positive], chosen.deltas, sigma) / count)
    return {"rpn_cls": Loss(torch.stack(classification).sum(), len(targets)),
            "rpn_box": Loss(box_weight * torch.stack(box).sum(), len(targets))}


def softmax_loss(logits: Tensor, rois: Sequence[RoISample]) -> Loss:
    """Return the softmax loss of RoIs, a mean over them; ``logits`` is ``Tensor[R, K + 1]``, background first."""
    labels = torch.cat([each.labels for each in rois])
    return Loss(F.cross_entropy(at_least_float(logits), labels, reduction="sum"), len(labels))


def box_loss(deltas: Tensor, rois: Sequence[RoISample], means: Tensor, stds: Tensor) -> Loss:
    """Return smooth L1 of the foreground RoIs' deltas, a mean over all RoIs (Fast R-CNN, section 2.3).

    ``deltas`` is ``Tensor[R, K + 1, 4]`` in units of each class's ``means`` and ``stds``, ``Tensor[K + 1, 4]``.
    """
    labels = torch.cat([each.labels[: each.foreground] for each in rois])  # (F,)
    targets = torch.cat([each.deltas[: each.foreground] for each in rois])  # (F, 4)
    # Rows of foreground are known without asking the device for a mask, which would make the processor wait.
    starts = [0]
    for each in rois:
        starts.append(starts[-1] + len(each.labels))
    rows = torch.cat([torch.arange(start, start + each.foreground, device=deltas.device)
                      for start, each in zip(starts, rois, strict=False)])
    predicted = deltas[rows, labels]  # (F, 4), each of its RoI's own class
    return Loss(smooth_l1(predicted, (targets - means[labels]) / stds[labels], sigma=1.0), starts[-1])
