"""The slow tier of a GPU: all experts in the host's memory, page-locked, each one contiguous blob.

A blob holds an expert as the device's backend packs it, and the device copies it over by itself, with one call. Where
experts are to run beside the GPU, on the CPU, it holds them as the CPU's backend packs them: each has a twin there, and
what is copied over is packed anew by the device (`conversion.Relayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import psutil
import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.experts import Expert
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.conversion import Relayout, linear_sizes
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import Packer, Part, bind, expert_tensors, layout
from haq_lab.utils.errors import UserError


class HostTier:
    """The experts of all layers in memory.

    Args:
        blocks: A layer's blobs each, (experts * blob_bytes,) uint8, locked; the tier unlocks them.
        parts: How a blob is laid out.
        blob_bytes: Its size.
        streams: What locked them.
        twins: A layer's experts each, as they run on the CPU; none where they only run on the device.
    """

    def __init__(
        self,
        blocks: list[Tensor],
        parts: list[Part],
        blob_bytes: int,
        streams: Streams,
        twins: Sequence[Sequence[nn.Module]] = (),
    ):
        self.parts = parts
        self.blob_bytes = self.moved_bytes = blob_bytes
        self.staging_bytes = 0
        self._blocks, self._streams, self._twins = blocks, streams, twins
        for layer, experts in enumerate(twins):
            for number, twin in enumerate(experts):
                bind(twin, parts, self._blob(layer, number))

    def _blob(self, layer: int, expert: int) -> Tensor:
        first = expert * self.blob_bytes
        return self._blocks[layer][first : first + self.blob_bytes]

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Ask for an expert's bytes in `blob` (blob_bytes,) uint8: on a GPU they come in the current stream's order."""
        blob.copy_(self._blob(layer, expert), non_blocking=True)

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Its twin, which computes on the CPU."""
        return self._twins[layer][number]

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Nothing: twins keep their weights."""

    def close(self) -> None:
        """Give the memory up; all copies must be done."""
        while self._blocks:
            self._streams.unpin(self._blocks.pop())


class HostWriter:
    """Fills a host tier a layer at a time: `add` each layer's experts, then `open` it.

    Args:
        layers: How many there will be.
        streams: Locks the memory.
        beside: The CPU's backend, where experts are to run there too.
    """

    def __init__(self, layers: int, streams: Streams, beside: Backend | None = None):
        self._layers, self._streams, self._beside = layers, streams, beside
        self._packer = Packer()
        self._blocks: list[Tensor] = []
        self._twins: list[nn.ModuleList] = []
        self._device_parts: list[Part] = []

    def __enter__(self) -> HostWriter:
        return self

    def __exit__(self, *error: object) -> None:
        while self._blocks:  # those that no tier has taken over
            self._streams.unpin(self._blocks.pop())

    def add(self, experts: nn.ModuleList) -> None:
        """The next layer's experts: into the tier, and out of where they were.

        Raises:
            UserError: Experts differ in their layout, or all layers' will not fit into memory.
        """
        if self._beside is not None:
            experts = self._moved(experts, self._beside)
            self._twins.append(experts)
        block = torch.empty(0, dtype=torch.uint8)
        for number, blob in enumerate(self._packer.pack(experts)):
            if number == 0:
                self._must_fit(len(experts) * len(blob))
                block = page_aligned(len(experts) * len(blob))
            block[number * len(blob) : (number + 1) * len(blob)] = blob
        self._streams.pin(block)
        self._blocks.append(block)

    def _moved(self, experts: nn.ModuleList, backend: Backend) -> nn.ModuleList:
        """The experts on the CPU's backend, and their weights out of where they were."""
        twins = nn.ModuleList(
            cast(Expert, expert).with_linears(lambda linear: cast(Int8Linear, linear).on(backend)) for expert in experts
        )
        self._device_parts, _ = layout(expert_tensors(experts[0]))
        for expert in experts:
            bind(expert, self._device_parts, None)
        return twins

    def _must_fit(self, layer: int) -> None:
        """At the first layer already: a long pass should not end at the last one."""
        needed, there = (self._layers - len(self._blocks)) * layer, psutil.virtual_memory().available
        if needed > there:
            raise UserError(
                f"offload: with backend=cuda all experts lie in page-locked host memory; {needed:,} bytes of them are "
                f"to come, and {there:,} free: use backend=cpu, which keeps them on disk, or a smaller model"
            )

    def relayout(self, experts: nn.ModuleList) -> Relayout | None:
        """From the CPU's layout of an expert to the device's; None where experts do not run on the CPU.

        Args:
            experts: A deployed layer's.

        Raises:
            UserError: They cannot, without changing the output.
        """
        if self._beside is None:
            return None
        deployed = cast(Int8Experts, experts)
        if not deployed.swiglu:
            raise UserError("offload.on_miss: beside a GPU, experts run on the CPU only where their activation is SiLU")
        return Relayout(self._packer.parts, self._device_parts, linear_sizes(experts), self._beside, deployed.backend)

    def open(self) -> HostTier:
        """The finished tier."""
        blocks, self._blocks = self._blocks, []
        twins = [list(experts) for experts in self._twins]
        return HostTier(blocks, self._packer.parts, self._packer.size, self._streams, twins)
