"""A linear whose weights are narrower than what it multiplies: they are widened as they are read, block by block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library

NATIVE_ROWS = 16  # up to so many our kernel, which widens in registers, is the faster one
BLOCK_BYTES = 16 << 20  # of the table, widened at a time


class HalfLinear(nn.Linear):
    """A linear (n, k) on the very weight of another one, which may be narrower than what it multiplies."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) -> (..., n) in x's type, in which products and sums are too."""
        y = F.linear(x, self.weight) if self.weight.dtype == x.dtype else _Widened.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Widened(torch.autograd.Function):
    """x (..., k) times a table (n, k) transposed, and the gradient of x."""

    @staticmethod
    def forward(context: Any, x: Tensor, table: Tensor) -> Tensor:
        context.save_for_backward(table)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= NATIVE_ROWS and _native_takes(rows, table):
            return native.half_linear(rows.contiguous(), table).view(*x.shape[:-1], len(table))
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


def _native_takes(x: Tensor, table: Tensor) -> bool:
    half = table.dtype in (torch.bfloat16, torch.float16)
    return x.is_cpu and table.is_cpu and half and x.dtype == torch.float32 and library.available()


def _blocks(table: Tensor, dtype: torch.dtype) -> list[slice]:
    """Consecutive rows of the table (n, k) that take `BLOCK_BYTES` in `dtype`."""
    step = max(1, BLOCK_BYTES // (dtype.itemsize * table.shape[1]))
    return [slice(first, first + step) for first in range(0, len(table), step)]
