"""Define the interface of a slow tier: a file (`disk.py`) or pinned host memory (`pinned_host.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from haq_lab.offload.tiers.disk import Layouts


class SlowTier(Protocol):
    """Storage of all experts. Each expert is one contiguous blob.

    Attributes:
        layouts: Layouts of the blobs in the fast tier.
        moved_bytes: (layers, E) bytes that are moved to fetch each expert.
        staging_bytes: Extra memory on the device that fetching needs.
    """

    layouts: Layouts
    moved_bytes: NDArray[np.int64]
    staging_bytes: int

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Copy an expert into the fast tier, in the order of the calling thread's stream.

        Args:
            layer: Index of the layer.
            expert: Index of the expert.
            blob: uint8 of the expert's size, overwritten.

        Raises:
            ReadError: The expert could not be read.
        """
        ...

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Return a module that computes an expert with its weights in the slow tier. Call `end_use` afterwards.

        Args:
            layer: Index of the layer.
            number: Index of the expert.
            expert: Module of the expert. It may be bound to the weights and returned.
        """
        ...

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Free what running in place has loaded.

        Args:
            experts: Modules that `use_in_place` returned.
        """
        ...

    def close(self) -> None:
        """Close the file or free the memory."""
        ...
