"""Divide one block of device memory into slots for experts: the fast tier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from haq_lab.offload.tiers.disk import PAGE, Layouts
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
    """Slots in one allocation, so the budget cannot be exceeded. Each layout of experts has slots of its size.

    Args:
        slots: Number of slots of each layout.
        layouts: Layouts of the experts.
        device: Device of the memory. None is the CPU.

    Attributes:
        bytes: Bytes of all slots.
        slot_of: Slot of each expert that is loaded or being read.

    Raises:
        UserError: The slots do not fit into the GPU's memory.
    """

    def __init__(self, slots: Sequence[int], layouts: Layouts, device: torch.device | None = None):
        sizes = [layout.size for layout, count in zip(layouts.distinct, slots, strict=True) for _ in range(count)]
        try:
            memory = page_aligned(sum(sizes), device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"offload.budget: {len(sizes)} slots (spare slots included) of {sum(sizes):,} bytes together do not "
                f"fit into the memory of {device}. Choose a smaller budget."
            ) from error
        self.bytes = sum(sizes)
        self.slot_of: dict[Key, int] = {}
        self._layouts, self._blobs = layouts, memory.split(sizes)
        numbers = iter(range(len(sizes)))
        self._free = [list(islice(numbers, count))[::-1] for count in slots]  # by layout; the last is taken first

    def free(self, key: Key) -> int:
        """Return the number of free slots that an expert could take."""
        return len(self._free_of(key))

    def blob(self, key: Key) -> Tensor:
        """Return an expert's slot, uint8 of the expert's size."""
        return self._blobs[self.slot_of[key]]

    def take(self, key: Key) -> None:
        """Assign a free slot to an expert."""
        assert key not in self.slot_of, f"{key} has a slot already"
        self.slot_of[key] = self._free_of(key).pop()

    def release(self, key: Key) -> None:
        """Free an expert's slot."""
        self._free_of(key).append(self.slot_of.pop(key))

    def check(self) -> None:
        """Assert that every slot is either free or assigned to one expert of its size."""
        slots = sorted([*self.slot_of.values(), *(slot for free in self._free for slot in free)])
        assert slots == list(range(len(self._blobs))), "a slot is lost or assigned twice"
        assert all(len(self.blob(key)) == self._layouts.of(*key).size for key in self.slot_of), "a slot does not fit"

    def _free_of(self, key: Key) -> list[int]:
        return self._free[self._layouts.index[key]]
