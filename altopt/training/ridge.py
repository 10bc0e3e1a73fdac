"""Ridge regression from pooled features to box deltas, one for each class (R-CNN, appendix C).

Letters: N regions of the class, E pooled features. Sums are in float64. Where there are fewer regions than features,
the system that is solved is the dual one, N x N instead of E x E, which has the same solution.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Blocks = Callable[[], Iterable[Tensor]]


def whitening(targets: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean [4] of deltas ``Tensor[N, 4]``, and the matrices [4, 4] that whiten them and undo it.

    ``floor`` is added to the variances along the main axes, so that no axis is blown up.
    """
    mean = targets.mean(dim=0)
    centred = targets - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(targets))  # (4,), (4, 4)
    spread = (variances.clamp(min=0) + floor).sqrt()  # rounding can bring a variance of 0 below it
    return mean, axes / spread @ axes.T, axes * spread @ axes.T


def fit_box_ridge(blocks: Blocks, targets: Tensor, penalty: float, floor: float) -> tuple[Tensor, Tensor]:
    """Return weights float32 ``[4, E]`` and biases ``[4]``: deltas are ``features @ weights.T + biases``.

    ``blocks()`` yields the features in blocks ``Tensor[., E]``, in the order of ``targets`` ``Tensor[N, 4]``, as often
    as it is called. The least squares are on whitened targets, with ``penalty`` on all weights, that of a constant
    feature of 1 included, as the original has it.
    """
    mean, whiten, restore = whitening(targets.double(), floor)
    wanted = (targets.double() - mean) @ whiten
    width = next(iter(blocks())).shape[1] + 1
    dual = len(targets) < width  # whichever system is the smaller
    solution = _dual(blocks, wanted, penalty) if dual else _primal(blocks, wanted, penalty, width)
    solution = solution @ restore  # (E + 1, 4)
    return solution[:-1].T.float().contiguous(), (solution[-1] + mean).float()


def _primal(blocks: Blocks, wanted: Tensor, penalty: float, width: int) -> Tensor:
    """Solve (X'X + penalty) w = X'y."""
    products, right = wanted.new_zeros(width, width), wanted.new_zeros(width, 4)
    row = 0
    for block in blocks():  # added up block by block: X itself may be larger than the memory
        x = _with_constant(block)  # (., E + 1)
        products.addmm_(x.T, x)
        right.addmm_(x.T, wanted[row : row + len(x)])
        row += len(x)
    return _solve(products, right, penalty)


def _dual(blocks: Blocks, wanted: Tensor, penalty: float) -> Tensor:
    """Solve (XX' + penalty) a = y; then w = X'a."""
    x = torch.cat([_with_constant(block) for block in blocks()])  # (N, E + 1)
    return x.T @ _solve(x @ x.T, wanted, penalty)


def _solve(products: Tensor, right: Tensor, penalty: float) -> Tensor:
    products.diagonal().add_(penalty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(products))


def _with_constant(block: Tensor) -> Tensor:
    return torch.cat([block.double(), torch.ones(len(block), 1, dtype=torch.float64)], dim=1)
