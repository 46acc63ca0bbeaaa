"""What the engine asks of the slow tier: a file (`store.py`) or, for a GPU, the host's memory (`host_tier.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from haq_lab.offload.tiers.disk import Part


class SlowTier(Protocol):
    """All experts, each one contiguous blob.

    Attributes:
        parts: How a blob is laid out, the same for all.
        blob_bytes: Its size.
        moved_bytes: What is read for it.
        staging_bytes: What reading takes in the fast tier besides.
    """

    parts: list[Part]
    blob_bytes: int
    moved_bytes: int
    staging_bytes: int

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """An expert's bytes into `blob` (blob_bytes,) uint8, in the order of the calling thread's stream.

        Raises:
            ReadError: They could not be had.
        """
        ...

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """`expert` as it runs where its weights lie; `leave` it afterwards."""
        ...

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """These have run in place."""
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...
