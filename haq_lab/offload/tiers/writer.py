"""Define the interface of an object that writes a slow tier."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.conversion import Relayout


class TierWriter(Protocol):
    """Writes a slow tier one layer at a time."""

    def add(self, experts: nn.ModuleList) -> None:
        """Write the next layer's experts and free their weights.

        Raises:
            UserError: They do not fit.
        """
        ...

    def open(self) -> SlowTier:
        """Return the complete slow tier."""
        ...

    def relayout(self, experts: nn.ModuleList) -> list[Relayout] | None:
        """Return the conversion of each layout of the slow tier to the device's, or None if they are equal.

        Args:
            experts: Experts of one deployed layer.
        """
        ...

    def __exit__(self, *error: object) -> None:
        """Free what no tier has taken over."""
        ...
