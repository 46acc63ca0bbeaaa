"""Implement `backend=cpu`: int8 products by the native kernels, or by torch if those are not available.

The native kernels (kernels/cpu) are compiled at first use and compared with the reference backend at start-up.

Without them, the fastest exact torch function is measured for each shape. `torch._int_mm` is fast on CPUs with VNNI.
On other CPUs it silently saturates pairs of products, so each candidate is first compared with the reference on
extreme values. Float32 products always work. Their sums are exact below 2^24, so columns are split into chunks of
1,040.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from haq_lab.int8.backend import Backend, PackedExpert, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.weight_block import WeightBlock
from haq_lab.int8.numerics import ActivationScheme, epilogue, scale_of
from haq_lab.int8.rotation import NO_ROTATION, rotate
from haq_lab.int8.sequences import Sequences
from haq_lab.int8.weight_format import INT8, WeightFormat

INT4 = WeightFormat(4, 64)
Product = Callable[[Tensor, Tensor], Tensor]
EXACT_IN_FLOAT32 = 2**24 // 127**2  # 1,040 columns, whose products a float32 can sum exactly


def _int_mm(qx: Tensor, qw: Tensor) -> Tensor:
    return torch._int_mm(qx, qw.t())  # a transposed view is 2.5 times faster than a copy for one row


def _float_chunks(qx: Tensor, qw: Tensor) -> Tensor:
    total = torch.zeros(qx.shape[0], qw.shape[0], dtype=torch.int32)
    for x, w in zip(qx.split(EXACT_IN_FLOAT32, 1), qw.split(EXACT_IN_FLOAT32, 1), strict=True):
        total += (x.float() @ w.float().t()).to(torch.int32)
    return total


CANDIDATES: tuple[Product, ...] = (_int_mm, _float_chunks)


def is_exact(product: Product, rows: int, outputs: int, columns: int) -> bool:
    """Return whether `product` equals the reference backend on random and extreme values of one shape.

    Args:
        product: Multiplies int8 (rows, columns) by int8 (outputs, columns) transposed, to int32 (rows, outputs).
        rows: Rows of the activations.
        outputs: Rows of the weights.
        columns: Columns of both.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randint(-127, 128, (count, columns), dtype=torch.int8, generator=generator)

    def full(count: int, value: int) -> Tensor:
        return torch.full((count, columns), value, dtype=torch.int8)

    draws = [(draw(rows), draw(outputs)), *((full(rows, 127), full(outputs, value)) for value in (127, -127))]
    reference = ReferenceBackend()
    try:
        return all(torch.equal(product(x, w), reference.accumulate(x, w)) for x, w in draws)
    except RuntimeError:  # the function does not support this shape
        return False


def _seconds(product: Product, qx: Tensor, qw: Tensor) -> float:
    product(qx, qw)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(qx, qw)
        best = min(best, time.perf_counter() - start)
    return best


@cache
def fastest(rows: int, outputs: int, columns: int) -> Product:
    """Return the fastest exact candidate for a shape. It is measured once per process."""
    exact = [product for product in CANDIDATES if is_exact(product, rows, outputs, min(columns, 64))]
    qx = torch.ones(rows, columns, dtype=torch.int8)
    qw = torch.ones(outputs, columns, dtype=torch.int8)
    return min(exact, key=lambda product: _seconds(product, qx, qw))


@cache
def native_is_exact(isa: str) -> bool:
    """Return whether the native kernels of one instruction set are bit-identical to the reference backend.

    Both the int32 sums and a complete linear are compared.
    """
    reference = ReferenceBackend()
    generator = torch.Generator().manual_seed(0)
    with library.forced_isa(isa):
        for rows, outputs, columns in ((1, 33, 70), (7, 64, 2100), (40, 100, 576)):
            if not is_exact(lambda qx, qw: native.accumulate(qx, native.pack(qw)), rows, outputs, columns):
                return False
            levels = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, generator=generator)
            x, scale, bias = (torch.randn(shape, generator=generator) for shape in ((rows, columns), outputs, outputs))
            wanted = reference.linear(x, PackedLinear(levels, scale.abs(), bias), "token", None)
            if not torch.equal(native.linear(x, native.pack(levels), scale.abs(), bias), wanted):
                return False
            levels, scales = levels.clamp(-7, 7), torch.rand(-(-columns // 64), outputs, generator=generator)
            weights = PackedLinear(INT4.stored(levels), scales, bias, INT4)
            wanted = reference.linear(x, weights, "token", None)
            if not torch.equal(native.linear(x, native.pack(levels, INT4), scales, bias), wanted):
                return False
    return True


def _supported(x: Tensor) -> Tensor:
    """Convert x to a type and layout that the native kernels support."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def _packed(weights: PackedLinear, columns: int) -> native.Packed:
    return native.Packed(weights.packed, weights.rows, columns, weights.format)


class CpuBackend(Backend):
    """Backend with int8 products on this CPU.

    If the native kernels are available and exact, `pack` returns uint8 tensors in their layout. Otherwise weights
    stay int8 levels and torch multiplies them. Both are bit-identical.
    """

    name = "cpu"

    def __init__(self) -> None:
        if not library.available():
            self._why_not = library.unavailable_reason()
        else:
            self._why_not = (
                ""
                if native_is_exact(library.isa())
                else f"the native {library.isa()} kernels are not exact on this CPU"
            )
        self.native = not self._why_not

    @property
    def kernels(self) -> str:
        return f"native {library.isa()}" if self.native else f"torch ({self._why_not})"

    @property
    def why_not_native(self) -> str:
        return self._why_not

    def pack(self, levels: Tensor, format: WeightFormat = INT8) -> Tensor:
        if not self.native:
            return super().pack(levels, format)
        return native.pack(levels.contiguous(), format).data

    def unpack(self, packed: Tensor, rows: int, columns: int, format: WeightFormat = INT8) -> Tensor:
        if not self.native:
            return super().unpack(packed, rows, columns, format)
        return native.unpack(native.Packed(packed, rows, columns, format))

    def weight_block(self, weights: Iterable[tuple[int, int, WeightFormat]]) -> AbstractContextManager[object]:
        if not self.native:
            return nullcontext()
        return WeightBlock(sum(native.packed_bytes(*shape) for shape in weights))

    def can_merge_rows(self, rows: int) -> bool:
        return not self.native or rows % native.PANEL == 0

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> Tensor:
        if not self.native or sequences is not None:
            return super().linear(x, weights, scheme, static_scale, sequences, rotation)
        if scheme == "tensor":
            static_scale = scale_of(rotate(x, rotation).float().abs().amax()) if x.numel() else None
        scale = None if scheme == "token" or static_scale is None else float(static_scale)
        bias = None if weights.bias is None else weights.bias.float()
        packed, own_scale = _packed(weights, x.shape[1]), weights.scale.contiguous()
        return native.linear(_supported(x), packed, own_scale, bias, scale, rotation=rotation).to(x.dtype)

    def quantize(
        self,
        x: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        if not self.native or sequences is not None:
            return super().quantize(x, scheme, static_scale, sequences, rotation)
        if scheme == "tensor":  # the scale is that of rotated values
            x, rotation = rotate(x, rotation), NO_ROTATION
        x = _supported(x)
        if scheme == "token":
            levels, scale = native.quantize_rows(x, rotation)
            return levels, scale[:, None]
        if scheme == "tensor":
            static_scale = scale_of(x.float().abs().amax()) if x.numel() else x.new_ones(())
        assert static_scale is not None, "The static scheme needs a scale from calibration."
        return native.quantize_static(x, float(static_scale), rotation), static_scale.float().expand(len(x), 1)

    def swiglu_quantize(
        self,
        gate: Tensor,
        up: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        if not self.native:
            return super().swiglu_quantize(gate, up, scheme, static_scale, sequences, rotation)
        return self.quantize(native.silu_mul(torch.cat([gate, up], dim=1)), scheme, static_scale, sequences, rotation)

    def expert(
        self, qx: Tensor, row_scale: Tensor, weights: PackedExpert, sequences: Sequences | None = None
    ) -> Tensor:
        linears = weights.gate, weights.up, weights.down
        if not self.native or any(linear.bias is not None for linear in linears) or weights.scheme == "tensor":
            return super().expert(qx, row_scale, weights, sequences)
        widths = qx.shape[1], qx.shape[1], weights.gate.rows
        packed = [_packed(linear, width) for linear, width in zip(linears, widths, strict=True)]
        scales = [linear.scale for linear in linears]
        scale = None if weights.static_scale is None else float(weights.static_scale)
        return native.expert(qx, row_scale.reshape(-1).contiguous(), packed, scales, scale, weights.rotation)

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        if not self.native:
            return super().product(qx, row_scale, weights, dtype)
        packed = _packed(weights, qx.shape[1])
        if weights.format.bits == 4:
            row_scale, bias = row_scale.reshape(-1).contiguous(), None if weights.bias is None else weights.bias.float()
            return native.product4(qx, row_scale, packed, weights.scale.contiguous(), bias).to(dtype)
        return epilogue(native.accumulate(qx, packed), row_scale, weights.scale, weights.bias).to(dtype)

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        rows = qx.shape[0]
        if rows == 0:
            return torch.zeros(0, levels.shape[0], dtype=torch.int32)
        # Row counts are rounded up to a power of two, because experts see a different count at each step.
        return fastest(1 << min(rows - 1, 511).bit_length(), *levels.shape)(qx, levels)
