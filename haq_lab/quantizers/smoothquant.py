"""The SmoothQuant quantizer (arXiv 2211.10438): one smoothing strength for all norms, weights rounded to nearest."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from haq_lab.calibration.statistics import InputStatistics, Needs
from haq_lab.models.families.family import Family, Group
from haq_lab.quantizers.base import Quantizer, Smoothing
from haq_lab.quantizers.smoothing import ChannelMap, smoothing_factor


@dataclass(frozen=True)
class SmoothQuant(Quantizer):
    """SmoothQuant as published.

    Args:
        activations: Activation scheme: `token`, `tensor` (both dynamic) or `static`.
        weight_bits: 8 or 4.
        group: Columns of a 4-bit weight that share a scale: 128, 64 or 32; `none` for one scale a row.
        lm_head: Whether to quantise the LM head too.
        smoothing_strength: alpha in s = max|X|^alpha / max|W|^(1-alpha). If null, the published strength of the
            architecture is used (0.5 for OPT, 0.8 to 0.85 for Llama, Mistral and Mixtral).
    """

    smoothing_strength: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def needs(self) -> Needs:
        return Needs(inputs=True, sample=super().needs.sample)

    def smoothing(
        self,
        group: Group,
        family: Family,
        weight: Tensor,
        statistics: InputStatistics | None,
        channels: ChannelMap,
    ) -> Smoothing | None:
        if group.kind != "norm":  # the published code does not smooth the output and down projections
            return None
        assert statistics is not None
        strength = family.smoothquant_strength if self.smoothing_strength is None else self.smoothing_strength
        return Smoothing(smoothing_factor(statistics.channel_max, weight.abs().amax(dim=0), strength), strength)
