"""The slow tier of a GPU: all experts in the host's memory, page-locked, each one contiguous blob.

A blob holds an expert as the backend packs it for the device, which copies it over by itself, with one call.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn

from haq_lab.errors import UserError
from haq_lab.offload.arena import aligned
from haq_lab.offload.store import Packer, Part
from haq_lab.offload.streams import Streams


class HostTier:
    """The experts of all layers in memory.

    Args:
        blocks: A layer's blobs each, (experts * blob_bytes,) uint8, locked; the tier unlocks them.
        parts: How a blob is laid out.
        blob_bytes: Its size.
        streams: What locked them.
    """

    def __init__(self, blocks: list[Tensor], parts: list[Part], blob_bytes: int, streams: Streams):
        self.parts = parts
        self.blob_bytes = self.moved_bytes = blob_bytes
        self._blocks, self._streams = blocks, streams

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Ask for an expert's bytes in `blob` (blob_bytes,) uint8: on a GPU they come in the current stream's order."""
        first = expert * self.blob_bytes
        blob.copy_(self._blocks[layer][first : first + self.blob_bytes], non_blocking=True)

    def close(self) -> None:
        """Give the memory up; all copies must be done."""
        while self._blocks:
            self._streams.unlock(self._blocks.pop())


class HostWriter:
    """Fills a host tier a layer at a time: `add` each layer's experts, then `open` it.

    Args:
        layers: How many there will be.
        streams: Locks the memory.
    """

    def __init__(self, layers: int, streams: Streams):
        self._layers, self._streams = layers, streams
        self._packer = Packer()
        self._blocks: list[Tensor] = []

    def __enter__(self) -> HostWriter:
        return self

    def __exit__(self, *error: object) -> None:
        while self._blocks:  # those that no tier has taken over
            self._streams.unlock(self._blocks.pop())

    def add(self, experts: nn.ModuleList) -> None:
        """The next layer's experts: into the tier, and out of where they were.

        Raises:
            UserError: Experts differ in their layout, or all layers' will not fit into memory.
        """
        block = torch.empty(0, dtype=torch.uint8)
        for number, blob in enumerate(self._packer.pack(experts)):
            if number == 0:
                self._must_fit(len(experts) * len(blob))
                block = aligned(len(experts) * len(blob))
            block[number * len(blob) : (number + 1) * len(blob)] = blob
        self._streams.lock(block)
        self._blocks.append(block)

    def _must_fit(self, layer: int) -> None:
        """At the first layer already: a long pass should not end at the last one."""
        needed, there = (self._layers - len(self._blocks)) * layer, psutil.virtual_memory().available
        if needed > there:
            raise UserError(
                f"offload: with backend=cuda all experts lie in page-locked host memory; {needed:,} bytes of them are "
                f"to come, and {there:,} free: use backend=cpu, which keeps them on disk, or a smaller model"
            )

    def open(self) -> HostTier:
        """The finished tier."""
        blocks, self._blocks = self._blocks, []
        return HostTier(blocks, self._packer.parts, self._packer.size, self._streams)
