"""What a backend is: how one int8 linear is held and computed. `reference` and `fake` are here, others beside it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from haq_lab.int8.numerics import ActivationScheme, epilogue, quantize_activations, swiglu


class PackedLinear(NamedTuple):
    """An int8 linear as its backend multiplies with it.

    Attributes:
        packed: `Backend.pack` of the levels (n, k).
        scale: Of the rows, float32 (n,).
        bias: (n,) or None.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None = None


class PackedExpert(NamedTuple):
    """An expert's linears, and how what `down` reads is quantised."""

    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scheme: ActivationScheme
    static_scale: Tensor | None = None


class Backend:
    """Quantise the rows, multiply in int8, scale.

    A backend overrides what it does in its own way: `accumulate` or `product`, `quantize`, and `pack` with
    `unpack` where it holds weights in a layout of its own. `linear` has its one signature here.
    """

    name: ClassVar[str]
    device: torch.device = torch.device("cpu")  # where packed weights lie and a deployed model runs
    fused: Any = None  # compute what stands before a product together with the quantizing, if there are such

    @property
    def kernels(self) -> str:
        """What computes the products here, for the record of a run."""
        return "torch"

    def pack(self, levels: Tensor) -> Tensor:
        """int8 levels (n, k) -> the tensor that `linear` multiplies with; done once for each linear."""
        return levels

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """The int8 levels (rows, columns) that were packed, exactly."""
        return packed

    def dequantize(self, packed: Tensor, weight_scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The weights that packed levels stand for, (n, columns) of a 16-bit float `dtype`: each level times its row's
        `weight_scale` (n,) in float32, then rounded."""
        levels = self.unpack(packed, len(weight_scale), columns)
        return (levels.float() * weight_scale[:, None]).to(dtype)

    def joins(self, rows: int) -> bool:
        """Whether packed weights of so many rows, and others of the same k after them, are packed as one matrix."""
        return True

    def linear(self, x: Tensor, weights: PackedLinear, scheme: ActivationScheme, static_scale: Tensor | None) -> Tensor:
        """x (m, k) floating -> (m, n) of the same type."""
        return self.product(*self.quantize(x, scheme, static_scale), weights, x.dtype).to(x.device)

    def quantize(self, x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (m, k) floating -> int8 (m, k) and float32 scales, one a row, as `product` takes them."""
        return quantize_activations(x, scheme, static_scale)

    def swiglu_quantize(
        self, gate: Tensor, up: Tensor, scheme: ActivationScheme, static_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """silu(gate) * up of float32 (m, k), as `numerics.swiglu` has it to the bit, quantised as by `quantize`."""
        return self.quantize(swiglu(gate, up), scheme, static_scale)

    def expert(self, qx: Tensor, row_scale: Tensor, weights: PackedExpert) -> Tensor:
        """down(silu(gate(x)) * up(x)) in float32 of quantised rows; by `product` and `swiglu_quantize`, or with their
        very bits."""
        inner = [self.product(qx, row_scale, linear, torch.float32) for linear in (weights.gate, weights.up)]
        quantized = self.swiglu_quantize(inner[0], inner[1], weights.scheme, weights.static_scale)
        return self.product(*quantized, weights.down, torch.float32)

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        """The quantised rows times the packed weights, scaled in float32: (m, n) of `dtype`."""
        return epilogue(self.accumulate(qx, weights.packed), row_scale, weights.scale, weights.bias).to(dtype)

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        """int8 (m, k) times int8 levels (n, k) transposed -> int32 (m, n), exact."""
        raise NotImplementedError


class ReferenceBackend(Backend):
    """Exact and simple: products of int8 values in float64, whose sums are exact up to 2^53."""

    name = "reference"

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        return (qx.double() @ levels.double().t()).to(torch.int32)


class FakeBackend(Backend):
    """The simulation others use: quantise, dequantise, multiply in float. No int8 arithmetic happens."""

    name = "fake"

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        levels, scale, bias = weights
        return torch.nn.functional.linear(qx.float() * row_scale, levels.float() * scale[:, None], bias).to(dtype)
