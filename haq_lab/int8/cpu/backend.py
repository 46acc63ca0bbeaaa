"""`backend=cpu`: int8 products by our own kernels (`native`), else by the fastest exact path that torch has.

Our kernels need a compiler once, or a library built before, and are held against the reference at start-up.
torch's paths are chosen between by measuring, for each shape. `torch._int_mm` is fast where the CPU has VNNI.
Without it, it saturates pairs of products in silence, so each candidate is first held against the reference on
extreme values. What always works: the product of int8 values in float32, exact as long as a partial sum stays
below 2^24, hence columns in chunks of 1,040.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from haq_lab.int8.backend import Backend, PackedExpert, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.numerics import ActivationScheme, epilogue, scale_of

Product = Callable[[Tensor, Tensor], Tensor]
EXACT_IN_FLOAT32 = 2**24 // 127**2  # columns whose products sum exactly in a float32: 1,040


def _int_mm(qx: Tensor, qw: Tensor) -> Tensor:
    return torch._int_mm(qx, qw.t())  # the view, not a copy: 2.5 x faster at one row


def _float_chunks(qx: Tensor, qw: Tensor) -> Tensor:
    total = torch.zeros(qx.shape[0], qw.shape[0], dtype=torch.int32)
    for x, w in zip(qx.split(EXACT_IN_FLOAT32, 1), qw.split(EXACT_IN_FLOAT32, 1), strict=True):
        total += (x.float() @ w.float().t()).to(torch.int32)
    return total


CANDIDATES: tuple[Product, ...] = (_int_mm, _float_chunks)


def is_exact(product: Product, rows: int, outputs: int, columns: int) -> bool:
    """Whether `product` equals the reference on random and on extreme values of this shape."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randint(-127, 128, (count, columns), dtype=torch.int8, generator=generator)

    def full(count: int, value: int) -> Tensor:
        return torch.full((count, columns), value, dtype=torch.int8)

    draws = [(draw(rows), draw(outputs)), *((full(rows, 127), full(outputs, value)) for value in (127, -127))]
    reference = ReferenceBackend()
    try:
        return all(torch.equal(product(x, w), reference.accumulate(x, w)) for x, w in draws)
    except RuntimeError:  # a shape this path does not take
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
    """The fastest exact candidate for a shape; measured once in a process."""
    exact = [product for product in CANDIDATES if is_exact(product, rows, outputs, min(columns, 64))]
    qx = torch.ones(rows, columns, dtype=torch.int8)
    qw = torch.ones(outputs, columns, dtype=torch.int8)
    return min(exact, key=lambda product: _seconds(product, qx, qw))


@cache
def native_is_exact(isa: str) -> bool:
    """Whether our kernels are there and equal the reference, in the sums and to the last bit of a linear."""
    reference = ReferenceBackend()
    generator = torch.Generator().manual_seed(0)
    with native.forced_isa(isa):
        for rows, outputs, columns in ((1, 33, 70), (7, 64, 2100), (40, 100, 576)):
            if not is_exact(lambda qx, qw: native.accumulate(qx, native.pack(qw)), rows, outputs, columns):
                return False
            levels = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, generator=generator)
            x, scale, bias = (torch.randn(shape, generator=generator) for shape in ((rows, columns), outputs, outputs))
            wanted = reference.linear(x, PackedLinear(levels, scale.abs(), bias), "token", None)
            if not torch.equal(native.linear(x, native.pack(levels), scale.abs(), bias), wanted):
                return False
    return True


def _taken(x: Tensor) -> Tensor:
    """x as our kernels take it."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


class CpuBackend(Backend):
    """Real int8 products on this CPU.

    Weights that `pack` has put in our kernels' layout are uint8; where those kernels cannot be used they stay int8
    levels, which torch multiplies. Both give the same bits.
    """

    name = "cpu"

    def __init__(self) -> None:
        if not native.available():
            self._why_not = native.unavailable_reason()
        else:
            self._why_not = "" if native_is_exact(native.isa()) else f"our {native.isa()} kernels are not exact here"
        self.native = not self._why_not

    @property
    def kernels(self) -> str:
        return f"native {native.isa()}" if self.native else f"torch ({self._why_not})"

    @property
    def why_not_native(self) -> str:
        return self._why_not

    def pack(self, levels: Tensor) -> Tensor:
        return native.pack(levels.contiguous()).data if self.native else levels

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        return native.unpack(native.Packed(packed, rows, columns)) if packed.dtype == torch.uint8 else packed

    def can_merge_rows(self, rows: int) -> bool:
        return not self.native or rows % native.PANEL == 0

    def linear(self, x: Tensor, weights: PackedLinear, scheme: ActivationScheme, static_scale: Tensor | None) -> Tensor:
        packed, weight_scale, bias = weights
        if packed.dtype != torch.uint8:
            return super().linear(x, weights, scheme, static_scale)
        if scheme == "tensor":
            static_scale = scale_of(x.float().abs().amax()) if x.numel() else None
        scale = None if scheme == "token" or static_scale is None else float(static_scale)
        y = native.linear(
            _taken(x),
            native.Packed(packed, len(weight_scale), x.shape[1]),
            weight_scale,
            None if bias is None else bias.float(),
            scale,
        )
        return y.to(x.dtype)

    def quantize(self, x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.native:
            return super().quantize(x, scheme, static_scale)
        x = _taken(x)
        if scheme == "token":
            levels, scale = native.quantize_rows(x)
            return levels, scale[:, None]
        if scheme == "tensor":
            static_scale = scale_of(x.float().abs().amax()) if x.numel() else x.new_ones(())
        assert static_scale is not None, "the static scheme needs the scale from calibration"
        return native.quantize_static(x, float(static_scale)), static_scale.float().expand(len(x), 1)

    def swiglu_quantize(
        self, gate: Tensor, up: Tensor, scheme: ActivationScheme, static_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.native:
            return super().swiglu_quantize(gate, up, scheme, static_scale)
        return self.quantize(native.silu_mul(torch.cat([gate, up], dim=1)), scheme, static_scale)

    def expert(self, qx: Tensor, row_scale: Tensor, weights: PackedExpert) -> Tensor:
        linears = weights.gate, weights.up, weights.down
        plain = all(linear.packed.dtype == torch.uint8 and linear.bias is None for linear in linears)
        if not plain or weights.scheme == "tensor":
            return super().expert(qx, row_scale, weights)
        packed, scales = [linear.packed for linear in linears], [linear.scale for linear in linears]
        scale = None if weights.static_scale is None else float(weights.static_scale)
        return native.expert(qx, row_scale.reshape(-1).contiguous(), packed, scales, scale)

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        packed, weight_scale, bias = weights
        if packed.dtype != torch.uint8:
            return super().product(qx, row_scale, weights, dtype)
        sums = native.accumulate(qx, native.Packed(packed, len(weight_scale), qx.shape[1]))
        return epilogue(sums, row_scale, weight_scale, bias).to(dtype)

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        rows = qx.shape[0]
        if rows == 0:
            return torch.zeros(0, levels.shape[0], dtype=torch.int32)
        # One choice for all row counts of the same magnitude: experts see a different count each step.
        return fastest(1 << min(rows - 1, 511).bit_length(), *levels.shape)(qx, levels)
