"""Round to nearest: the floor that every method is held against."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from haq_lab.quantizers.base import Quantizer


@dataclass(frozen=True)
class RTN(Quantizer):
    """Scale = max|w| / 127 for each output channel, round to nearest."""
