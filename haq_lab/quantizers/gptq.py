"""The GPTQ quantizer (arXiv 2210.17323): round weights with the Hessian of their input, without smoothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Solution
from haq_lab.quantizers.gptq_solver import factorize, solve
from haq_lab.quantizers.grid import weight_scale


@dataclass(frozen=True)
class GPTQ(Quantizer):
    """GPTQ as published.

    Args:
        activations: Activation scheme: `token`, `tensor` (both dynamic) or `static`.
        weight_bits: 8 or 4.
        group: Columns of a 4-bit weight that share a scale: 128, 64 or 32; `none` for one scale a row.
        lm_head: Whether to quantise the LM head too.
        dampening_frac: Dampening: the share of mean(diag H) that is added to the diagonal.
        act_order: Whether to solve the columns in the order of falling diag(H).
    """

    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True, hessian=True, sample=super().needs.sample)

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        assert statistics is not None
        assert statistics.hessian is not None
        factor = factorize(statistics.hessian, self.dampening_frac, self.act_order)
        if factor is None:
            return self._fallback(weight)
        scale = weight_scale(weight, self.weight_format)
        notes = {"dampening_frac": factor.dampening_frac, "dead_columns": int(factor.dead.sum())}
        levels = solve(weight, factor, scale, self.weight_format.bits, self.weight_format.group)
        return Solution(levels, scale, notes, self.weight_format)
