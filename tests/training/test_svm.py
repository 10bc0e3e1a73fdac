import sys
import warnings

import numpy as np
import pytest

from altopt.config import SVMSettings
from altopt.errors import UsageError
from altopt.training.svm import MinedSVM, feature_scale, fit, mine

RULE = SVMSettings(cost=1.0, retrain_after=30)


def cloud(centre, count, seed, spread=0.3):
    random = np.random.default_rng(seed)
    return (np.array(centre) + spread * random.standard_normal((count, 2))).astype(np.float32)


def test_fit_minimises_the_objective():
    """No small step from the solution makes |w|^2 / 2 + C * weighted hinge losses smaller."""
    rows = np.concatenate([cloud((1, 0), 30, 1, 1.0), cloud((-1, 0.5), 50, 2, 1.0)])
    labels = np.repeat([1, -1], [30, 50])
    rule = SVMSettings(cost=0.1, tolerance=1e-8, max_iterations=100_000)
    weights, bias, converged = fit(rows, labels, rule, 3)
    assert converged

    def objective(w, b):
        margins = np.maximum(0, 1 - labels * (rows @ w + b))
        return (w @ w + (b / rule.bias) ** 2) / 2 + rule.cost * (np.where(labels > 0, 2.0, 1.0) * margins).sum()

    best = objective(weights, bias)
    random = np.random.default_rng(0)
    for _ in range(300):
        step = random.standard_normal(3) * random.choice([1e-3, 1e-2, 0.1])
        assert objective(weights + step[:2], bias + step[2]) > best - 1e-5


def test_the_limit_of_iterations_is_reported_and_not_hidden():
    rows, labels = np.concatenate([cloud((0, 0), 40, 1), cloud((0.1, 0), 40, 2)]), np.repeat([1, -1], 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converged = fit(rows, labels, SVMSettings(cost=100.0, max_iterations=1), 3)[2]
    assert not converged


def test_mining_keeps_only_negatives_at_the_margin():
    """Far negatives pass by, or are forgotten after a training; those near the positives stay."""
    svm = MinedSVM(cloud((3, 3), 20, 1), RULE, 3)
    far, near = [cloud((-40, -40), 50, seed) for seed in range(3)], cloud((1.5, 1.5), 8, 9)
    overlaps = np.zeros((50, 1), np.float32)
    mine([svm], far[0], overlaps)
    assert svm.trainings == 1
    for rows in [*far[1:], near]:
        mine([svm], rows, overlaps[: len(rows)])
    svm.train()
    assert (svm.scores(svm.positives) > 0).all()
    assert len(svm.negatives) <= 60
    assert all(any((row == kept).all() for kept in svm.negatives) for row in near[svm.scores(near) >= RULE.easy_score])
    assert (svm.scores(svm.negatives) >= RULE.easy_score).all()
    assert (svm.scores(np.concatenate(far)) < -1).all()


def test_trains_again_after_enough_new_negatives():
    svm = MinedSVM(cloud((1, 1), 20, 1), SVMSettings(retrain_after=30, hard_score=-1e9), 3)  # every one is hard
    overlaps = np.zeros((16, 1), np.float32)
    trainings = []
    for seed in range(8):
        mine([svm], cloud((0.9, 0.9), 16, seed), overlaps)
        trainings.append(svm.trainings)
    assert trainings == [1, 1, 2, 2, 3, 3, 4, 4]


def test_overlapping_regions_are_no_negatives(monkeypatch):
    rows = cloud((0, 0), 6, 1)
    svms = [MinedSVM(cloud((3, 3), 5, 2), RULE, 3), MinedSVM(cloud((3, -3), 5, 4), RULE, 3)]
    overlaps = np.array([[0, 1], [0.29, 0], [0.3, 0], [0.9, 0], [1, 0.29999], [0, 0.31]], np.float32)
    seen: list[list[np.ndarray]] = [[], []]
    for svm, kept in zip(svms, seen, strict=True):
        monkeypatch.setattr(svm, "see", lambda features, scores, kept=kept: kept.append(features))
    mine(svms, rows, overlaps)
    np.testing.assert_array_equal(seen[0][0], rows[[0, 1, 5]])
    np.testing.assert_array_equal(seen[1][0], rows[[1, 2, 3, 4]])


def test_a_class_without_objects_and_a_image_without_regions():
    unseen, seen = MinedSVM(np.empty((0, 2), np.float32), RULE, 3), MinedSVM(cloud((3, 3), 5, 2), RULE, 3)
    mine([unseen, seen], np.empty((0, 2), np.float32), np.empty((0, 2), np.float32))
    assert seen.weights is None
    mine([unseen, seen], cloud((0, 0), 5, 1), np.zeros((5, 2), np.float32))
    unseen.train()
    assert unseen.weights is None
    assert seen.weights is not None


def test_scale_brings_the_mean_norm_to_the_target():
    assert feature_scale(np.array([3.0, 5.0]), 20.0) == 5.0
    assert feature_scale(np.zeros(3), 20.0) == feature_scale(np.empty(0), 20.0) == 1.0


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(UsageError, match=r'scikit-learn, which is not installed: .*\.\[svm\]'):
        fit(cloud((0, 0), 2, 1), np.array([1, -1]), RULE, 3)
