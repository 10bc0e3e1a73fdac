import pytest
import torch

from altopt.machine.randomness import generator
from altopt.training.ridge import fit_box_ridge, whitening


def problem(count, width):
    random = generator("ridge", count, width)
    features = torch.randn(count, width, generator=random)
    mixed = torch.randn(count, 4, generator=random) @ torch.tensor([[1.0, 0.5, 0, 0], [0, 0.1, 0, 0.2],
                                                                    [0, 0, 2, 0], [0, 0, 0, 0.3]])
    return features, mixed + 0.3 * features[:, :1] + 0.7


def blocks_of(features, size):
    return lambda: iter(torch.split(features, size))


def closed_form(features, targets, penalty, floor):
    """(X'X + penalty)^-1 X'(Y - mean) T T^-1 + mean, X with a column of ones, all by explicit inverses."""
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    y = targets.double()
    mean = y.mean(dim=0)
    covariance = (y - mean).T @ (y - mean) / len(y)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag((values + floor) ** -0.5) @ vectors.T
    solution = torch.linalg.inv(x.T @ x + penalty * torch.eye(x.shape[1])) @ x.T @ (y - mean) @ whiten
    return lambda new: torch.cat([new, torch.ones(len(new), 1)], dim=1).double() @ solution @ whiten.inverse() + mean


@pytest.mark.parametrize(("count", "width"), [(60, 5), (5, 60), (1, 3), (8, 8)])
@pytest.mark.parametrize("penalty", [0.5, 1000.0])
def test_equals_the_closed_form(count, width, penalty):
    features, targets = problem(count, width)
    weights, biases = fit_box_ridge(blocks_of(features, 7), targets, penalty, 0.001)
    assert (weights.shape, biases.shape) == ((4, width), (4,))
    new = torch.randn(9, width, generator=generator("new"))
    expected = closed_form(features, targets, penalty, 0.001)(new)
    torch.testing.assert_close(new @ weights.T + biases, expected.float(), atol=1e-5, rtol=1e-4)


def test_blocks_do_not_matter():
    features, targets = problem(60, 5)
    one, many = (fit_box_ridge(blocks_of(features, size), targets, 1.0, 0.001) for size in (60, 1))
    torch.testing.assert_close(one[0], many[0])


def test_whitened_targets_have_no_correlation_and_unit_spread():
    _, targets = problem(500, 3)
    mean, whiten, restore = whitening(targets.double(), 0.0)
    white = (targets - mean) @ whiten
    torch.testing.assert_close(white.T @ white / 500, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(whiten @ restore, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_large_penalty_leaves_the_mean():
    features, targets = problem(60, 5)
    weights, biases = fit_box_ridge(blocks_of(features, 60), targets, 1e12, 0.001)
    assert weights.abs().max() < 1e-6
    torch.testing.assert_close(biases, targets.mean(dim=0), atol=1e-5, rtol=0)
