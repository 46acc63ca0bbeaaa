"""An activation that exists in int8 only: what a fused kernel hands on where int8 linears are its only readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from haq_lab.int8.joint import Joint
    from haq_lab.int8.linear import Int8Linear


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Stands for a tensor (..., k) that was quantised where it was computed.

    It has that tensor's shape and type for code that asks for them, and no values: torch's functions and operators
    refuse it with a TypeError, so that a reader which is no int8 linear does not go unnoticed.

    Attributes:
        levels: int8 (m, k).
        scale: Of the rows, float32 (m,) as the backend's `product` takes it.
        shape: Of the tensor it stands for.
        dtype: Of that tensor, and of what linears make of it.
    """

    levels: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def size(self) -> torch.Size:
        """The shape, as tensors tell it."""
        return self.shape


def multiplied(x: Tensor | QuantizedRows, by: Int8Linear | Joint) -> Tensor:
    """x (..., k) by an int8 linear, or by joined ones as one -> (..., n)."""
    if isinstance(x, QuantizedRows):
        y = by.backend.product(x.levels, x.scale, by.weights, x.dtype)
    else:
        rows = x.reshape(-1, x.shape[-1])
        y = by.backend.linear(rows, by.weights, by.scheme, by.input_scale)
    return y.view(*x.shape[:-1], y.shape[-1])
