"""Scores that may be undefined (AP of a class without objects): NaN in memory, left out of means, null in JSON."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


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
