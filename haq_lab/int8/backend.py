"""Define the `Backend` interface, which stores and computes int8 linears, and two simple backends.

The `cpu` and `cuda` backends are in their own packages, `haq_lab.int8.cpu` and `haq_lab.int8.cuda`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from haq_lab.int8.numerics import ActivationScheme, epilogue, grouped_epilogue, quantize_activations, swiglu
from haq_lab.int8.rotation import NO_ROTATION, rotate
from haq_lab.int8.sequences import Sequences
from haq_lab.int8.weight_format import INT8, WeightFormat


class PackedLinear(NamedTuple):
    """The tensors of one int8 linear, in the layout of its backend.

    Attributes:
        packed: Result of `Backend.pack` for the int8 levels (n, k).
        scale: The weight scales, float32: (n,), or (groups, n).
        bias: (n,), or None.
        format: Bits of the weights, and columns that share a scale.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None = None
    format: WeightFormat = INT8

    @property
    def rows(self) -> int:
        """Number of rows n."""
        return self.scale.shape[-1]


class PackedExpert(NamedTuple):
    """The three linears of one expert, and how its down projection takes its input.

    Attributes:
        gate: The gate projection.
        up: The up projection.
        down: The down projection.
        scheme: Activation scheme of the down projection's input.
        static_scale: Scalar scale of that input for the static scheme, else None.
        rotation: Block of that input's rotation (`haq_lab.int8.rotation`); 1 for none.
    """

    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scheme: ActivationScheme
    static_scale: Tensor | None = None
    rotation: int = NO_ROTATION


class Backend:
    """Base class of the backends, which quantise activations and multiply them with int8 weights.

    A subclass implements `accumulate`, or overrides `product`. It may override `quantize` for speed. If it stores
    weights in its own layout, it overrides `pack` and `unpack`.

    Other packages check the capabilities below. They never check a backend's class or name.

    Attributes:
        name: The backend's name in results and result keys.
        exact: Whether products equal the reference backend bit for bit.
        uses_gpu: Whether weights and products take GPU memory.
        native: Whether packed weights have the layout of the kernels in kernels/cpu. If so, the native decoder and
            the native router can run on them.
        fused_kernels: Kernels that fuse norms and SwiGLU with quantization and that group experts, or None.
        device: Where packed weights are stored and where a deployed model runs.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    uses_gpu: ClassVar[bool] = False
    native: bool = False
    fused_kernels: Any = None
    device: torch.device = torch.device("cpu")

    @property
    def kernels(self) -> str:
        """Name of the kernels that compute the products, for the run's record."""
        return "torch"

    @property
    def why_not_native(self) -> str:
        """The reason why `native` is False, in plain words; empty if it is True."""
        return "" if self.native else f"backend={self.name} does not use the native CPU kernels"

    def describe_gpu(self) -> dict[str, Any] | None:
        """Return the GPU, its driver and the libraries that use it, for the run's record. None without a GPU."""
        return None

    def close(self) -> None:
        """Release what the backend has reserved on this machine. A run calls it at its end."""

    def pack(self, levels: Tensor, format: WeightFormat = INT8) -> Tensor:
        """Convert int8 levels (n, k) to this backend's weight layout. This is done once for each linear.

        The result has about n k bytes, or half as many for 4-bit weights.

        Args:
            levels: int8 (n, k).
            format: Format of the weights.
        """
        return format.stored(levels)

    def unpack(self, packed: Tensor, rows: int, columns: int, format: WeightFormat = INT8) -> Tensor:
        """Return the exact int8 levels (rows, columns) of packed weights."""
        return format.levels(packed, columns)

    def dequantize(
        self,
        packed: Tensor,
        weight_scale: Tensor,
        columns: int,
        dtype: torch.dtype,
        format: WeightFormat = INT8,
    ) -> Tensor:
        """Return the float weights of packed levels.

        Args:
            packed: The packed weights.
            weight_scale: The weight scales, float32: (n,), or (groups, n).
            columns: k, the number of input features.
            dtype: A 16-bit float type.
            format: Format of the weights.

        Returns:
            (n, columns) of `dtype`. Each level is multiplied by its scale in float32 and then rounded.
        """
        levels = self.unpack(packed, weight_scale.shape[-1], columns, format)
        return (levels.float() * format.row_scales(weight_scale, columns)).to(dtype)

    def weight_block(self, weights: Iterable[tuple[int, int, WeightFormat]]) -> AbstractContextManager[object]:
        """Return a context that can be entered repeatedly, in which `pack` stores weights one after the other.

        Args:
            weights: Shape (n, k) and format of all weights that will be packed in the context.
        """
        return nullcontext()

    def can_merge_rows(self, rows: int) -> bool:
        """Return whether packed weights with this many rows can be followed by another linear's in one matrix."""
        return True

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> Tensor:
        """Rotate and quantise x, and compute the linear.

        Args:
            x: Activations (m, k), floating.
            weights: The linear.
            scheme: Activation scheme.
            static_scale: Scalar scale for the static scheme, else None.
            sequences: Sequences of the rows for the `tensor` scheme. None if all rows belong to one sequence.
            rotation: Block of the input's rotation (`haq_lab.int8.rotation`); 1 for none.

        Returns:
            (m, n) of x's type, on x's device.
        """
        return self.product(*self.quantize(x, scheme, static_scale, sequences, rotation), weights, x.dtype).to(x.device)

    def quantize(
        self,
        x: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        """Rotate activations (m, k) and quantise them to int8 (m, k) with one float32 scale per row.

        The result has the form that `product` takes. The arguments are those of `linear`.
        """
        return quantize_activations(rotate(x, rotation), scheme, static_scale, sequences)

    def swiglu_quantize(
        self,
        gate: Tensor,
        up: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        """Compute silu(gate) * up of float32 (m, k), rotate and quantise it.

        The result is bit-identical to `numerics.swiglu` followed by `quantize`.
        """
        return self.quantize(swiglu(gate, up), scheme, static_scale, sequences, rotation)

    def expert(
        self, qx: Tensor, row_scale: Tensor, weights: PackedExpert, sequences: Sequences | None = None
    ) -> Tensor:
        """Compute down(silu(gate(x)) * up(x)) of quantised rows in float32.

        An override must be bit-identical to this code.

        Args:
            qx: int8 (m, k).
            row_scale: One float32 scale per row, as `quantize` returns them.
            weights: The expert.
            sequences: As for `linear`.
        """
        inner = [self.product(qx, row_scale, linear, torch.float32) for linear in (weights.gate, weights.up)]
        scheme, static_scale, rotation = weights.scheme, weights.static_scale, weights.rotation
        quantized = self.swiglu_quantize(inner[0], inner[1], scheme, static_scale, sequences, rotation)
        return self.product(*quantized, weights.down, torch.float32)

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Multiply quantised rows by packed weights and scale in float32.

        Args:
            qx: int8 (m, k).
            row_scale: One float32 scale per row, as `quantize` returns them.
            weights: The linear.
            dtype: Type of the result.

        Returns:
            (m, n) of `dtype`.
        """
        columns, group = qx.shape[1], weights.format.group
        levels = self.unpack(weights.packed, weights.rows, columns, weights.format)
        if weights.format.bits == 8:
            return epilogue(self.accumulate(qx, levels), row_scale, weights.scale, weights.bias).to(dtype)
        pairs = zip(qx.split(group or columns, dim=1), levels.split(group or columns, dim=1), strict=True)
        sums = (self.accumulate(rows.contiguous(), own.contiguous()) for rows, own in pairs)
        return grouped_epilogue(sums, row_scale, weights.scale.view(-1, weights.rows), weights.bias).to(dtype)

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        """Multiply int8 (m, k) by int8 levels (n, k) transposed. Returns the exact int32 sums (m, n)."""
        raise NotImplementedError


class ReferenceBackend(Backend):
    """A simple exact backend. It multiplies in float64, whose sums of int8 products are exact up to 2^53."""

    name = "reference"

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        return (qx.double() @ levels.double().t()).to(torch.int32)


class FakeBackend(Backend):
    """Simulated quantisation, as in many papers: quantise, dequantise, multiply in float. No int8 arithmetic."""

    name = "fake"
    exact = False

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        columns = qx.shape[1]
        levels = self.unpack(weights.packed, weights.rows, columns, weights.format)
        float_weights = levels.float() * weights.format.row_scales(weights.scale, columns)
        return torch.nn.functional.linear(qx.float() * row_scale, float_weights, weights.bias).to(dtype)
