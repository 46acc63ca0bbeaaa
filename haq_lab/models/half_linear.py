"""A linear whose 16-bit weight is converted to the input's type block by block, so no full copy is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.float_linear import float_linear

NATIVE_ROWS = 16  # up to this number of rows, our kernel, which converts in registers, is faster
BLOCK_BYTES = 16 << 20  # of converted weights in memory at a time


class HalfLinear(nn.Linear):
    """A linear (n, k) that shares its weight with another linear and accepts inputs of a wider type.

    Args:
        linear: The linear whose weight and bias are shared.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., n) for x (..., k). It is computed and returned in x's type."""
        y = F.linear(x, self.weight) if self.weight.dtype == x.dtype else _Widened.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Widened(torch.autograd.Function):
    """Product of x (..., k) and a transposed table (n, k), with the gradient of x."""

    @staticmethod
    def forward(context: Any, x: Tensor, table: Tensor) -> Tensor:
        context.save_for_backward(table)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= NATIVE_ROWS and _native_supports(rows, table):
            return float_linear(rows.contiguous(), table).view(*x.shape[:-1], len(table))
        y = rows.new_empty(len(rows), len(table))
        for part in _blocks(table, x.dtype):
            torch.mm(rows, table[part].to(x.dtype).t(), out=y[:, part])
        return y.view(*x.shape[:-1], len(table))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (table,) = gradients, context.saved_tensors
        parts = _blocks(table, gradient.dtype)
        total = gradient[..., parts[0]] @ table[parts[0]].to(gradient.dtype)
        for part in parts[1:]:
            total += gradient[..., part] @ table[part].to(gradient.dtype)
        return total, None


def _native_supports(x: Tensor, table: Tensor) -> bool:
    half = table.dtype in (torch.bfloat16, torch.float16)
    return x.is_cpu and table.is_cpu and half and x.dtype == torch.float32 and library.available()


def _blocks(table: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return slices of consecutive rows of the table (n, k), each of about `BLOCK_BYTES` in `dtype`."""
    step = max(1, BLOCK_BYTES // (dtype.itemsize * table.shape[1]))
    return [slice(first, first + step) for first in range(0, len(table), step)]
