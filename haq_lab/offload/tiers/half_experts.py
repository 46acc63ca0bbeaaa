"""Run experts with 16-bit float weights, if the fast tier does not hold int8."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.int8.rotation import NO_ROTATION, rotate
from haq_lab.models.experts import Expert, Experts
from haq_lab.models.half_linear import HalfLinear


class ExpertLinear(HalfLinear):
    """A linear with 16-bit weights. A GPU multiplies 16-bit numbers and sums in float32.

    Args:
        linear: The linear whose weight is shared.
        rotation: Block of the rotation that the weights expect of the input (`haq_lab.int8.rotation`); 1 for none.
    """

    def __init__(self, linear: nn.Linear, rotation: int = NO_ROTATION):
        super().__init__(linear)
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., n) for x (..., k), in x's type."""
        x = rotate(x, self.rotation).to(x.dtype)
        if x.is_cuda:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        return super().forward(x)


def half_experts(experts: nn.ModuleList, dtype: torch.dtype) -> Experts:
    """Return the experts with linears of 16-bit floats. Their weights are empty until an engine binds them.

    Args:
        experts: Experts of one layer.
        dtype: Type of the weights.
    """

    def narrow(linear: nn.Module) -> nn.Module:
        shell = nn.Linear(cast(int, linear.in_features), cast(int, linear.out_features), bias=False, device="meta")
        shell.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        if linear.bias is not None:
            shell.bias = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        return ExpertLinear(shell, getattr(linear, "rotation", NO_ROTATION))

    return Experts(cast(Expert, expert).with_linears(narrow) for expert in experts)
