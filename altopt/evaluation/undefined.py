"""Scores that may be undefined (AP of a class without objects): NaN in memory, left out of means, null in JSON."""

import math
from collections.abc import Iterable
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt


class ClassDict(TypedDict):
    """A class's score in JSON; the counts are the VOC challenge's."""

    ap: float | None
    positives: NotRequired[int]
    true_positives: NotRequired[int]
    false_positives: NotRequired[int]
    ignored: NotRequired[int]


class ScoreDict(TypedDict):
    """A score in JSON, with its convention in words; ``numbers`` are COCO's twelve."""

    protocol: str
    convention: str
    map: float | None
    numbers: NotRequired[dict[str, float | None]]
    classes: dict[str, ClassDict]


def mean_of_defined(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN when there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def or_none(value: float) -> float | None:
    """The value as JSON can hold it: None in place of NaN."""
    return None if math.isnan(value) else float(value)


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Elementwise part / whole, NaN where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, math.nan), where=whole > 0))
