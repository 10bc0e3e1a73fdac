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
from torch import Tensor, nn

from altopt.batches.samples import Batch, Sample
from altopt.batches.sampling import RoISampling
from altopt.config import ProposalSettings
from altopt.models.backbones import STRIDE
from altopt.models.detector import FasterRCNN
from altopt.models.dropout import seed_dropout
from altopt.models.fast_rcnn import fast_rcnn_losses
from altopt.models.frozen import conv_features
from altopt.models.rpn import AnchorSampling, decode_proposals, filter_proposals, rpn_losses, sample_anchors
from altopt.ops import boxes as bx
from altopt.ops.roi_sample import pool_rois
from altopt.ops.targets import RoISample


@dataclass(frozen=True)
class CoordinatePath:
    """How much of the detector's gradient reaches the RPN through the coordinates of the proposals.

    Nothing for ``warmup`` iterations; in the next ``warmup`` ones its share rises in a straight line to all of it. A
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


class JointTraining(nn.Module):
    """The whole network, from a batch to four losses; exact with a ``path``, approximate without."""

    def __init__(self, network: FasterRCNN, *, anchors: AnchorSampling, proposals: ProposalSettings, rois: RoISampling,
                 weights: Mapping[str, float], path: CoordinatePath | None, key: tuple[object, ...]) -> None:
        super().__init__()
        self.conv, self.rpn, self.fc, self.head = network.conv, network.rpn, network.fc, network.head
        self.roi_size, self.samples_per_bin = network.roi_size, network.samples_per_bin
        self.anchors, self.proposals, self.rois = anchors, proposals, rois
        self.weights, self.path, self.key = dict(weights), path, key

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Return ``rpn_cls`` and ``rpn_box`` as RPNTraining has them, ``cls`` and ``box`` as FastRCNNTraining does.

        Each is multiplied by its weight. The convolutional layers run once for all four.
        """
        return self.losses(batch, iteration, self.path.share(iteration) if self.path else 0.0)

    def losses(self, batch: Batch, iteration: int, share: float) -> dict[str, Tensor]:
        """Return what ``forward`` does, with this share of the gradient through the proposals' coordinates."""
        of_rpn: list[dict[str, Tensor]] = []
        of_detector: list[dict[str, Tensor]] = []
        count = 0
        for group, features in conv_features(self.conv, batch):
            anchors = self.rpn.anchors_for(features)
            samples, rois = [batch.samples[b] for b in group], []
            for sample, logits, deltas in zip(samples, *self.rpn(features), strict=True):
                chosen = sample.anchors or sample_anchors(sample, anchors, self.anchors, *self.key, "anchors",
                                                          iteration)
                of_rpn.append(rpn_losses(logits, deltas, chosen, self.anchors))
                rois.append(self._sample(sample, self._proposals(logits, deltas, anchors, sample, share), iteration))
            pooled = pool_rois(features, [each.rois for each in rois], self.roi_size, 1 / STRIDE, self.samples_per_bin)
            seed_dropout(self.fc, rois, samples, *self.key, iteration)
            of_detector += fast_rcnn_losses(self.head, self.fc(pooled.flatten(1)), rois)
            count += sum(len(each.labels) for each in rois)
        losses = batch.parts(of_rpn, len(batch.samples)) | batch.parts(of_detector, count)
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def prepare(self, sample: Sample, iteration: int) -> Sample:
        """Return the sample with the anchors to train on in an iteration; may be called from any thread."""
        return self.rpn.with_anchors(sample, self.anchors, *self.key, "anchors", iteration)

    def _proposals(self, logits: Tensor, deltas: Tensor, anchors: Tensor, sample: Sample, share: float) -> Tensor:
        """Return an image's proposals, ``Tensor[K, 4]`` in the input frame; with a share, they carry a gradient."""
        with torch.no_grad():
            kept = filter_proposals(*decode_proposals(logits, deltas, anchors, sample), sample, self.proposals)
        chosen = deltas[kept] if share else deltas[kept].detach()
        proposals = bx.clip(bx.decode(chosen, anchors[kept]), sample.size)
        if self.path and proposals.requires_grad:
            path = self.path
            proposals.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: path.limited(gradient, share))
        return proposals

    def _sample(self, sample: Sample, proposals: Tensor, iteration: int) -> RoISample:
        """Return the RoIs to train on, and what they should become.

        A target says how to get from the RoI to its object, so it moves with the RoI as much as the pooled features do:
        the derivative of the loss needs both, and the targets are not detached.
        """
        return self.rois.of_image(sample, proposals, *self.key, "rois", iteration)

