"""Divide one block of device memory into slots for experts: the fast tier."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.offload.tiers.disk import PAGE
from haq_lab.utils.errors import UserError

Key = tuple[int, int]  # (layer, expert)


def page_aligned(size: int, device: torch.device | None = None) -> Tensor:
    """Allocate memory that starts at a page boundary, as direct reads require.

    Args:
        size: Bytes.
        device: Device of the memory. None is the CPU.

    Returns:
        (size,) uint8, uninitialised.
    """
    memory = torch.empty(size + PAGE, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % PAGE :][:size]


class Arena:
    """Slots of equal size in one allocation, so the budget cannot be exceeded.

    Args:
        slots: Number of slots.
        blob_bytes: Bytes of one expert.
        device: Device of the memory. None is the CPU.

    Attributes:
        slot_of: Slot of each expert that is loaded or being read.

    Raises:
        UserError: The slots do not fit into the GPU's memory.
    """

    def __init__(self, slots: int, blob_bytes: int, device: torch.device | None = None):
        self.blob_bytes = blob_bytes
        try:
            self._memory = page_aligned(slots * blob_bytes, device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"offload.budget: {slots} slots (spare slots included) of {blob_bytes:,} bytes do not fit into the "
                f"memory of {device}. Choose a smaller budget."
            ) from error
        self.slot_of: dict[Key, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._slots = slots

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self._slots * self.blob_bytes

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def blob(self, key: Key) -> Tensor:
        """Return an expert's slot, (blob_bytes,) uint8."""
        first = self.slot_of[key] * self.blob_bytes
        return self._memory[first : first + self.blob_bytes]

    def take(self, key: Key) -> None:
        """Assign a free slot to an expert."""
        assert key not in self.slot_of, f"{key} has a slot already"
        self.slot_of[key] = self._free.pop()

    def release(self, key: Key) -> None:
        """Free an expert's slot."""
        self._free.append(self.slot_of.pop(key))

    def check(self) -> None:
        """Assert that every slot is either free or assigned to one expert."""
        slots = sorted([*self.slot_of.values(), *self._free])
        assert slots == list(range(self._slots)), "a slot is lost or assigned twice"
