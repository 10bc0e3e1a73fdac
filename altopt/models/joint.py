"""Joint training: one network, four losses, and proposals made anew by the current RPN in every step.

Approximate: the proposals are constants in the backward pass, and RoIs are pooled by the op of the other stages. The
RPN learns boxes from its own loss alone. Exact: the coordinates of the proposals carry the detector's gradient too, to
the RPN's deltas, and RoIs are sampled by an op that has a derivative with respect to them.

What is piecewise constant has no derivative and stays fixed in both: which anchors and RoIs are sampled, which boxes
suppression keeps, which object a RoI belongs to. Scores choose proposals and nothing else, so the RPN's classification
learns from its own loss in both.
Source: Faster R-CNN, section 3.2; Girshick, "Training R-CNNs of various velocities".
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling
from altopt.config import ProposalSettings
from altopt.models.backbones import STRIDE
from altopt.models.detector import FasterRCNN
from altopt.models.fast_rcnn import fast_rcnn_losses
from altopt.models.losses import Loss, LossModule, rpn_losses
from altopt.models.rpn import AnchorSampling, anchor_samples, decode_proposals, filter_proposals
from altopt.models.trunk import Trunk
from altopt.ops import boxes as bx
from altopt.ops.roi_sample import pool_rois
from altopt.ops.targets import RoISample


@dataclass(frozen=True)
class CoordinatePath:
    """How much of the detector's gradient reaches the RPN through the coordinates of the proposals.

    Nothing for ``warmup`` iterations; in the next ``warmup`` ones its share rises in a straight line to all of it. An
    image's gradient, in loss per pixel of the input over all its proposals, is first cut to the norm ``clip`` (0: it
    is not).
    """

    warmup: int
    clip: float

    def share(self, iteration: int) -> float:
        """Return the share of the gradient that passes in an iteration, counted from 0."""
        if self.warmup == 0:
            return 1.0
        return min(1.0, max(0.0, (iteration + 1 - self.warmup) / self.warmup))

    def limited(self, gradient: Tensor, share: float) -> Tensor:
        """Return what passes of a gradient with respect to an image's proposals, ``Tensor[K, 4]``."""
        if self.clip:
            gradient = gradient * (self.clip / gradient.norm()).clamp(max=1)
        return gradient * share


class JointTraining(LossModule):
    """The whole network, from a batch to four losses; exact with a ``path``, approximate without.

    ``weights`` are those of ``rpn_cls``, ``rpn_box``, ``cls`` and ``box``.
    """

    def __init__(self, network: FasterRCNN, *, anchors: AnchorSampling, sigma: float, proposals: ProposalSettings,
                 rois: RoISampling, weights: Mapping[str, float], seed: tuple[object, ...],
                 path: CoordinatePath | None) -> None:
        super().__init__()
        self.trunk, self.rpn, self.fc, self.head = Trunk(network.conv), network.rpn, network.fc, network.head
        self.roi_size, self.samples_per_bin = network.roi_size, network.samples_per_bin
        self.anchors, self.sigma, self.proposals, self.rois = anchors, sigma, proposals, rois
        self.weights, self.path, self.seed = dict(weights), path, seed

    def forward(self, batch: Batch) -> dict[str, Loss]:
        """Return ``rpn_cls`` and ``rpn_box`` as RPNTraining has them, ``cls`` and ``box`` as FastRCNNTraining does."""
        return self.losses(batch, self.path.share(batch.iteration) if self.path else 0.0)

    def losses(self, batch: Batch, share: float) -> dict[str, Loss]:
        """Return the four losses, with this share of the gradient through the proposals' coordinates.

        The convolutional layers run once for all four.
        """
        maps = self.trunk(batch)  # of each image: (C, h, w)
        outputs = self.rpn.of_images(maps)  # of each image: (N, 2) and (N, 4)
        losses = rpn_losses(outputs, anchor_samples(batch), self.sigma)
        rois = [self._sample_rois(sample, *output, self.rpn.anchors_on(features), (batch.iteration, share))
                for sample, output, features in zip(batch.samples, outputs, maps, strict=True)]
        pooled = pool_rois(maps, [each.rois for each in rois], self.roi_size, 1 / STRIDE,
                           self.samples_per_bin)  # (R, C, P, P)
        hidden = self.fc(pooled.flatten(1), rois)  # (R, D)
        logits, deltas = self.head(hidden)  # (R, K + 1), (R, K + 1, 4)
        losses |= fast_rcnn_losses(self.head, logits, deltas, rois)
        return {name: Loss(self.weights[name] * loss.total, loss.count) for name, loss in losses.items()}

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the anchors to train on in an iteration; may be called from any thread."""
        return self.anchors.prepare(sample, self.rpn.network, *self.seed, "anchors", iteration)

    def _sample_rois(self, sample: Sample, logits: Tensor, deltas: Tensor, anchors: Tensor,
                     step: tuple[int, float]) -> RoISample:
        """Return the RoIs to train on, drawn from the proposals that the RPN makes of the image now.

        With a share, proposals carry a gradient. A target says how to get from the RoI to its object, so it moves with
        the RoI as much as the pooled features do: the derivative of the loss needs both, and targets are not detached.
        """
        iteration, share = step
        with torch.no_grad():  # which boxes are kept is piecewise constant
            kept = filter_proposals(*decode_proposals(logits, deltas, anchors, sample), sample, self.proposals)
        chosen = deltas[kept] if share else deltas[kept].detach()
        proposals = bx.clip(bx.decode(chosen, anchors[kept]), sample.size)  # (K, 4)
        if self.path and proposals.requires_grad:
            path = self.path
            proposals.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: path.limited(gradient, share))
        return self.rois.of_image(sample, proposals, *self.seed, "rois", iteration)
