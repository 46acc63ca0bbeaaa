"""Round weights to symmetric integer grids, with one scale per output channel or group of columns, and ties to even."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.numerics import round_to_grid, scale_of
from haq_lab.int8.weight_format import WeightFormat, spread_scales


def qmax(bits: int) -> int:
    """Return the largest level of a symmetric grid: 127 for 8 bits, 7 for 4 bits."""
    return 2 ** (bits - 1) - 1


def row_scale(weight: Tensor, bits: int) -> Tensor:
    """Return the scale max|w| / qmax of each row: (n, k) -> (n,). A row of zeros gets 1."""
    return scale_of(weight.abs().amax(dim=1), qmax(bits))


def weight_scale(weight: Tensor, format: WeightFormat) -> Tensor:
    """Return the scale max|w| / qmax of each row, (n,), or of each group of columns, (groups, n)."""
    if format.group is None:
        return row_scale(weight, format.bits)
    largest = torch.stack([columns.abs().amax(dim=1) for columns in weight.split(format.group, dim=1)])
    return scale_of(largest, qmax(format.bits))


def searched_scale(weight: Tensor, importance: Tensor, format: WeightFormat) -> Tensor:
    """Search the scale of each row, or of each group of columns, for the smallest weighted rounding error.

    The search shrinks max|w| / qmax by up to 30 %. This clips the largest weights, but makes the grid finer.

    Args:
        weight: (n, k).
        importance: (k,) weight of a squared error in each column.
        format: Format of the weights.

    Returns:
        (n,) scales, or (groups, n).
    """
    if format.group is None:
        return searched_row_scale(weight, importance, format.bits)
    groups = zip(weight.split(format.group, dim=1), importance.split(format.group), strict=True)
    return torch.stack([searched_row_scale(columns, own, format.bits) for columns, own in groups])


def searched_row_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Return the searched scale (n,) of each row, as `searched_scale` does without groups."""
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


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Return the int8 levels (n, k) of a weight (n, k) rounded to nearest.

    Args:
        weight: (n, k).
        scale: (n,) row scales, or (groups, n).
        bits: Bits of a weight.
        group: Columns that share a scale; None for row scales.
    """
    return round_to_grid(weight, spread_scales(scale, weight.shape[1], group), qmax(bits)).to(torch.int8)
