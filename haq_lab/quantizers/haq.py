"""HAQ: smoothed-Hessian quantization, joint W8A8 (arXiv 2508.07329), with the parts that the paper leaves open.

With D = diag(s), the deployed layer computes Q(X D^-1) Q(W D)^T. Its error has two parts, and smoothing trades
one for the other:

    weights      tr(dW' H' dW'^T)      with H' = D^-1 H D^-1
    activations  E ||dX' W'^T||^2      under the activation scheme in force

1. `adaptive`: each group takes the strength with the least sum of the two (`errors.py`).
2. `fold`: the down and output projections are smoothed too, through the rows of up and value projections.
3. `scale_search`, `act_order`: the weights are solved under H' by GPTQ, with searched row scales.
4. `asymmetric`: the weights are solved for the input that the quantised model really sees (GPTAQ, 2504.02692).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.models.families import Family, FoldKind, Group
from haq_lab.quantizers.base import Quantizer, Smoothing
from haq_lab.quantizers.smoothing import Channels, factor_of

STRENGTHS = tuple(step / 16 for step in range(17))


@dataclass(frozen=True)
class HAQ(Quantizer):
    """Args:
    activations: As for every quantizer, or `auto`: static where it costs little, token-dynamic elsewhere.
    adaptive: Choose each group's strength by its predicted error; else `strength` everywhere.
    strength: The strength where `adaptive` is off.
    fold: What smoothing is folded into: norms, value (for the output projection), up (for down).
    scale_search: Choose each row's scale by its Hessian-weighted error, else max|w| / 127.
    act_order: Solve the columns by falling diag(H').
    asymmetric: Solve for the quantised model's own input.
    damp: Share of mean(diag H') added to the diagonal.
    auto_tolerance: With `auto`, the share of the output's energy that a static scale may lose, beyond what
        token-dynamic scales lose.
    """

    activations: Literal["token", "tensor", "static", "auto"] = "token"  # type: ignore[assignment]
    adaptive: bool = True
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    fold: tuple[FoldKind, ...] = ("norm", "value", "up")
    scale_search: bool = True
    act_order: bool = True
    asymmetric: bool = True
    damp: Annotated[float, Field(gt=0, le=1)] = 0.01
    auto_tolerance: Annotated[float, Field(ge=0)] = 1e-4

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True, hessian=True, cross=self.asymmetric, sample=True)

    def smoothing(
        self,
        group: Group,
        family: Family,
        weight: Tensor,
        statistics: InputStatistics | None,
        channels: Channels,
    ) -> Smoothing | None:
        if group.kind not in self.fold:
            return None
        assert statistics is not None
        weight_max = weight.abs().amax(dim=0)
        activation_max = channels.shared_max(statistics.channel_max)
        shared_weight_max = channels.shared_max(weight_max)
        if not self.adaptive:
            return Smoothing(factor_of(activation_max, shared_weight_max, self.strength), self.strength)
        best: Smoothing | None = None
        error_of = self._predictor(weight, statistics)
        least = error_of(torch.ones_like(weight_max))
        for strength in STRENGTHS:
            factor = factor_of(activation_max, shared_weight_max, strength)
            error = error_of(factor)
            if error < least:
                best, least = Smoothing(factor, strength), error
        return best
