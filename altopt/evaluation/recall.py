"""How well proposals cover the objects: recall against IoU and number of proposals.

Objects and proposals are paired one to one, as py-faster-rcnn's ``evaluate_recall`` does: again and again the object
whose best remaining proposal overlaps most takes that proposal. Objects outside the area range take no part.

Letters: N objects and K proposals of an image; L limits, A area ranges, T thresholds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from altopt.evaluation.measures import Boxes, Floats, box_areas, box_iou, mean_of_defined, or_none, ratio

Ints = npt.NDArray[np.int64]
THRESHOLDS = np.arange(10, 20) / 20  # whole numbers divided once: an IoU of exactly 0.55 meets 0.55
LIMITS = (50, 100, 300, 1000, 2000)
SIDES = {
    "all": (0.0, np.inf), "small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, np.inf),  # COCO's
    "96-128": (96.0, 128.0), "128-256": (128.0, 256.0), "256-512": (256.0, 512.0), "512-inf": (512.0, np.inf),
}
AREA_RANGES = {name: (low**2, high**2) for name, (low, high) in SIDES.items()}  # both ends belong to the range
CONVENTION = "one proposal per object, greedy; IoU >= threshold; difficult and crowd not counted"


class AreaDict(TypedDict):
    """Recall of the objects in an area range, at ``THRESHOLDS``, and its mean."""

    average_recall: float | None
    recall: list[float | None]


class LimitDict(TypedDict):
    """Recall of the first so many proposals."""

    proposals_per_image: float
    areas: dict[str, AreaDict]


class RecallDict(TypedDict):
    """A recall in JSON; ``limits`` has an entry for each number of proposals."""

    convention: str
    images: int
    thresholds: list[float]
    objects: dict[str, int]
    limits: dict[str, LimitDict]


@dataclass(frozen=True, eq=False)
class Recall:
    """Counts over all images: ``objects`` int64 [A], ``covered`` int64 [L, A, T], ``proposals`` int64 [L] used."""

    limits: tuple[int, ...]
    images: int
    objects: Ints
    covered: Ints
    proposals: Ints

    def at(self, limit: int, area: str = "all") -> Floats:
        """Recall float64 [T] at ``THRESHOLDS`` of the first ``limit`` proposals; NaN without objects in the range."""
        index = list(AREA_RANGES).index(area)
        return ratio(self.covered[self.limits.index(limit), index], self.objects[index])

    def average(self, limit: int, area: str = "all") -> float:
        """Average recall: the mean over the thresholds."""
        return mean_of_defined(self.at(limit, area).tolist())

    def as_dict(self) -> RecallDict:
        """JSON-able; NaN is None."""
        return {
            "convention": CONVENTION,
            "images": self.images,
            "thresholds": THRESHOLDS.tolist(),
            "objects": dict(zip(AREA_RANGES, self.objects.tolist(), strict=True)),
            "limits": {str(limit): {
                "proposals_per_image": float(used / max(self.images, 1)),
                "areas": {area: {
                    "average_recall": or_none(self.average(limit, area)),
                    "recall": [or_none(value) for value in self.at(limit, area).tolist()],
                } for area in AREA_RANGES},
            } for limit, used in zip(self.limits, self.proposals, strict=True)},
        }


def proposal_recall(images: Iterable[tuple[Boxes, Boxes]], limits: Sequence[int] = LIMITS) -> Recall:
    """Recall over images, each the boxes [N, 4] of its objects and its proposals [K, 4] by descending score.

    Both are continuous xyxy in one frame, that of the original image (areas are measured in it). Leave difficult
    and crowd objects out (``Objects.usable``). Images are taken one at a time and not kept.
    """
    count = 0
    objects = np.zeros(len(AREA_RANGES), np.int64)
    covered = np.zeros((len(limits), len(AREA_RANGES), len(THRESHOLDS)), np.int64)
    used = np.zeros(len(limits), np.int64)
    for boxes, proposals in images:
        areas = box_areas(boxes)  # (N,)
        inside = np.array([(low <= areas) & (areas <= high) for low, high in AREA_RANGES.values()])  # (A, N)
        all_overlaps = box_iou(boxes, proposals[: max(limits)])  # (N, K)
        count += 1
        objects += inside.sum(axis=1)
        used += np.minimum(limits, len(proposals))
        for of_limit, limit in zip(covered, limits, strict=True):
            overlaps = all_overlaps[:, :limit]
            if overlaps.size:
                best, values = _wishes(overlaps)
                for of_range, mask in zip(of_limit, inside, strict=True):  # views of ``covered``, (T,) each
                    rows = np.flatnonzero(mask)
                    of_range += (_cover(overlaps, rows, best[rows], values[rows])[:, None] >= THRESHOLDS).sum(axis=0)
    return Recall(tuple(limits), count, objects, covered, used)


def cover(overlaps: Floats) -> Floats:
    """IoU float64 [N] with which each object is covered, 0 for none, given the IoUs [N, K] with all proposals."""
    return _cover(overlaps, np.arange(len(overlaps)), *_wishes(overlaps)) if overlaps.size else np.zeros(len(overlaps))


def _wishes(overlaps: Floats) -> tuple[Ints, Floats]:
    """The proposal int64 [N] that each object overlaps most, and its IoU float64 [N]."""
    best = overlaps.argmax(axis=1)
    return best, overlaps[np.arange(len(best)), best]


def _cover(overlaps: Floats, rows: Ints, best: Ints, values: Floats) -> Floats:
    """``cover`` of some rows, whose wishes are known: where no two wish the same proposal, all get theirs."""
    if len(set(best.tolist())) == len(best):
        return values
    covered, best, values = np.zeros(len(best)), best.copy(), values.copy()
    taken: list[int] = []
    while values.max() > 0:
        chosen = values.argmax()
        covered[chosen] = values[chosen]
        values[chosen] = -1.0
        taken.append(best[chosen])
        rivals = np.flatnonzero((best == taken[-1]) & (values > 0))
        if len(rivals):
            left = overlaps[rows[rivals]]
            left[:, taken] = -1.0
            best[rivals], values[rivals] = _wishes(left)
    return covered
