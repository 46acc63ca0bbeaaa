"""Store all experts in pinned host memory: the slow tier of a GPU. One call copies one expert.

A blob holds an expert in the layout of the GPU's backend. If the CPU runs some of the experts, a blob has the layout of
the CPU's backend instead. Each expert then has a CPU module, and the GPU repacks the weights that it fetches
(`conversion.Relayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import psutil
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.experts import Expert
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.conversion import Relayout, linear_sizes, weight_formats
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.offload.tiers.disk import Layout, Layouts, Packer, bind, expert_tensors, layout, unbind
from haq_lab.utils.errors import UserError


class HostTier:
    """The experts of all layers in pinned host memory.

    Args:
        blocks: One block of pinned memory per layer, the blobs of its experts in uint8. The tier unpins them.
        layouts: Layouts of the blobs.
        streams: Streams that pinned the memory.
        cpu_experts: Modules that run the experts on the CPU, by layer. Empty if only the GPU runs experts.
    """

    def __init__(
        self,
        blocks: list[Tensor],
        layouts: Layouts,
        streams: Streams,
        cpu_experts: Sequence[Sequence[nn.Module]] = (),
    ):
        self.layouts, self.moved_bytes = layouts, layouts.sizes
        self.staging_bytes = 0
        self._blobs = [block.split(sizes.tolist()) for block, sizes in zip(blocks, self.moved_bytes, strict=True)]
        self._blocks, self._streams, self._cpu_experts = blocks, streams, cpu_experts
        for layer, experts in enumerate(cpu_experts):
            for number, module in enumerate(experts):
                bind(module, layouts.of(layer, number).parts, self._blobs[layer][number])

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Copy an expert into `blob`, uint8 of its size. On a GPU the copy follows the current stream's order."""
        blob.copy_(self._blobs[layer][expert], non_blocking=True)

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Return the module that runs the expert on the CPU."""
        return self._cpu_experts[layer][number]

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Do nothing: the CPU modules keep their weights."""

    def close(self) -> None:
        """Unpin and free the memory. All copies must be done."""
        self._blobs = []
        while self._blocks:
            self._streams.unpin(self._blocks.pop())


class HostWriter:
    """Fills a host tier one layer at a time.

    Args:
        layers: Number of layers that will be added.
        streams: Streams that pin the memory.
        cpu_backend: Backend of the CPU, if the CPU runs experts too.
    """

    def __init__(self, layers: int, streams: Streams, cpu_backend: Backend | None = None):
        self._layers, self._streams, self._cpu_backend = layers, streams, cpu_backend
        self._packer = Packer()
        self._blocks: list[Tensor] = []
        self._cpu_experts: list[nn.ModuleList] = []
        self._device_layouts: dict[tuple[WeightFormat, ...], Layout] = {}

    def __enter__(self) -> HostWriter:
        return self

    def __exit__(self, *error: object) -> None:
        while self._blocks:  # blocks that no tier has taken over
            self._streams.unpin(self._blocks.pop())

    def add(self, experts: nn.ModuleList) -> None:
        """Copy the next layer's experts into pinned memory and free their weights.

        Args:
            experts: Experts of the layer.

        Raises:
            UserError: The experts of all layers do not fit into memory.
        """
        if self._cpu_backend is not None:
            experts = self._repack_for_cpu(experts, self._cpu_backend)
            self._cpu_experts.append(experts)
        sizes = [layout(expert_tensors(expert)).size for expert in experts]
        self._must_fit(sum(sizes))
        block = page_aligned(sum(sizes))
        for place, blob in zip(block.split(sizes), self._packer.pack(experts), strict=True):
            place.copy_(blob)
        self._streams.pin(block)
        self._blocks.append(block)

    def _repack_for_cpu(self, experts: nn.ModuleList, backend: Backend) -> nn.ModuleList:
        """Return the experts packed for the CPU's backend, and free the originals' weights."""
        cpu_experts = nn.ModuleList(
            cast(Expert, expert).with_linears(lambda linear: cast(Int8Linear, linear).on(backend)) for expert in experts
        )
        for expert in experts:
            self._device_layouts[_formats(expert)] = layout(expert_tensors(expert))
            unbind(expert)
        return cpu_experts

    def _must_fit(self, layer_bytes: int) -> None:
        """Check the memory for all remaining layers, so that a long pass fails at its first layer."""
        needed, available = (self._layers - len(self._blocks)) * layer_bytes, psutil.virtual_memory().available
        if needed > available:
            raise UserError(
                f"offload: the remaining experts need {needed:,} bytes of page-locked host memory with backend=cuda, "
                f"but {available:,} bytes are free. Choose backend=cpu, which keeps them on disk, or a smaller model."
            )

    def relayout(self, experts: nn.ModuleList) -> list[Relayout] | None:
        """Return the conversion of each layout from the CPU's to the GPU's, or None if the CPU runs no experts.

        Args:
            experts: Experts of one deployed layer.

        Raises:
            UserError: The CPU cannot run these experts without changing the output.
        """
        if self._cpu_backend is None:
            return None
        deployed = cast(Int8Experts, experts)
        if not deployed.swiglu:
            raise UserError(
                "offload.on_miss: the CPU runs experts beside a GPU only if their activation is SiLU. "
                "Choose offload.on_miss=fetch."
            )
        layouts = self._packer.layouts
        return [
            Relayout(
                source.parts,
                self._device_layouts[_formats(expert)].parts,
                linear_sizes(expert),
                weight_formats(expert),
                self._cpu_backend,
                deployed.backend,
            )
            for source, expert in zip(layouts.distinct, layouts.examples, strict=True)
        ]

    def open(self) -> HostTier:
        """Return the complete tier."""
        blocks, self._blocks = self._blocks, []
        cpu_experts = [list(experts) for experts in self._cpu_experts]
        return HostTier(blocks, self._packer.layouts, self._streams, cpu_experts)


def _formats(expert: nn.Module) -> tuple[WeightFormat, ...]:
    """Return the weight formats of an expert's linears, which determine its layout on each backend."""
    return tuple(weight_formats(expert).values())
