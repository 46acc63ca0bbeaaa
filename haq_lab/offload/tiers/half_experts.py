"""Experts in 16-bit floats: how they run where the fast tier does not hold them in int8."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.models.experts import Expert, Experts
from haq_lab.models.half_linear import HalfLinear


class ExpertLinear(HalfLinear):
    """On a GPU the products are of 16-bit numbers, which it has units for, and the sums float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) -> (..., n) in x's type."""
        if x.is_cuda:
            return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return super().forward(x)


def half_experts(experts: nn.ModuleList, dtype: torch.dtype) -> Experts:
    """The same experts with weights of `dtype`, which they do not have yet: an engine gives them theirs."""

    def narrow(linear: nn.Module) -> nn.Module:
        shell = nn.Linear(cast(int, linear.in_features), cast(int, linear.out_features), bias=False, device="meta")
        shell.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        return ExpertLinear(shell)

    return Experts(cast(Expert, expert).with_linears(narrow) for expert in experts)
