"""Define `offload.host_format` and `offload.device_format`, the number formats of the slow and the fast tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from haq_lab.models.int8_experts import Int8Experts
from haq_lab.offload.tiers.conversion import Cast, Conversion, Dequantize, linear_sizes, weight_formats
from haq_lab.offload.tiers.disk import Layouts
from haq_lab.utils.errors import UserError

HostFormat = Literal["int8", "bf16"]
DeviceFormat = Literal["int8", "fp16"]
Format = Literal["int8", "fp16", "bf16"]


@dataclass(frozen=True)
class Formats:
    """Number formats of the experts in the two tiers.

    Args:
        host: Format of the slow tier. `int8` keeps what the quantizer produced (float32 without a quantizer). `bf16` is
            for an unquantised model; it is exact if the checkpoint is in bfloat16.
        device: Format of the fast tier. `int8` keeps the format of the slow tier. `fp16` converts experts when they are
            fetched.
    """

    host: HostFormat
    device: DeviceFormat

    def must_suit(self, quantized: bool, miss: str) -> None:
        """Check that the formats fit the quantizer and `offload.on_miss`.

        Args:
            quantized: Whether the experts are quantised.
            miss: The setting `offload.on_miss`.

        Raises:
            UserError: They do not fit.
        """
        if self.host == "bf16" and quantized:
            raise UserError(
                "offload.host_format: 'bf16' does not work with quantised experts. "
                "Choose offload.host_format=int8 or quantizer=none."
            )
        if self.device == "fp16" and miss != "fetch":
            raise UserError(
                f"offload.on_miss: '{miss}' does not work with offload.device_format=fp16. "
                "A missing expert would run in int8 and a resident one in fp16. The output would depend on the budget. "
                "Choose offload.on_miss=fetch or offload.device_format=int8."
            )

    @property
    def pair(self) -> tuple[Format, Format]:
        """Formats of the slow and the fast tier, as the cost model counts them."""
        return self.host, self.host if self.device == "int8" else self.device

    @property
    def fast_tier_dtype(self) -> torch.dtype | None:
        """Float type of the weights in the fast tier if it is narrower than the model's, else None."""
        if self.device == "fp16":
            return torch.float16
        return torch.bfloat16 if self.host == "bf16" else None

    def prepare(self, experts: nn.ModuleList) -> None:
        """Convert a layer's experts in place to the format of the slow tier."""
        if self.host == "bf16":
            for weight in experts.parameters():
                weight.data = weight.data.to(torch.bfloat16)

    def conversions(self, experts: nn.ModuleList, layouts: Layouts) -> list[Conversion] | None:
        """Return each layout's conversion from the slow tier's format to the fast tier's, or None if they are equal.

        Args:
            experts: Experts of one layer, with or without their weights.
            layouts: Layouts of the slow tier.
        """
        if self.device == "int8":
            return None
        if not isinstance(experts, Int8Experts):
            return [Cast(layout.parts, torch.float16) for layout in layouts.distinct]
        return [
            Dequantize(layout.parts, linear_sizes(expert), weight_formats(expert), experts.backend, torch.float16)
            for layout, expert in zip(layouts.distinct, layouts.examples, strict=True)
        ]
