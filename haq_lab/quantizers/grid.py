"""Symmetric integer grids for weights: one scale per output channel, round half to even."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.numerics import round_to_grid, scale_of


def qmax(bits: int) -> int:
    """The largest level: 127 for 8 bits, 7 for 4; the grid is symmetric."""
    return 2 ** (bits - 1) - 1


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """RTN's scale, max|w| / qmax for each row: (n, k) -> (n,). A zero row gets 1."""
    return scale_of(weight.abs().amax(dim=1), qmax(bits))


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
