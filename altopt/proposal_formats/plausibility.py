"""Do the coordinates look as they are said to be? Counts over all boxes, and what the counts give away.

Letters: K boxes of one image.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from altopt.evaluation.recall import proposal_recall
from altopt.proposal_formats.reader import Boxes, BoxFormat, Scores

EDGE_PIXELS = 1.0  # what a box may stick out by, as rounding makes it
TRIED_IMAGES = 100
LIMIT = 2000
BETTER = 0.1  # the gain in average recall from which on another reading of the numbers is worth a word
WRAPPED = 65000.0  # beyond any image: what a negative number in uint16 becomes

Reading = Callable[[Boxes], NDArray[np.float32]]
# BoxFormat to name, what is done to the numbers in words, and how continuous boxes look after it.
READINGS: dict[BoxFormat, tuple[str, Reading]] = {
    "yxyx-inclusive-1": ("x and y exchanged", lambda boxes: boxes[:, [1, 0, 3, 2]]),
    "xywh": ("x y width height", lambda boxes: np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])),
    "xyxy": ("x1 y1 x2 y2", lambda boxes: np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])),
}


class Plausibility:
    """What the boxes of a file are like, as their format reads them, counted image by image."""

    def __init__(self, box_format: BoxFormat) -> None:
        self.box_format = box_format
        self.boxes = self.empty = 0
        self.unusable: dict[str, int] = {}  # by rule
        self.first_unusable = ""
        # Boxes that begin at -1 or 0, and that end -1, 0 or 1 pixel beyond the image's edge.
        self.begin: Counter[int] = Counter()
        self.end: Counter[int] = Counter()
        self.least_begin = np.inf
        self.whole_numbers = True
        self._tried: list[tuple[Boxes, Boxes]] = []

    def usable(self, image_id: str, boxes: Boxes, scores: Scores, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Count the boxes [K, 4] of an image of this (width, height); return bool [K], which of them can be used."""
        limits = np.array(size, np.float32)
        start, end = boxes[:, :2], boxes[:, 2:]
        broken = {
            "not finite": ~np.isfinite(np.column_stack([boxes, scores])).all(1),
            "ending before they begin": (end < start).any(1),
            "outside their image": ((start < -EDGE_PIXELS) | (end > limits + EDGE_PIXELS)).any(1),
        }  # (K,) each
        for rule, mask in broken.items():
            if mask.any():
                self.unusable[rule] = self.unusable.get(rule, 0) + int(mask.sum())
                box = boxes[mask.argmax()]  # (4,)
                wrapped = ", a negative number that went through uint16" if (box > WRAPPED).any() else ""
                self.first_unusable = self.first_unusable or (
                    f"({', '.join(f'{value:g}' for value in box)}{wrapped}) of image {image_id}, "
                    f"{size[0]} x {size[1]} pixels")
        usable = ~np.any(list(broken.values()), axis=0)
        first, beyond = start[usable], (end - limits)[usable]
        for place in (-1, 0, 1):
            self.begin[place] += int((first == place).any(1).sum())
            self.end[place] += int((beyond == place).any(1).sum())
        self.least_begin = min(self.least_begin, first.min(initial=np.inf))
        self.whole_numbers &= bool((first % 1 == 0).all() and (beyond % 1 == 0).all())
        self.boxes += len(boxes)
        self.empty += int((end == start).any(1).sum())
        return np.asarray(usable)

    def try_readings(self, objects: Boxes, boxes: Boxes) -> None:
        """Keep the objects [N, 4] and proposals of the first images, to read their numbers in other ways."""
        if len(self._tried) < TRIED_IMAGES and len(objects):
            self._tried.append((objects, boxes))

    def warnings(self) -> list[str]:
        """Return what the counts give away, with the counts, a sentence each."""
        found = [self._counted_from(), self._other_reading()]
        if self.empty:
            found.append(f"{self.empty} of {self.boxes} boxes have no width or no height: they are kept")
        return [each for each in found if each]

    def problem(self) -> str:
        """Return how many boxes cannot be used and why, with the first of them; empty if all can."""
        if not self.unusable:
            return ""
        counts = " and ".join(f"{count} {rule}" for rule, count in self.unusable.items())
        return f"of {self.boxes} boxes read as {self.box_format}, {counts}, first {self.first_unusable}"

    def _counted_from(self) -> str:
        if self.box_format.endswith("inclusive-1"):
            if zero := self.begin[-1]:
                return f"{zero} boxes begin at pixel 0: they look counted from 0 (--box-format inclusive-0)"
            return ""
        if not self.whole_numbers or self.box_format == "xywh":
            return ""
        out, last, before = (self.end[place] for place in (1, 0, -1))
        if self.least_begin >= 1 and out:
            return (f"every x1 and y1 is at least 1 and {out} boxes end one pixel outside: they look counted from 1 "
                    "(--box-format inclusive-1)")
        if self.box_format == "xyxy" and self.least_begin >= 1 and last:
            return (f"every x1 and y1 is at least 1 though {last} boxes end at the image's edge: they look like "
                    "pixels counted from 1 (--box-format inclusive-1)")
        if self.box_format == "xyxy" and self.begin[0] and before and not last:
            return (f"{self.begin[0]} boxes begin at 0, {before} end one pixel before the image's edge, none at it: "
                    "they look like inclusive pixels (--box-format inclusive-0)")
        return ""

    def _other_reading(self) -> str:
        as_read = self._recall(lambda boxes: boxes)
        for box_format, (words, reading) in READINGS.items():
            if box_format in ("xyxy", "xywh") and (box_format == "xyxy") != (self.box_format == "xywh"):
                continue  # that is how they are read already
            other = self._recall(reading)
            if other > as_read + BETTER:
                option = "inclusive-1" if box_format == self.box_format else box_format
                return (f"average recall is {as_read:.2f} as read and {other:.2f} with {words}, on the first "
                        f"{len(self._tried)} images with objects: the boxes look like that (--box-format {option})")
        return ""

    def _recall(self, reading: Reading) -> float:
        if not self._tried:
            return 0.0
        with np.errstate(invalid="ignore"):  # boxes that are not finite are among those tried
            pairs = [(objects, reading(boxes)) for objects, boxes in self._tried]
            return proposal_recall(pairs, (LIMIT,)).average(LIMIT)
