"""Convert experts on their way to the fast tier, if the two tiers hold them in different formats.

    tier = ConvertedTier(tier, Dequantize(tier.parts, sizes, backend, torch.float16), device)

An expert is copied in the format of the slow tier and converted on the device, on the stream of the copies.
`Dequantize` is dequantization on load (arXiv 2508.07329), so the link carries int8. `Relayout` lets host memory hold
experts in the layout of the CPU's kernels, so that the CPU can run them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.families.family import PROJECTIONS
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.disk import Part, layout

Sizes = dict[str, tuple[int, int]]  # (outputs, inputs) of each linear of an expert
Weights = dict[str, WeightFormat]  # of each linear of an expert


def linear_sizes(experts: nn.ModuleList) -> Sizes:
    """Return the output and input size of each linear of an expert. All experts of a layer are alike."""
    linears: dict[str, Any] = {name: experts[0].get_submodule(name) for name in PROJECTIONS}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def weight_formats(experts: nn.ModuleList) -> Weights:
    """Return the weight format of each linear of a quantised expert. All experts of a layer are alike."""
    linears: dict[str, Any] = {name: experts[0].get_submodule(name) for name in PROJECTIONS}
    return {name: linear.format for name, linear in linears.items()}


class Conversion(Protocol):
    """Converts blobs of the slow tier into blobs of the fast tier.

    Attributes:
        parts: Layout of a converted blob.
        blob_bytes: Size of a converted blob.
    """

    parts: list[Part]
    blob_bytes: int

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """Convert one blob.

        Args:
            source: Blob of the slow tier, (bytes,) uint8 on the device.
            target: Blob of the fast tier, (blob_bytes,) uint8 on the same device. It is overwritten.
        """
        ...


class Dequantize:
    """Converts int8 or int4 weights, and biases, to 16-bit floats.

    Args:
        source: Layout of a blob of the slow tier.
        sizes: Output and input size of each linear.
        formats: Format of the weights of each linear.
        backend: Backend that packed the weights.
        dtype: Type of the weights in the fast tier.
    """

    def __init__(self, source: list[Part], sizes: Sizes, formats: Weights, backend: Backend, dtype: torch.dtype):
        self._source = {part.name: part for part in source}
        self._sizes, self._formats, self._backend, self._dtype = sizes, formats, backend, dtype
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in sizes.items()}
        self._biases = [name for name in self._source if name.endswith(".bias")]
        shapes |= {name: self._source[name].shape for name in self._biases}
        self.parts, self.blob_bytes = layout(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        parts = {part.name: part for part in self.parts}
        for name in self._biases:
            parts[name].of(target).copy_(self._source[name].of(source))
        for name, size in self._sizes.items():
            packed, scale = (self._source[f"{name}.{tensor}"].of(source) for tensor in ("packed", "weight_scale"))
            weights = self._backend.dequantize(packed, scale, size[1], self._dtype, self._formats[name])
            parts[f"{name}.weight"].of(target).copy_(weights)


class Relayout:
    """Repacks int8 or int4 weights from one backend's layout to another's.

    Args:
        source: Layout of a blob of the slow tier, packed by `packer`.
        target: Layout of a blob of the fast tier, packed by `backend`.
        sizes: Output and input size of each linear.
        formats: Format of the weights of each linear.
        packer: Backend that packed the slow tier.
        backend: Backend that runs the experts in the fast tier.
    """

    def __init__(
        self,
        source: list[Part],
        target: list[Part],
        sizes: Sizes,
        formats: Weights,
        packer: Backend,
        backend: Backend,
    ):
        self._source = {part.name: part for part in source}
        self._sizes, self._formats, self._packer, self._backend = sizes, formats, packer, backend
        self.parts, self.blob_bytes = layout(
            {part.name: torch.empty(part.shape, dtype=part.dtype, device="meta") for part in target}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for part in self.parts:
            tensor = self._source[part.name].of(source)
            linear, _, name = part.name.rpartition(".")
            if name == "packed":
                format = self._formats[linear]
                tensor = self._backend.pack(self._packer.unpack(tensor, *self._sizes[linear], format), format)
            part.of(target).copy_(tensor)


class Cast:
    """Converts floats to another float type.

    Args:
        source: Layout of a blob of the slow tier.
        dtype: Type of the weights in the fast tier.
    """

    def __init__(self, source: list[Part], dtype: torch.dtype):
        self._source = source
        self.parts, self.blob_bytes = layout(
            {part.name: torch.empty(part.shape, dtype=dtype, device="meta") for part in source}
        )

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for source_part, target_part in zip(self._source, self.parts, strict=True):
            target_part.of(target).copy_(source_part.of(source))


class ConvertedTier:
    """A slow tier whose experts are converted after they are read.

    Args:
        tier: The slow tier without conversion.
        conversion: Conversion of its blobs.
        device: Device of the fast tier.
    """

    def __init__(self, tier: SlowTier, conversion: Conversion, device: torch.device):
        self.parts, self.blob_bytes = conversion.parts, conversion.blob_bytes
        self.moved_bytes, self.staging_bytes = tier.moved_bytes, tier.blob_bytes
        self._tier, self._conversion = tier, conversion
        self._staging = page_aligned(tier.blob_bytes, device)  # one is enough, because all reads use one stream

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Read and convert an expert, as `SlowTier.read`."""
        self._tier.read(layer, expert, self._staging)
        self._conversion(self._staging, blob)

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Return the expert in the format of the slow tier, as `SlowTier.use_in_place`."""
        return self._tier.use_in_place(layer, number, expert)

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Free what running in place has loaded."""
        self._tier.end_use(experts)

    def close(self) -> None:
        """Close the tier below."""
        self._tier.close()
