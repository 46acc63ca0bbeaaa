"""What a quantizer decides: how to smooth, how to round weights, how activations are quantised.

The baselines override little; HAQ overrides all three. A quantizer of your own is a class with these methods,
named by `quantizer._target_=my_module.MyQuantizer`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.int8.numerics import ActivationScheme, scale_of
from haq_lab.models.architectures import Family, Group
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import Channels

COLUMNS = 128  # of a Hessian, multiplied at a time


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Smoothing:
    """A factor (k,) for a group, and the strength it came from."""

    factor: Tensor
    strength: float


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class ActivationChoice:
    """How one input is quantised: the scheme, and the scale where it is static."""

    scheme: ActivationScheme
    scale: Tensor | None = None


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Solution:
    """Rounded weights: int8 levels (n, k), scales (n,), and what is worth reporting about the solving."""

    levels: Tensor
    scale: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantizer:
    """Round-to-nearest weights and a fixed activation scheme, no smoothing.

    Args:
        activations: `token` (dynamic, a scale a row), `tensor` (dynamic) or `static` (from calibration).
        weight_bits: 8, or 4 (levels in [-7, 7], stored as int8).
        lm_head: Whether the head is quantised too, whatever is chosen for the layers: 8 bits, rounded to nearest,
            activations per token. It is no part of any layer, so no calibration reaches it.
    """

    activations: Literal["token", "tensor", "static"] = "token"
    weight_bits: Literal[8, 4] = 8
    lm_head: bool = False

    @property
    def needs(self) -> Needs:
        """The calibration statistics it asks for."""
        return Needs(inputs=self.activations == "static")

    def smoothing(
        self,
        group: Group,
        family: Family,
        weight: Tensor,
        statistics: InputStatistics | None,
        channels: Channels,
    ) -> Smoothing | None:
        """The factor to fold for a group whose readers' stacked weights are `weight`; None for none.

        A router's rows are among them, last: its columns take the factor too, as SmoothQuant publishes it.
        """
        return None

    def activation(self, weight: Tensor, statistics: InputStatistics | None) -> ActivationChoice:
        """How the input of these (stacked, smoothed) weights is quantised; a static scale covers the maximum."""
        if self.activations != "static":
            return ActivationChoice(self.activations)
        assert statistics is not None
        return ActivationChoice("static", scale_of(statistics.channel_max.amax()))

    def solve(self, weight: Tensor, statistics: InputStatistics | None, activation: ActivationChoice) -> Solution:
        """Round stacked weights (n, k) that share an input."""
        scale = row_scale(weight, self.weight_bits)
        return Solution(round_to_nearest(weight, scale, self.weight_bits), scale)

    def _fallback(self, weight: Tensor) -> Solution:
        """Plain rounding, noted as such: for a Hessian that has no usable factor."""
        nearest = Quantizer.solve(self, weight, None, ActivationChoice("token"))
        return Solution(nearest.levels, nearest.scale, {"fallback": "rtn"})


def output_error(weight: Tensor, solution: Solution, hessian: Tensor) -> float:
    """Mean squared error of the outputs that the weights' rounding alone causes: tr(dW H dW^T) / n."""
    difference = solution.levels.float() * solution.scale[:, None] - weight
    total = 0.0
    for first in range(0, len(hessian), COLUMNS):  # H is symmetric: what lies left of its diagonal counts twice
        columns = slice(first, first + COLUMNS)
        block = difference[:, columns]
        product = block @ hessian[columns, columns]
        product.addmm_(difference[:, :first], hessian[:first, columns], alpha=2)
        total += float(torch.einsum("nk,nk->", product, block))
    return total / len(weight)
