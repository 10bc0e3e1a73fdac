"""What a network is trained on: labels for anchors, samples of RoIs, and their regression targets.

Functions of tensors; randomness is an explicit generator. ``RoISampling`` applies them to the images of a batch.
Letters: A anchors, R RoIs, G objects.
Labels: 1 and above an object (for anchors just 1), 0 background, -1 ignored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altopt.batches.samples import Batch, Sample
from altopt.machine.randomness import generator, seed_of
from altopt.ops import boxes as bx
from altopt.ops.targets import RoISample


def label_anchors(anchors: Tensor, gt_boxes: Tensor, size: tuple[float, float], positive: float, negative: float,
                  allow_border: bool = False) -> tuple[Tensor, Tensor]:
    """Return each anchor's label, int64 ``Tensor[A]``, and the object it overlaps most, int64 ``Tensor[A]``.

    Anchors that cross the border of ``size`` (width, height) are ignored. Positive: IoU >= ``positive``, or as good
    as any anchor inside gets for some object, all ties included. Negative: IoU < ``negative``. Positive wins.
    An object that no inside anchor touches promotes nothing (in py-faster-rcnn it would promote every anchor).
    Source: Faster R-CNN, section 3.1.2; py-faster-rcnn ``anchor_target_layer``.
    """
    labels = anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    matched = torch.zeros_like(labels)
    competing = torch.ones_like(labels, dtype=torch.bool) if allow_border else bx.inside(anchors, size)
    if len(gt_boxes) == 0:
        labels[competing] = 0
        return labels, matched
    overlaps = bx.iou(anchors, gt_boxes) * competing[:, None]  # (A, G)
    best, matched = overlaps.max(dim=1)
    best_of_object = overlaps.max(dim=0).values  # (G,)
    promoted = ((overlaps == best_of_object) & (best_of_object > 0)).any(dim=1)
    # Positives are written last, so they win (py-faster-rcnn: RPN_CLOBBER_POSITIVES False).
    labels[competing & (best < negative)] = 0
    labels[competing & (promoted | (best >= positive))] = 1
    return labels, matched


def choose(candidates: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return ``count`` of the candidates (or all, if fewer), drawn without replacement: int64 ``Tensor[<=count]``."""
    if len(candidates) <= count:
        return candidates
    # Drawn on the CPU, so that every device draws the same.
    order = torch.randperm(len(candidates), generator=random)[:count]
    return candidates[order.to(candidates.device)]


def subsample_labels(labels: Tensor, count: int, positive_fraction: float, random: torch.Generator) -> Tensor:
    """Return the labels with all but ``count`` anchors ignored, at most ``positive_fraction`` of them positive.

    Places that positives leave empty go to negatives (Faster R-CNN, section 3.1.3: 256 anchors, up to half positive).
    """
    positives = choose(torch.nonzero(labels == 1)[:, 0], int(positive_fraction * count), random)
    negatives = choose(torch.nonzero(labels == 0)[:, 0], count - len(positives), random)
    sampled = torch.full_like(labels, -1)
    sampled[positives] = 1
    sampled[negatives] = 0
    return sampled


def match_rois(rois: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each RoI's best IoU, ``Tensor[R]``, and the object that has it, int64 ``Tensor[R]``."""
    if len(gt_boxes) == 0:
        return rois.new_zeros(len(rois)), torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    overlap, matched = bx.iou(rois, gt_boxes).max(dim=1)
    return overlap, matched


@dataclass(frozen=True)
class RoIThresholds:
    """Which RoIs count as what, in IoU: foreground from ``fg``, background in [``bg_low``, ``bg_high``)."""

    fg: float
    bg_high: float
    bg_low: float


def sample_rois(proposals: Tensor, gt_boxes: Tensor, gt_labels: Tensor, *, count: int, fg_fraction: float,
                thresholds: RoIThresholds, random: torch.Generator) -> RoISample:
    """Return up to ``count`` RoIs of one image, the objects themselves being candidates too.

    ``proposals`` is ``Tensor[K, 4]``, ``gt_boxes`` ``Tensor[G, 4]`` in the same frame, ``gt_labels`` int64
    ``Tensor[G]`` from 0. At most round(fg_fraction * count) are foreground; background fills the rest as far as there
    is any, so the sample can be smaller than ``count``. Source: Fast R-CNN, section 2.3; py-faster-rcnn ``minibatch``.

    Where the proposals require a gradient, the RoIs and their deltas are differentiable in them; the choice is not.
    """
    rois = torch.cat([gt_boxes, proposals])  # (G + K, 4)
    overlap, matched = match_rois(rois.detach(), gt_boxes)
    fg = torch.nonzero(overlap >= thresholds.fg)[:, 0]
    bg = torch.nonzero((overlap < thresholds.bg_high) & (overlap >= thresholds.bg_low))[:, 0]
    fg = choose(fg, round(fg_fraction * count), random)
    bg = choose(bg, count - len(fg), random)
    kept = torch.cat([fg, bg])  # (R,), foreground first: losses take the first rows without a mask
    labels = torch.zeros(len(kept), dtype=torch.int64, device=rois.device)
    deltas = rois.new_zeros(len(kept), 4)
    if len(fg):
        labels[: len(fg)] = gt_labels[matched[fg]] + 1
        deltas[: len(fg)] = bx.encode(gt_boxes[matched[fg]], rois[fg])
    return RoISample(rois[kept], labels, deltas, len(fg))


def has_samples(proposals: Tensor, gt_boxes: Tensor, thresholds: RoIThresholds) -> bool:
    """Return whether an image has any foreground or background RoI; if not, it cannot be trained on."""
    # Objects are RoIs too, and mostly foreground by themselves: looked at first, they save the proposals' IoU.
    for rois in (gt_boxes, proposals):
        overlap, _ = match_rois(rois, gt_boxes)
        if ((overlap >= thresholds.fg) | ((overlap < thresholds.bg_high) & (overlap >= thresholds.bg_low))).any():
            return True
    return False


@dataclass(frozen=True)
class RoISampling:
    """How an image's RoIs are drawn from its proposals and objects: which count as what, how many, what share."""

    thresholds: RoIThresholds
    per_image: int
    fg_fraction: float

    def of_image(self, sample: Sample, proposals: Tensor, *seed: object) -> RoISample:
        """Return the RoIs of one image; ``proposals`` is ``Tensor[K, 4]`` in the input frame."""
        seed = (*seed, sample.id, sample.flipped)
        rois = sample_rois(proposals, sample.gt_boxes, sample.gt_labels, count=self.per_image,
                           fg_fraction=self.fg_fraction, thresholds=self.thresholds, random=generator(*seed))
        return replace(rois, dropout_seed=seed_of(*seed, "dropout"))

    def prepare(self, sample: Sample, *seed: object) -> Sample:
        """Return the sample with its RoIs drawn, in the place of its proposals; may be called from any thread."""
        assert sample.proposals is not None
        return replace(sample, rois=self.of_image(sample, sample.proposals, *seed), proposals=None)


def roi_samples(batch: Batch) -> list[RoISample]:
    """Return the RoIs to train on of each image of a batch of prepared samples."""
    return [sample.rois for sample in batch.samples if sample.rois is not None]
