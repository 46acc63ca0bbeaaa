"""The fast tier: one block of memory cut into slots, each of which holds one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.offload.store import PAGE

Key = tuple[int, int]  # (layer, expert)


def aligned(size: int) -> Tensor:
    """Memory (size,) uint8 that begins a page, as a store's blobs do."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:size]


class Arena:
    """Slots of equal size in one allocation: the budget cannot be overrun.

    Attributes:
        where: The slot of each expert that is here or on its way.
    """

    def __init__(self, slots: int, blob_bytes: int):
        self.blob_bytes = blob_bytes
        self._memory = aligned(slots * blob_bytes)
        self.where: dict[Key, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._slots = slots

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self._slots * self.blob_bytes

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def blob(self, key: Key) -> Tensor:
        """The memory (bytes,) uint8 of an expert's slot."""
        first = self.where[key] * self.blob_bytes
        return self._memory[first : first + self.blob_bytes]

    def take(self, key: Key) -> None:
        """Give the expert a free slot."""
        assert key not in self.where, f"{key} has a slot already"
        self.where[key] = self._free.pop()

    def release(self, key: Key) -> None:
        """Free the expert's slot."""
        self._free.append(self.where.pop(key))

    def check(self) -> None:
        """Assert that every slot holds one expert or none."""
        held = sorted([*self.where.values(), *self._free])
        assert held == list(range(self._slots)), "a slot is lost or held twice"
