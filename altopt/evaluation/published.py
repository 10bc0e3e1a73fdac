"""Published figures for VOC2007 test with VGG16 and 300 proposals, and a measured result beside them.

All figures are average precisions in per cent, by the 11-point rule of VOC2007.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from altopt.datasets.voc import VOC_CLASSES
from altopt.errors import UsageError


@dataclass(frozen=True)
class Published:
    """A result of training on VOC07 trainval: the AP of each of VOC_CLASSES and their mean as its source states it."""

    name: str
    average_precisions: tuple[float, ...]
    mean: float
    source: str


_PAPER = "Ren et al., Faster R-CNN, arXiv 1506.01497v3, table 6"

PAPER_SHARED = Published("paper, shared", (
    *(70.0, 80.6, 70.1, 57.3, 49.9, 78.2, 80.4, 82.0, 52.2, 75.3),
    *(67.2, 80.3, 79.8, 75.0, 76.3, 39.1, 68.3, 67.3, 81.1, 67.6),
), 69.9, _PAPER)
PAPER_UNSHARED = Published("paper, unshared", (
    *(74.1, 77.2, 67.7, 53.9, 51.0, 75.1, 79.2, 78.9, 50.7, 78.0),
    *(61.1, 79.1, 81.9, 72.2, 75.9, 37.2, 71.4, 62.5, 77.4, 66.4),
), 68.5, _PAPER)
PY_FASTER_RCNN = Published("py-faster-rcnn", (
    *(68.5, 79.6, 67.4, 57.0, 50.5, 76.7, 79.7, 79.0, 49.5, 75.3),
    *(67.6, 78.0, 80.5, 75.4, 76.7, 38.6, 68.2, 64.2, 75.9, 70.1),
), 68.9, "rbgirshick/py-faster-rcnn, issue 797: a user's run of the alternating optimisation")
# What the seven stages on VOC07 trainval alone are to be compared with.
VOC07_VGG16 = (PAPER_SHARED, PAPER_UNSHARED, PY_FASTER_RCNN)


@dataclass(frozen=True)
class Row:
    """One line of the table, in per cent: a class or "mAP", what was measured, and what each column published."""

    name: str
    measured: float | None
    published: tuple[float, ...]


def beside(measured: Mapping[str, float | None], columns: Sequence[Published] = VOC07_VGG16) -> list[Row]:
    """Return a row for each of VOC_CLASSES and one for the mean, from each class's measured AP as a fraction in [0, 1].

    A class without a measured AP (absent, None or NaN) has None, and then the mean has None too: a mean of fewer
    classes compares with nothing. Raises UsageError when a class is none of VOC's.
    """
    unknown = [name for name in measured if name not in VOC_CLASSES]
    if unknown:
        raise UsageError(f'class "{unknown[0]}" is none of VOC2007\'s 20 classes: only they have published figures')
    # NaN, of a class without objects, is no measurement either.
    values = {name: 100 * value for name, value in measured.items() if value is not None and not math.isnan(value)}
    rows = [Row(name, values.get(name), tuple(column.average_precisions[index] for column in columns))
            for index, name in enumerate(VOC_CLASSES)]
    mean = sum(values.values()) / len(values) if len(values) == len(VOC_CLASSES) else None
    return [*rows, Row("mAP", mean, tuple(column.mean for column in columns))]
