"""Mean and spread of the box deltas that a set of proposals asks for, class by class (Fast R-CNN, section 2.3)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from altopt.batches.sampling import match_rois
from altopt.ops import boxes as bx

# What py-faster-rcnn's joint training uses instead of measuring (TRAIN.BBOX_NORMALIZE_STDS).
FIXED_STDS = (0.1, 0.1, 0.2, 0.2)
VARIANCE_FLOOR = 1e-14  # as py-faster-rcnn's EPS: keeps a class that was never seen from dividing by zero


class BoxStatistics:
    """Sums over (proposal, object) pairs with IoU of at least ``overlap``, objects being proposals too."""

    def __init__(self, classes: int, overlap: float) -> None:
        self.overlap = overlap
        self.count = torch.zeros(classes + 1, dtype=torch.float64)
        self.sums = torch.zeros(classes + 1, 4, dtype=torch.float64)
        self.squares = torch.zeros(classes + 1, 4, dtype=torch.float64)

    def add(self, proposals: Tensor, objects: Tensor, classes: Tensor) -> None:
        """Take in one image: ``Tensor[K, 4]``, ``Tensor[G, 4]`` in one frame, int64 ``Tensor[G]`` from 0."""
        rois = torch.cat([objects, proposals])
        overlap, matched = match_rois(rois, objects)
        used = torch.nonzero(overlap >= self.overlap)[:, 0]
        if len(used) == 0:
            return
        deltas = bx.encode(objects[matched[used]], rois[used]).double()
        labels = classes[matched[used]] + 1
        self.count.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.sums.index_add_(0, labels, deltas)
        self.squares.index_add_(0, labels, deltas**2)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations, each float32 ``Tensor[K + 1, 4]``; 0 and 1 where nothing was seen."""
        count = self.count.clamp(min=1)[:, None]
        means = self.sums / count
        variance = (self.squares / count - means**2).clamp(min=VARIANCE_FLOOR)
        stds = torch.where(self.count[:, None] > 0, variance.sqrt(), torch.ones_like(variance))
        # One object seen once has no spread; fall back to the fixed units rather than divide by almost nothing.
        stds = torch.where(stds < 1e-3, torch.tensor(FIXED_STDS, dtype=torch.float64), stds)
        return means.float(), stds.float()


def fixed_statistics(classes: int) -> tuple[Tensor, Tensor]:
    """Return zero means and py-faster-rcnn's fixed deviations, each ``Tensor[K + 1, 4]``."""
    return torch.zeros(classes + 1, 4), torch.tensor(FIXED_STDS).expand(classes + 1, 4).clone()


def measure(images: Iterable[tuple[Tensor, Tensor, Tensor, float]], classes: int, overlap: float,
            flips: bool) -> tuple[Tensor, Tensor]:
    """Return the statistics over (proposals, objects, classes, image width), mirror images included if ``flips``."""
    statistics = BoxStatistics(classes, overlap)
    for proposals, objects, labels, width in images:
        statistics.add(proposals, objects, labels)
        if flips:
            statistics.add(bx.flip(proposals, width), bx.flip(objects, width), labels)
    return statistics.result()
