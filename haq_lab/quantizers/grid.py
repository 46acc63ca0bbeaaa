"""Round weights to symmetric integer grids, with one scale per output channel and ties to even."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.numerics import round_to_grid, scale_of


def qmax(bits: int) -> int:
    """Return the largest level of a symmetric grid: 127 for 8 bits, 7 for 4 bits."""
    return 2 ** (bits - 1) - 1


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """Return the scale max|w| / qmax of each row: (n, k) -> (n,). A row of zeros gets 1."""
    return scale_of(weight.abs().amax(dim=1), qmax(bits))


def searched_row_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Search the scale of each row for the smallest weighted rounding error.

    The search shrinks max|w| / qmax by up to 30 %. This clips the largest weights, but makes the grid finer.

    Args:
        weight: (n, k).
        importance: (k,) weight of a squared error in each column.

    Returns:
        (n,) scales.
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
    """Return the int8 levels (n, k) of a weight (n, k) rounded to nearest with row scales (n,)."""
    return round_to_grid(weight, scale[:, None], qmax(bits)).to(torch.int8)
