"""The robust loss by itself; those of the networks are held against loops where the networks are."""

import pytest
import torch

from altopt.models.losses import smooth_l1


def test_smooth_l1_is_quadratic_below_a_ninth():
    for x, expected in ((0.05, 4.5 * 0.05**2), (1 / 9, 1 / 18), (0.2, 0.2 - 1 / 18), (-3, 3 - 1 / 18), (0, 0)):
        loss = smooth_l1(torch.tensor([x], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 3.0)
        assert loss.item() == pytest.approx(expected)
    assert smooth_l1(torch.full((5, 4), 2.0), torch.zeros(5, 4), 1.0).item() == pytest.approx(20 * 1.5)  # a sum
