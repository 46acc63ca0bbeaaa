"""GPTQ's solver (arXiv 2210.17323): round column by column, each error pushed onto the columns not yet rounded.

The factor of the Hessian depends on the input alone, so linears that share an input share it, and their rows
are solved together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from haq_lab.quantizers.grid import qmax

BLOCK = 16  # columns solved one by one; more are halved
SMALL = 64  # a triangle that is inverted as it is
DAMP_LIMIT = 1.0


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of H^-1 (so that H^-1 = U^T U), columns in the order of solving.

    Attributes:
        upper: (k, k).
        order: (k,) the columns by falling diag(H), or as they are.
        dampening_frac: Share of mean(diag H) that was added to the diagonal.
        dead: (k,) columns that no token ever excites.
    """

    upper: Tensor
    order: Tensor
    dampening_frac: float
    dead: Tensor

    def conditional_variance(self) -> Tensor:
        """(k,) in the columns' own order: what an error in a column costs once later columns make up for it."""
        variance = torch.empty_like(self.upper[0])
        variance[self.order] = self.upper.diagonal().square().reciprocal()
        return variance


def factorize(hessian: Tensor, dampening_frac: float, act_order: bool) -> Factor | None:
    """The factor of a damped Hessian (k, k), or None where it has no usable one.

    A failed Cholesky is tried again with ten times the damp, up to 1. A dead column gets a one on the diagonal.
    """
    for ordered, order, added in _damped(hessian, dampening_frac, act_order):
        root = _root(ordered)
        if root is not None and torch.isfinite(upper := _inverse(root)).all():
            return Factor(upper, order, added, hessian.diagonal() == 0)
    return None


def conditional_variance(hessian: Tensor, dampening_frac: float, act_order: bool) -> Tensor | None:
    """`Factor.conditional_variance` of a Hessian (k, k) at half the price, for those who need no more."""
    for ordered, order, _ in _damped(hessian, dampening_frac, act_order):
        root = _root(ordered)
        if root is not None:
            variance = torch.empty_like(root[0])
            variance[order] = root.diagonal().square()
            return variance
    return None


def _root(matrix: Tensor) -> Tensor | None:
    """R upper triangular with R R^T = matrix, so that R^-1 is the factor U of its inverse; None where it has none.

    Cholesky's lower one comes out so when rows and columns are turned round before and after.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else lower.flip(0, 1)


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix; by halves, so that nearly all of it is matrix products."""
    size = len(upper)
    if size <= SMALL:
        return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)
    half, inverse = size // 2, torch.zeros_like(upper)
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:]))
    return inverse


def _damped(hessian: Tensor, dampening_frac: float, act_order: bool) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A Hessian in the order of solving, under one damp after the other, with that order and damp."""
    if not torch.isfinite(hessian).all():
        return
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean().item()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(hessian))
    ordered = hessian[order][:, order]
    added = 0.0
    while dampening_frac <= DAMP_LIMIT:
        ordered.diagonal().add_((dampening_frac - added) * mean)
        added = dampening_frac
        yield ordered, order, dampening_frac
        dampening_frac = max(dampening_frac * 10, 1e-4)


def solve(weight: Tensor, factor: Factor, scale: Tensor, bits: int) -> Tensor:
    """int8 levels (n, k) of `weight` (n, k) under `scale` (n,), by the feedback of the Hessian's factor."""
    alive = weight[:, factor.order].masked_fill(factor.dead[factor.order], 0)
    # Transposed, so that a column is contiguous: (k, n).
    columns = np.ascontiguousarray(alive.t().numpy())
    levels = np.empty_like(columns)
    _solve_columns(columns, levels, factor.upper.numpy(), scale.numpy(), qmax(bits))
    solved = np.empty(weight.shape, dtype=np.int8)
    solved[:, factor.order.numpy()] = levels.T
    return torch.from_numpy(solved)


def _solve_columns(columns: np.ndarray, levels: np.ndarray, upper: np.ndarray, step: np.ndarray, top: int) -> None:
    """Solve `columns` (k, n) into `levels`; leaves the errors, each over its pivot, in `columns`.

    Halving makes the feedback between the halves one matrix product; it is GPTQ's lazy batch, at every size.
    """
    size = len(columns)
    if size > BLOCK:
        half = size // 2
        _solve_columns(columns[:half], levels[:half], upper[:half, :half], step, top)
        columns[half:] -= upper[:half, half:].T @ columns[:half]
        _solve_columns(columns[half:], levels[half:], upper[half:, half:], step, top)
        return
    for column in range(size):
        np.clip(np.rint(columns[column] / step), -top, top, out=levels[column])
        columns[column] = (columns[column] - levels[column] * step) / upper[column, column]
        columns[column + 1 :] -= upper[column, column + 1 :, None] * columns[column]
