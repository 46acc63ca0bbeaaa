"""The fast tier: one block of a device's memory cut into slots, each of which holds one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.offload.tiers.disk import PAGE
from haq_lab.utils.errors import UserError

Key = tuple[int, int]  # (layer, expert)


def page_aligned(size: int, device: torch.device | None = None) -> Tensor:
    """Memory (size,) uint8 that begins a page, as a store's blobs do; on the CPU where no device is named."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % PAGE :][:size]


class Arena:
    """Slots of equal size in one allocation: the budget cannot be overrun.

    Args:
        slots: How many.
        blob_bytes: Of one expert.
        device: Whose memory it is; the CPU's where none is named.

    Attributes:
        where: The slot of each expert that is here or on its way.

    Raises:
        UserError: It does not fit into a GPU's memory.
    """

    def __init__(self, slots: int, blob_bytes: int, device: torch.device | None = None):
        self.blob_bytes = blob_bytes
        try:
            self._memory = page_aligned(slots * blob_bytes, device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"offload.budget: {slots} experts (the spare slots' included) of {blob_bytes:,} bytes do not fit into "
                f"the memory of {device}; give it less"
            ) from error
        self.slot_of: dict[Key, int] = {}
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
        first = self.slot_of[key] * self.blob_bytes
        return self._memory[first : first + self.blob_bytes]

    def take(self, key: Key) -> None:
        """Give the expert a free slot."""
        assert key not in self.slot_of, f"{key} has a slot already"
        self.slot_of[key] = self._free.pop()

    def release(self, key: Key) -> None:
        """Free the expert's slot."""
        self._free.append(self.slot_of.pop(key))

    def check(self) -> None:
        """Assert that every slot holds one expert or none."""
        held = sorted([*self.slot_of.values(), *self._free])
        assert held == list(range(self._slots)), "a slot is lost or held twice"
