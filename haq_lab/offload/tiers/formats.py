"""`offload.host_format` and `offload.device_format`: in what numbers experts lie in the slow and in the fast tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from haq_lab.models.int8_experts import Int8Experts
from haq_lab.offload.tiers.conversion import Cast, Conversion, Dequantize, linear_sizes
from haq_lab.offload.tiers.disk import Part
from haq_lab.utils.errors import UserError

HostFormat = Literal["int8", "bf16"]


DeviceFormat = Literal["int8", "fp16"]


@dataclass(frozen=True)
class Formats:
    """Args:
    host: `int8`: as the quantizer made them (without one in float32); `bf16`: of an unquantised model, exact where
        its checkpoint is in bfloat16.
    device: `int8`: as in the slow tier; `fp16`: converted as they are loaded.
    """

    host: HostFormat
    device: DeviceFormat

    def must_suit(self, quantized: bool, miss: str) -> None:
        """Raise `UserError` where the formats don't go with the quantizer, or with what is done about a miss."""
        if self.host == "bf16" and quantized:
            raise UserError(
                "offload.host_format: 'bf16' is for experts that nothing has quantised (quantizer=none); others lie "
                "in the slow tier as int8"
            )
        if self.device == "fp16" and miss != "fetch":
            raise UserError(
                f"offload.on_miss: '{miss}' does not work with offload.device_format=fp16. "
                "A missing expert would run in int8 and a resident one in fp16. The output would depend on the budget. "
                "Choose offload.on_miss=fetch or offload.device_format=int8."
            )

    @property
    def pair(self) -> tuple[Format, Format]:
        """The numbers in the slow and in the fast tier, as costs are counted by them."""
        return self.host, self.host if self.device == "int8" else self.device

    @property
    def fast_tier_dtype(self) -> torch.dtype | None:
        """The type of the weights in the fast tier, where it is a narrower one than the model's."""
        if self.device == "fp16":
            return torch.float16
        return torch.bfloat16 if self.host == "bf16" else None

    def prepare(self, experts: nn.ModuleList) -> None:
        """Make a layer's experts what the slow tier is to hold, in place."""
        if self.host == "bf16":
            for weight in experts.parameters():
                weight.data = weight.data.to(torch.bfloat16)

    def conversion(self, experts: nn.ModuleList, parts: list[Part]) -> Conversion | None:
        """From the slow tier's format to the fast one's; None where it is the same.

        Args:
            experts: A layer's, with or without their weights.
            parts: How the slow tier lays an expert out.
        """
        if self.device == "int8":
            return None
        if not isinstance(experts, Int8Experts):
            return Cast(parts, torch.float16)
        return Dequantize(parts, linear_sizes(experts), experts.backend, torch.float16)


Format = Literal["int8", "fp16", "bf16"]
