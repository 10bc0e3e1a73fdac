"""Average precision of one class, in the VOC challenge's two forms.

Curves run over the D detections of a class by descending score. A precision of NaN (nothing but ignored detections so
far) counts as 0.
"""


import numpy as np
import numpy.typing as npt

Curve = npt.NDArray[np.float64]


def eleven_points(precision: Curve, true_positives: npt.NDArray[np.integer], positives: int) -> float:
    """Mean over the recall levels 0, 0.1, ..., 1 of the best precision at that recall or more (VOC 2007).

    Levels are compared in whole numbers, 10 * true positives >= level * positives: written as floats, 0.1 * 3 lies
    above 0.3, and a recall of exactly 0.3 would miss its level.
    """
    precision = np.nan_to_num(precision)
    reached = (precision[10 * true_positives >= level * positives] for level in range(11))
    return float(np.mean([values.max(initial=0.0) for values in reached]))


def area_under_envelope(precision: Curve, recall: Curve) -> float:
    """Area under precision made non-increasing in recall (VOC 2010 and later); ``recall`` never decreases."""
    envelope = np.maximum.accumulate(np.nan_to_num(precision)[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
