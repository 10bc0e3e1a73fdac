"""Whether the anchors suit the objects: the best IoU that each object has with an anchor, and anchors that suit better.

Letters: N objects, A anchors at a position.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from altopt.config import NetworkConfig
from altopt.datasets.dataset import Dataset
from altopt.extents import input_size, scale_of, shape_behind
from altopt.models.backbones import STRIDE
from altopt.ops.anchors import reference_anchors

Boxes = NDArray[np.float64]
GOOD_IOU = 0.5  # below it an object trains the RPN by its one best anchor alone
TOLERATED = 0.05  # of the objects may be below
LOOKED_AT = 500  # about so many images, from all over the data set
FEWEST = 20  # objects: fewer say nothing
HELP = 0.75  # other anchors are worth a word if they leave so much of the share, or less
SMALLEST_SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # each doubled twice or three times
LONG_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Framed(NamedTuple):
    """An image's objects in the input frame, whose size is (width, height)."""

    boxes: Boxes  # (N, 4)
    size: tuple[int, int]


@dataclass(frozen=True)
class AnchorFit:
    """How many objects there are, the share whose best IoU is below 0.5, and other anchors with theirs."""

    objects: int
    share: float
    better: NetworkConfig | None = None
    share_with_better: float = 0.0

    def warning(self) -> str | None:
        """Return what to say of it; None where the anchors suit."""
        if self.share <= TOLERATED or self.objects < FEWEST:
            return None
        text = (f"{self.share:.0%} of {self.objects} objects have no anchor with an IoU of {GOOD_IOU}, so the RPN "
                "learns them badly")
        if self.better is None:
            return f"{text}, and other scales or ratios would help little: try a larger network.short_side"
        scales = f"network.anchor_scales={list(self.better.anchor_scales)}"
        ratios = "" if self.better.anchor_ratios != LONG_RATIOS else f" and network.anchor_ratios={list(LONG_RATIOS)}"
        return f"{text}: with {scales}{ratios} it would be {self.share_with_better:.0%} (--set, or the recipe)"


def anchor_fit(dataset: Dataset, network: NetworkConfig) -> AnchorFit:
    """Return how the network's anchors suit the objects that count, and what would suit better.

    It looks at some of the images only where there are many.
    """
    images = [framed for id in dataset.ids[:: -(-len(dataset.ids) // LOOKED_AT)]
              if len((framed := _framed(dataset, id, network)).boxes)]
    overlaps = np.concatenate([best_overlaps(each, network) for each in images] or [np.zeros(0)])
    share = _share_below(overlaps)
    if share <= TOLERATED:
        return AnchorFit(len(overlaps), share)
    ladders = [tuple(smallest * 2**step for step in range(steps)) for steps in (3, 4) for smallest in SMALLEST_SCALES]
    others = [replace(network, anchor_scales=scales, anchor_ratios=ratios)
              for ratios in (network.anchor_ratios, LONG_RATIOS) for scales in ladders]
    shares = [_share_below(np.concatenate([best_overlaps(each, other) for each in images])) for other in others]
    # The fewest anchors among those that are good enough; where none is, the best.
    best = next((k for k, found in enumerate(shares) if found <= TOLERATED), int(np.argmin(shares)))
    return AnchorFit(len(overlaps), share, others[best] if shares[best] <= share * HELP else None, shares[best])


def best_overlaps(image: Framed, network: NetworkConfig) -> NDArray[np.float64]:
    """Return the best IoU that each of an image's objects has with an anchor that lies inside the image: [N]."""
    reference = reference_anchors(network.anchor_base, network.anchor_ratios, network.anchor_scales).double().numpy()
    sides = reference[:, 2:] - reference[:, :2]  # (A, 2)
    _, rows, columns = shape_behind(network.name, image.size)
    centre, extent = STRIDE / 2, np.array(image.size, np.float64)
    # Positions whose anchor crosses no border: the others are not trained on (Faster R-CNN, section 3.1.2).
    first = np.maximum(np.ceil((sides / 2 - centre) / STRIDE), 0)  # (A, 2)
    last = np.minimum(np.floor((extent - sides / 2 - centre) / STRIDE), np.array([columns, rows]) - 1)
    middles = (image.boxes[:, None, :2] + image.boxes[:, None, 2:]) / 2  # (N, 1, 2)
    # Of anchors of one shape the nearest overlaps the most.
    nearest = np.clip(np.round((middles - centre) / STRIDE), first, np.maximum(last, first)) * STRIDE + centre
    low = np.maximum(nearest - sides / 2, image.boxes[:, None, :2])
    high = np.minimum(nearest + sides / 2, image.boxes[:, None, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)  # (N, A)
    areas = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(axis=1)  # (N,)
    overlaps = shared / (areas[:, None] + sides.prod(axis=1) - shared)
    best: NDArray[np.float64] = np.where((last >= first).all(axis=1), overlaps, 0.0).max(axis=1)
    return best


def _framed(dataset: Dataset, id: str, network: NetworkConfig) -> Framed:
    size = dataset.size(id)
    scale = scale_of(size, network.short_side, network.max_side)
    return Framed(dataset.objects(id).usable().boxes.astype(np.float64) * scale, input_size(size, scale))


def _share_below(overlaps: NDArray[np.float64]) -> float:
    return float((overlaps < GOOD_IOU).mean()) if len(overlaps) else 0.0
