"""GPTQ's solver (arXiv 2210.17323): round column by column and compensate each error in the columns not yet rounded.

The factor of the Hessian depends on the input only. So linears that share an input share the factor, and their rows are
solved together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from haq_lab.int8.weight_format import spread_scales
from haq_lab.quantizers.grid import qmax

BLOCK = 16  # most columns that are solved one by one; larger blocks are split in halves
SMALL = 64  # largest triangular matrix that is inverted without splitting
MAX_DAMPENING = 1.0


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of H^-1 (so that H^-1 = U^T U), with the columns in the order of solving.

    Attributes:
        upper: (k, k) the matrix U.
        order: (k,) indices of the columns by falling diag(H), or in their original order.
        dampening_frac: Share of mean(diag H) that was added to the diagonal.
        dead: (k,) bool, columns whose input is 0 for every token.
    """

    upper: Tensor
    order: Tensor
    dampening_frac: float
    dead: Tensor

    def conditional_variance(self) -> Tensor:
        """Return the cost (k,) of a squared error in each column after later columns have compensated it.

        The columns are in their original order.
        """
        variance = torch.empty_like(self.upper[0])
        variance[self.order] = self.upper.diagonal().square().reciprocal()
        return variance


def factorize(hessian: Tensor, dampening_frac: float, act_order: bool) -> Factor | None:
    """Factorize a Hessian after dampening.

    If the Cholesky decomposition fails, it is tried again with ten times the dampening, up to 1. A dead column gets a
    one on the diagonal.

    Args:
        hessian: (k, k).
        dampening_frac: Share of mean(diag H) to add to the diagonal.
        act_order: Whether to order the columns by falling diag(H).

    Returns:
        The factor, or None if every attempt fails.
    """
    for ordered, order, added in _damped(hessian, dampening_frac, act_order):
        root = _root(ordered)
        if root is not None and torch.isfinite(upper := _inverse(root)).all():
            return Factor(upper, order, added, hessian.diagonal() == 0)
    return None


def _root(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular R with R R^T = matrix, or None if there is none. R^-1 is the factor U of the inverse.

    Cholesky gives a lower triangle. Flipping rows and columns before and after turns it into R.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else lower.flip(0, 1)


def _inverse(upper: Tensor) -> Tensor:
    """Invert an upper triangular matrix by halves, so that most of the work is matrix products."""
    size = len(upper)
    if size <= SMALL:
        return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)
    half, inverse = size // 2, torch.zeros_like(upper)
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:]))
    return inverse


def _damped(hessian: Tensor, dampening_frac: float, act_order: bool) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield the ordered Hessian with increasing dampening, its column order and the dampening."""
    if not torch.isfinite(hessian).all():
        return
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean().item()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(hessian))
    ordered = hessian[order][:, order]
    added = 0.0
    while dampening_frac <= MAX_DAMPENING:
        ordered.diagonal().add_((dampening_frac - added) * mean)
        added = dampening_frac
        yield ordered, order, dampening_frac
        dampening_frac = max(dampening_frac * 10, 1e-4)


def solve(weight: Tensor, factor: Factor, scale: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Round a weight column by column, and compensate each error in later columns.

    A column keeps the scale of its group, in whatever order the columns are solved.

    Args:
        weight: (n, k).
        factor: The factor of the input's Hessian.
        scale: (n,) row scales, or (groups, n).
        bits: Bits of a weight.
        group: Columns that share a scale; None for row scales.

    Returns:
        int8 levels (n, k).
    """
    alive = weight[:, factor.order].masked_fill(factor.dead[factor.order], 0)
    # Transposed to (k, n), so that a column is contiguous.
    columns = np.ascontiguousarray(alive.t().numpy())
    levels = np.empty_like(columns)
    steps = spread_scales(scale, weight.shape[1], group).expand(weight.shape)[:, factor.order].t()
    if group is not None:  # else a view of one row, which stays in the cache
        steps = steps.contiguous()
    _solve_columns(columns, levels, factor.upper.numpy(), steps.numpy(), qmax(bits))
    solved = np.empty(weight.shape, dtype=np.int8)
    solved[:, factor.order.numpy()] = levels.T
    return torch.from_numpy(solved)


def _solve_columns(columns: np.ndarray, levels: np.ndarray, upper: np.ndarray, steps: np.ndarray, top: int) -> None:
    """Solve `columns` (k, n) with `steps` (k, n) into `levels`, and leave the errors divided by their pivots there.

    Splitting in halves makes the compensation between the halves one matrix product. This is GPTQ's lazy batch update,
    applied at every size.
    """
    size = len(columns)
    if size > BLOCK:
        half = size // 2
        _solve_columns(columns[:half], levels[:half], upper[:half, :half], steps[:half], top)
        columns[half:] -= upper[:half, half:].T @ columns[:half]
        _solve_columns(columns[half:], levels[half:], upper[half:, half:], steps[half:], top)
        return
    for column in range(size):
        np.clip(np.rint(columns[column] / steps[column]), -top, top, out=levels[column])
        columns[column] = (columns[column] - levels[column] * steps[column]) / upper[column, column]
        columns[column + 1 :] -= upper[column, column + 1 :, None] * columns[column]
