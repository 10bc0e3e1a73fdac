"""What a network is trained on: labels for anchors, samples of RoIs, and their regression targets.

Functions of tensors; randomness is an explicit generator. ``RoISampling`` applies them to the images of a batch.
Letters: A anchors, R RoIs, G objects.
Labels: 1 and above an object (for anchors just 1), 0 background, -1 ignored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from altopt.batches.samples import Batch, Sample
from altopt.machine import randomness
from altopt.ops import boxes as bx
from altopt.ops.targets import RoISample


def label_anchors(anchors: Tensor, objects: Tensor, size: tuple[float, float], positive: float, negative: float,
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
    if len(objects) == 0:
        labels[competing] = 0
        return labels, matched
    overlaps = bx.iou(anchors, objects) * competing[:, None]  # (A, G)
    best, matched = overlaps.max(dim=1)
    best_of_object = overlaps.max(dim=0).values  # (G,)
    promoted = ((overlaps == best_of_object) & (best_of_object > 0)).any(dim=1)
    labels[competing & (best < negative)] = 0
    labels[competing & (promoted | (best >= positive))] = 1
    return labels, matched


def choose(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` of the candidates (or all, if fewer), drawn without replacement: int64 ``Tensor[<=count]``."""
    if len(candidates) <= count:
        return candidates
    order = torch.randperm(len(candidates), generator=generator)[:count]
    return candidates[order.to(candidates.device)]


def subsample_labels(labels: Tensor, count: int, positive_fraction: float, generator: torch.Generator) -> Tensor:
    """Return the labels with all but ``count`` anchors ignored, at most ``positive_fraction`` of them positive.

    Places that positives leave empty go to negatives (Faster R-CNN, section 3.1.3: 256 anchors, up to half positive).
    """
    positives = choose(torch.nonzero(labels == 1)[:, 0], int(positive_fraction * count), generator)
    negatives = choose(torch.nonzero(labels == 0)[:, 0], count - len(positives), generator)
    sampled = torch.full_like(labels, -1)
    sampled[positives] = 1
    sampled[negatives] = 0
    return sampled


def match_rois(rois: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Return each RoI's best IoU, ``Tensor[R]``, and the object that has it, int64 ``Tensor[R]``."""
    if len(objects) == 0:
        return rois.new_zeros(len(rois)), torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    overlap, matched = bx.iou(rois, objects).max(dim=1)
    return overlap, matched


@dataclass(frozen=True)
class RoIThresholds:
    """Which RoIs count as what, in IoU: foreground from ``fg``, background in [``bg_low``, ``bg_high``)."""

    fg: float
    bg_high: float
    bg_low: float


def sample_rois(proposals: Tensor, objects: Tensor, classes: Tensor, *, count: int, fg_fraction: float,
                rule: RoIThresholds, generator: torch.Generator) -> RoISample:
    """Return up to ``count`` RoIs of one image, the objects themselves being candidates too.

    ``proposals`` is ``Tensor[K, 4]``, ``objects`` ``Tensor[G, 4]`` in the same frame, ``classes`` int64
    ``Tensor[G]`` from 0. At most round(fg_fraction * count) are foreground; background fills the rest as far as there
    is any, so the sample can be smaller than ``count``. Source: Fast R-CNN, section 2.3; py-faster-rcnn ``minibatch``.

    Where the proposals require a gradient, the RoIs and their deltas are differentiable in them; the choice is not.
    """
    rois = torch.cat([objects, proposals])
    overlap, matched = match_rois(rois.detach(), objects)
    fg = torch.nonzero(overlap >= rule.fg)[:, 0]
    bg = torch.nonzero((overlap < rule.bg_high) & (overlap >= rule.bg_low))[:, 0]
    fg = choose(fg, round(fg_fraction * count), generator)
    bg = choose(bg, count - len(fg), generator)
    kept = torch.cat([fg, bg])
    labels = torch.zeros(len(kept), dtype=torch.int64, device=rois.device)
    deltas = rois.new_zeros(len(kept), 4)
    if len(fg):
        labels[: len(fg)] = classes[matched[fg]] + 1
        deltas[: len(fg)] = bx.encode(objects[matched[fg]], rois[fg])
    return RoISample(rois[kept], labels, deltas, len(fg))


def has_samples(proposals: Tensor, objects: Tensor, rule: RoIThresholds) -> bool:
    """Return whether an image has any foreground or background RoI; if not, it cannot be trained on.

    Objects are RoIs too, and mostly foreground by themselves, so they are looked at first.
    """
    for rois in (objects, proposals):
        overlap, _ = match_rois(rois, objects)
        if ((overlap >= rule.fg) | ((overlap < rule.bg_high) & (overlap >= rule.bg_low))).any():
            return True
    return False


@dataclass(frozen=True)
class RoISampling:
    """How an image's RoIs are drawn from its proposals and objects: which count as what, how many, what share."""

    rule: RoIThresholds
    per_image: int
    fg_fraction: float

    def of_image(self, image: Sample, proposals: Tensor, *key: object) -> RoISample:
        """Return the RoIs of one image; ``proposals`` is ``Tensor[K, 4]`` in the input frame."""
        return sample_rois(
            proposals, image.gt_boxes, image.gt_labels, count=self.per_image, fg_fraction=self.fg_fraction,
            rule=self.rule, generator=randomness.generator(*key, image.id, image.flipped),
        )

    def prepared(self, image: Sample, *key: object) -> Sample:
        """Return the image with its RoIs drawn, in the place of its proposals."""
        return replace(image, rois=self._drawn(image, *key), proposals=None)

    def of_batch(self, batch: Batch, *key: object) -> list[RoISample]:
        """Return the RoIs of each image of a batch: as prepared, or drawn now from the proposals it was read with."""
        return [self._drawn(each, *key) if each.rois is None else each.rois for each in batch.samples]

    def _drawn(self, image: Sample, *key: object) -> RoISample:
        assert image.proposals is not None
        return self.of_image(image, image.proposals, *key)
