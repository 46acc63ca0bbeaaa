"""int8 products on a CPU by the fastest exact path that torch has, chosen at run time by measuring.

`torch._int_mm` is fast where the CPU has VNNI. Without it, it saturates pairs of products in silence, so each
candidate is first held against the reference on extreme values. What always works: the product of int8 values
in float32, exact as long as a partial sum stays below 2^24, hence columns in chunks of 1,040.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from haq_lab.int8.backend import Backend, ReferenceBackend

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


class CpuBackend(Backend):
    """Real int8 products on this CPU."""

    name = "cpu"

    def accumulate(self, qx: Tensor, qw: Tensor) -> Tensor:
        rows = qx.shape[0]
        if rows == 0:
            return torch.zeros(0, qw.shape[0], dtype=torch.int32)
        # One choice for all row counts of the same magnitude: experts see a different count each step.
        return fastest(1 << min(rows - 1, 511).bit_length(), *qw.shape)(qx, qw)
