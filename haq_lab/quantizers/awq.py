"""An AWQ-like quantizer (arXiv 2306.00978): a factor that protects the weights of large inputs, rounded to nearest."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.models.families.family import Family, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Smoothing, output_error
from haq_lab.quantizers.smoothing import FLOOR, ChannelMap

STRENGTHS = tuple(step / 20 for step in range(20))  # as in AWQ's code


@dataclass(frozen=True)
class AWQ(Quantizer):
    """AWQ's search of a factor, and weights rounded to nearest.

    AWQ measures a channel by its mean magnitude. Here it is the root mean square, which the Hessian has. AWQ keeps
    activations in 16 bits; here they are quantised as for every quantizer, but the search does not see that.

    Args:
        activations: Activation scheme: `token`, `tensor` (both dynamic) or `static`.
        weight_bits: 8 or 4.
        group: Columns of a 4-bit weight that share a scale: 128, 64 or 32; `none` for one scale a row.
        lm_head: Whether to quantise the LM head too.
        rotation: Hadamard rotation of each input, as for every quantizer.
        rotation_block: Largest block of `rotation=block`.
    """

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True, hessian=True, sample=super().needs.sample)

    def smoothing(
        self,
        group: Group,
        family: Family,
        weight: Tensor,
        statistics: InputStatistics | None,
        channels: ChannelMap,
    ) -> Smoothing | None:
        assert statistics is not None
        assert statistics.hessian is not None
        size = channels.shared_max(statistics.hessian.diagonal().sqrt()).clamp(min=FLOOR)
        best, smallest = Smoothing(torch.ones_like(size), 0.0), float("inf")
        for strength in STRENGTHS:
            factor = size**strength
            factor = factor / (factor.max() * factor.min()).sqrt()
            scaled = weight * factor
            solution = self.solve(scaled, None, ActivationChoice("token"))
            error = output_error(scaled, solution, statistics.hessian / (factor[:, None] * factor))
            if error < smallest:
                best, smallest = Smoothing(factor, strength), error
        return best
