"""Symmetric integer grids for weights: one scale per output channel, round half to even."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haq_lab.int8.numerics import round_to_grid, scale_of

CACHED = 1 << 18  # bytes of a block of rows


def qmax(bits: int) -> int:
    """The largest level: 127 for 8 bits, 7 for 4; the grid is symmetric."""
    return 2 ** (bits - 1) - 1


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """RTN's scale, max|w| / qmax for each row: (n, k) -> (n,). A zero row gets 1."""
    return scale_of(weight.abs().amax(dim=1), qmax(bits))


def row_scales(weight: Tensor, factors: Sequence[Tensor], bits: int) -> Tensor:
    """`row_scale` of weight (n, k) times each of the positive factors (k,): (factors, n), bit for bit.

    A block of rows passes all factors while it is in the cache, so that the weights are read once.
    """
    largest = torch.empty(len(factors), len(weight))
    for rows in cached_rows(weight):
        magnitude = weight[rows].abs()
        scaled = torch.empty_like(magnitude)
        for number, factor in enumerate(factors):
            torch.amax(torch.mul(magnitude, factor, out=scaled), dim=1, out=largest[number, rows])
    return scale_of(largest, qmax(bits))


def cached_rows(matrix: Tensor) -> list[slice]:
    """The rows of a matrix (n, k) in blocks, of which a few at once fit into a core's cache."""
    step = max(1, CACHED // (matrix.itemsize * matrix.shape[1]))
    return [slice(first, first + step) for first in range(0, len(matrix), step)]


def searched_row_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale of each row with the least rounding error, weighted by `importance` (k,) of the columns.

    Tries max|w| shrunk by up to 30 %; clipping a lone large weight can pay for a finer grid.
    """
    full = row_scale(weight, bits)
    best, best_error = full, None
    for shrink in torch.linspace(1.0, 0.7, 13).tolist():
        scale = full * shrink
        rounded = round_to_grid(weight, scale[:, None], qmax(bits)) * scale[:, None]
        error = (rounded - weight).square_() @ importance
        if best_error is None:
            best, best_error = scale, error
        else:
            better = error < best_error
            best = torch.where(better, scale, best)
            best_error = torch.where(better, error, best_error)
    return best


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 levels of `weight` (n, k) under `scale` (n,)."""
    return round_to_grid(weight, scale[:, None], qmax(bits)).to(torch.int8)
