"""What an expert's bytes become on their way to the fast tier, where the two tiers hold it in different formats.

    tier = ConvertedTier(tier, Dequantize(tier.parts, sizes, backend, torch.float16), device)

The bytes are moved as they lie in the slow tier and converted where they arrive, in the order of the copies: on a GPU
beside what it computes. `Dequantize` is the paper's dequantization on load (arXiv 2508.07329): the link carries int8.
`Relayout` lets the host hold experts in the layout that its own CPU multiplies with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.models.architectures import PROJECTIONS
from haq_lab.offload.tiers.arena import aligned
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.disk import Part, layout

Sizes = dict[str, tuple[int, int]]  # of an expert's linears: outputs and inputs


def sizes_of(experts: nn.ModuleList) -> Sizes:
    """Of a layer's experts, which are all alike."""
    linears: dict[str, Any] = {name: experts[0].get_submodule(name) for name in PROJECTIONS}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


class Conversion(Protocol):
    """Attributes:
    parts: How a converted blob is laid out.
    blob_bytes: Its size.
    """

    parts: list[Part]
    blob_bytes: int

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """Convert a blob of the slow tier into one of the fast tier, both (bytes,) uint8 on the same device."""
        ...


class Dequantize:
    """int8 levels times row scales -> 16-bit floats.

    Args:
        source: How a blob of the slow tier is laid out.
        sizes: Of the expert's linears.
        backend: Who packed the levels.
        dtype: Of the fast tier's weights.
    """

    def __init__(self, source: list[Part], sizes: Sizes, backend: Backend, dtype: torch.dtype):
        self._source = {part.name: part for part in source}
        self._sizes, self._backend, self._dtype = sizes, backend, dtype
        self.parts, self.blob_bytes = layout(
            {f"{name}.weight": torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for part, (name, size) in zip(self.parts, self._sizes.items(), strict=True):
            packed, scale = (self._source[f"{name}.{own}"].of(source) for own in ("packed", "weight_scale"))
            part.of(target).copy_(self._backend.dequantize(packed, scale, size[1], self._dtype))


class Relayout:
    """int8 weights as one backend packs them -> as another does, both of whom may compute the expert.

    Args:
        source: How a blob of the slow tier is laid out, packed by `packer`.
        target: How one of the fast tier is, packed by `backend`.
        sizes: Of the expert's linears.
    """

    def __init__(self, source: list[Part], target: list[Part], sizes: Sizes, packer: Backend, backend: Backend):
        self._source = {part.name: part for part in source}
        self._sizes, self._packer, self._backend = sizes, packer, backend
        self.parts, self.blob_bytes = layout(
            {part.name: torch.empty(part.shape, dtype=part.dtype, device="meta") for part in target}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for part in self.parts:
            tensor = self._source[part.name].of(source)
            linear, _, own = part.name.rpartition(".")
            if own == "packed":
                tensor = self._backend.pack(self._packer.unpack(tensor, *self._sizes[linear]))
            part.of(target).copy_(tensor)


class Cast:
    """Floats -> floats of another type.

    Args:
        source: How a blob of the slow tier is laid out.
        dtype: Of the fast tier's weights.
    """

    def __init__(self, source: list[Part], dtype: torch.dtype):
        self._source = source
        self.parts, self.blob_bytes = layout(
            {part.name: torch.empty(part.shape, dtype=dtype, device="meta") for part in source}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for here, there in zip(self._source, self.parts, strict=True):
            there.of(target).copy_(here.of(source))


class ConvertedTier:
    """A slow tier whose experts are converted as they are read.

    Args:
        tier: The slow tier as it is.
        conversion: Of its blobs.
        device: Where they arrive.
    """

    def __init__(self, tier: SlowTier, conversion: Conversion, device: torch.device):
        self.parts, self.blob_bytes = conversion.parts, conversion.blob_bytes
        self.moved_bytes, self.room_bytes = tier.moved_bytes, tier.blob_bytes
        self._tier, self._conversion = tier, conversion
        self._arrived = aligned(tier.blob_bytes, device)  # one is enough: reads follow each other in one stream

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """As a `SlowTier`'s."""
        self._tier.read(layer, expert, self._arrived)
        self._conversion(self._arrived, blob)

    def in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """As a `SlowTier`'s: where its weights lie, an expert is as it was before it is converted."""
        return self._tier.in_place(layer, number, expert)

    def leave(self, experts: Sequence[nn.Module]) -> None:
        """As a `SlowTier`'s."""
        self._tier.leave(experts)

    def close(self) -> None:
        """Close the tier beneath."""
        self._tier.close()
