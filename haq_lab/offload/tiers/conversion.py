"""Convert experts on their way to the fast tier, if the two tiers hold them in different formats.

    tier = ConvertedTier(tier, [Dequantize(layout.parts, sizes, formats, backend, torch.float16)], device)

An expert is copied in the format of the slow tier and converted on the device, on the stream of the copies.
`Dequantize` is dequantization on load (arXiv 2508.07329), so the link carries int8. `Relayout` lets host memory hold
experts in the layout of the CPU's kernels, so that the CPU can run them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.families.family import PROJECTIONS
from haq_lab.offload.tiers.arena import page_aligned
from haq_lab.offload.tiers.base import SlowTier
from haq_lab.offload.tiers.disk import Layout, Layouts, Part, layout

Sizes = dict[str, tuple[int, int]]  # (outputs, inputs) of each linear of an expert
Weights = dict[str, WeightFormat]  # of each linear of an expert


def linear_sizes(expert: nn.Module) -> Sizes:
    """Return the output and input size of each linear of an expert."""
    linears: dict[str, Any] = {name: expert.get_submodule(name) for name in PROJECTIONS}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def weight_formats(expert: nn.Module) -> Weights:
    """Return the weight format of each linear of a quantised expert."""
    linears: dict[str, Any] = {name: expert.get_submodule(name) for name in PROJECTIONS}
    return {name: linear.format for name, linear in linears.items()}


class Conversion(Protocol):
    """Converts blobs of one layout of the slow tier into blobs of the fast tier.

    Attributes:
        layout: Layout of a converted blob.
    """

    layout: Layout

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """Convert one blob.

        Args:
            source: Blob of the slow tier, (bytes,) uint8 on the device.
            target: Blob of the fast tier, uint8 of the layout's size on the same device. It is overwritten.
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
        self.layout = layout({name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()})

    def __call__(self, source: Tensor, target: Tensor) -> None:
        parts = {part.name: part for part in self.layout.parts}
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
        self.layout = layout({part.name: torch.empty(part.shape, dtype=part.dtype, device="meta") for part in target})

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for part in self.layout.parts:
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
        self.layout = layout({part.name: torch.empty(part.shape, dtype=dtype, device="meta") for part in source})

    def __call__(self, source: Tensor, target: Tensor) -> None:
        for source_part, target_part in zip(self._source, self.layout.parts, strict=True):
            target_part.of(target).copy_(source_part.of(source))


class ConvertedTier:
    """A slow tier whose experts are converted after they are read.

    Args:
        tier: The slow tier without conversion.
        conversions: Conversion of the blobs of each of its layouts.
        device: Device of the fast tier.
    """

    def __init__(self, tier: SlowTier, conversions: Sequence[Conversion], device: torch.device):
        sources = tier.layouts
        distinct: list[Layout] = []  # two layouts of the slow tier can be converted to one
        examples: list[nn.Module] = []
        for conversion, example in zip(conversions, sources.examples, strict=True):
            if conversion.layout not in distinct:
                distinct.append(conversion.layout)
                examples.append(example)
        index = np.array([distinct.index(conversion.layout) for conversion in conversions], np.int64)
        self.layouts = Layouts(distinct, index[sources.index], examples)
        self.moved_bytes, self.staging_bytes = tier.moved_bytes, sources.largest
        self._tier, self._conversions = tier, conversions
        self._staging = page_aligned(sources.largest, device)  # one is enough, because all reads use one stream

    def read(self, layer: int, expert: int, blob: Tensor) -> None:
        """Read and convert an expert, as `SlowTier.read`."""
        sources = self._tier.layouts
        staging = self._staging[: sources.of(layer, expert).size]
        self._tier.read(layer, expert, staging)
        self._conversions[sources.index[layer, expert]](staging, blob)

    def use_in_place(self, layer: int, number: int, expert: nn.Module) -> nn.Module:
        """Return the expert in the format of the slow tier, as `SlowTier.use_in_place`."""
        return self._tier.use_in_place(layer, number, expert)

    def end_use(self, experts: Sequence[nn.Module]) -> None:
        """Free what running in place has loaded."""
        self._tier.end_use(experts)

    def close(self) -> None:
        """Close the tier below."""
        self._tier.close()
