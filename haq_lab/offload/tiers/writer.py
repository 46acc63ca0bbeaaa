"""The protocol of an object that fills a slow tier."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.conversion import Relayout


class TierWriter(Protocol):
    """Fills a slow tier, a layer at a time."""

    def add(self, experts: nn.ModuleList) -> None:
        """The next layer's experts: into the tier, and out of memory."""
        ...

    def open(self) -> SlowTier:
        """The finished tier."""
        ...

    def relayout(self, experts: nn.ModuleList) -> Relayout | None:
        """What brings one of a layer's `experts` from the tier's layout to the device's; None where they are one."""
        ...

    def __exit__(self, *error: object) -> None:
        """Let go of what no tier has taken over."""
        ...
