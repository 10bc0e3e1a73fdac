"""Linear SVMs on region features, one for each class, with hard negative mining (R-CNN, section 2.3 and appendix B).

Letters: K classes, D features, R regions of an image. Everything here is numpy, as the solver wants it; the solver is
scikit-learn's, which is liblinear, the one of the original. It is an extra that altopt does without elsewhere.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from altopt.config import SVMSettings
from altopt.errors import UsageError

Floats = NDArray[np.floating]


class MinedSVM:
    """The SVM of one class: its positives, the negatives that it remembers, and the weights of its last training.

    Negatives come region by region in one pass, so none comes twice. ``weights`` [D] is None before the first
    training; ``unconverged`` counts trainings that reached ``rule.max_iterations``.
    """

    def __init__(self, positives: Floats, rule: SVMSettings, seed: int) -> None:
        self.rule, self.seed = rule, seed
        self.positives = positives
        self.negatives: Floats = positives[:0]
        self.weights: Floats | None = None  # (D,)
        self.bias = 0.0
        self.trainings = self.unconverged = 0
        self._new: list[Floats] = []
        self._added = 0

    def scores(self, features: Floats) -> Floats:
        """Return the scores [R] of features [R, D]; only after the first training."""
        assert self.weights is not None
        return np.asarray(features @ self.weights + self.bias)  # (R,)

    def see(self, features: Floats, scores: Floats) -> None:
        """Take in an image's negatives [R, D]: all of the first, and of later ones those whose scores [R] are high.

        Trains after the first one, and whenever more than ``rule.retrain_after`` have been added.
        """
        if not len(self.positives) or not len(features):
            return
        first = self.weights is None
        hard = features if first else features[scores > self.rule.hard_score]
        self._new.append(hard.copy())  # a view would keep all of the image's features in memory
        self._added += len(hard)
        if first or self._added > self.rule.retrain_after:
            self.train()

    def train(self) -> None:
        """Train on the positives and all remembered negatives, then forget the negatives that have become easy."""
        self.negatives = np.concatenate([self.negatives, *self._new])
        self._new, self._added = [], 0
        if not len(self.positives) or not len(self.negatives):
            return
        rows = np.concatenate([self.positives, self.negatives])  # (N, D)
        labels = np.repeat([1, -1], [len(self.positives), len(self.negatives)])  # (N,)
        self.weights, self.bias, converged = fit(rows, labels, self.rule, self.seed)
        self.trainings += 1
        self.unconverged += not converged
        self.negatives = self.negatives[self.scores(self.negatives) >= self.rule.easy_score]


def mine(svms: Sequence[MinedSVM], features: Floats, overlaps: Floats) -> None:
    """Show an image's regions [R, D] to the SVM of every class; ``overlaps`` [R, K] are IoUs with its objects."""
    unknown = np.zeros(features.shape[1], np.float32)
    weights = np.stack([unknown if svm.weights is None else svm.weights for svm in svms])  # (K, D)
    scores = features @ weights.T + np.array([svm.bias for svm in svms], np.float32)  # (R, K)
    for label, svm in enumerate(svms):
        negative = overlaps[:, label] < svm.rule.negative_iou
        svm.see(features[negative], scores[negative, label])


def require_solver() -> tuple[Any, type[Warning]]:
    """Return scikit-learn's solver, and the warning of one that did not converge. Raises ``UsageError`` without it."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC
    except ImportError:
        raise UsageError("SVMs are trained by scikit-learn, which is not installed: install it with pip install -e "
                         "'.[svm]'") from None
    return LinearSVC, ConvergenceWarning


def fit(rows: Floats, labels: NDArray[np.integer], rule: SVMSettings, seed: int) -> tuple[Floats, float, bool]:
    """Return weights float32 [D], bias, and whether the solver converged, for ``labels`` [N] of 1 and -1.

    Minimises |w|^2 / 2 + C * (hinge losses, those of positives times their weight), the bias being the weight of one
    more feature that is always ``rule.bias``. Raises ``UsageError`` without scikit-learn.
    """
    linear_svc, not_converged = require_solver()
    solver = linear_svc(loss="hinge", dual=True, C=rule.cost, intercept_scaling=rule.bias, tol=rule.tolerance,
                        class_weight={1: rule.positive_weight}, max_iter=rule.max_iterations, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver.fit(rows, labels)
    others = [each for each in caught if not issubclass(each.category, not_converged)]
    for each in others:  # only the one that is an answer is kept from the user
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    converged = len(others) == len(caught)
    return solver.coef_[0].astype(np.float32), float(solver.intercept_[0]), converged


def feature_scale(norms: Floats, target: float) -> float:
    """Return the factor that brings the mean of the norms [N] to ``target``; 1 where there is none to go by."""
    mean = float(np.mean(norms)) if len(norms) else 0.0
    return target / mean if mean > 0 else 1.0
