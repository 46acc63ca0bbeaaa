"""Round to nearest (RTN), the baseline of every comparison."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from haq_lab.quantizers.base import Quantizer


@dataclass(frozen=True)
class RTN(Quantizer):
    """Round weights to nearest, with the scale max|w| / 127 for each output channel.

    Args:
        activations: Activation scheme: `token`, `tensor` (both dynamic) or `static`.
        weight_bits: 8 or 4.
        group: Columns of a 4-bit weight that share a scale: 128, 64 or 32; `none` for one scale a row.
        lm_head: Whether to quantise the LM head too.
    """
