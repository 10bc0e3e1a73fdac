"""The two forms of average precision, by hand and on curves with gaps."""

import math

import numpy as np
import pytest

from altopt.evaluation.average_precision import area_under_envelope, eleven_points


def curves(hits, positives):
    trues = np.cumsum(hits)
    return trues / np.arange(1, len(hits) + 1), trues, trues / positives


def test_eleven_points_by_hand():
    precision, trues, _ = curves([0, 1, 0], 2)  # recall 0.5 at precision 1/2: levels 0 to 0.5 have it
    assert eleven_points(precision, trues, 2) == pytest.approx(6 * 0.5 / 11)


def test_area_by_hand():
    precision, _, recall = curves([0, 1, 0], 2)
    assert area_under_envelope(precision, recall) == 0.25


def test_envelope_looks_ahead():
    precision, trues, recall = curves([1, 0, 0, 1, 1, 1], 4)  # 1, 1/2, 1/3, 2/4, 3/5, 4/6
    assert area_under_envelope(precision, recall) == pytest.approx(1 / 4 + 3 / 4 * 4 / 6)
    assert eleven_points(precision, trues, 4) == pytest.approx((3 * 1 + 8 * 4 / 6) / 11)  # levels 0, 0.1, 0.2 | 0.3 on


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_recall_that_equals_a_level_reaches_it(tenths):
    precision, trues, _ = curves([1] * tenths, 10)
    assert eleven_points(precision, trues, 10) == pytest.approx((tenths + 1) / 11)


def test_levels_written_with_arange_would_miss_three_tenths():
    assert (np.arange(0, 1.1, 0.1) <= 3 / 10).sum() == 3
    precision, trues, _ = curves([1, 1, 1], 10)
    assert eleven_points(precision, trues, 10) == pytest.approx(4 / 11)


def test_undefined_precision_counts_as_none():
    precision, trues, recall = np.array([math.nan, 1.0]), np.array([0, 1]), np.array([0.0, 1.0])
    assert area_under_envelope(precision, recall) == 1
    assert eleven_points(precision, trues, 1) == 1


def test_no_detections():
    nothing = np.empty(0)
    assert area_under_envelope(nothing, nothing) == 0
    assert eleven_points(nothing, np.empty(0, np.int64), 5) == 0


def test_a_perfect_ranking_scores_one():
    precision, trues, recall = curves([1] * 7 + [0] * 5, 7)
    assert eleven_points(precision, trues, 7) == pytest.approx(1)
    assert area_under_envelope(precision, recall) == pytest.approx(1)
