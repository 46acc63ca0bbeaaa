"""The numerics contract in NumPy, written apart from the kernels: what every call must give, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

F = np.float32
THREADS = 128  # of a block of kernels/quantize.cu; it fixes the order in which a norm's sums are added


def bits(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy()


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Shape, type and every bit; says how many values differ and where the first one is."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    size = actual.element_size()
    differs = (bits(actual).reshape(-1, size) != bits(expected).reshape(-1, size)).any(axis=1)
    if differs.any():
        first = np.unravel_index(int(differs.argmax()), actual.shape)
        where = tuple(map(int, first))
        count = f"{int(differs.sum())} of {differs.size} values differ"
        raise AssertionError(f"{count}, first at {where}: {actual[where]} for {expected[where]}")


def quantize(values: np.ndarray, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """float32 (M, K) -> int8 and float32 scales (M,): per row, or with one static scale."""
    if scale is None:
        scales = np.abs(values).max(axis=1) / F(127)
        scales = np.where(scales > 0, scales, F(1)).astype(F)
    else:
        scales = np.full(len(values), scale, F)
    q = np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8)
    return torch.from_numpy(q), torch.from_numpy(scales)


def rotate(values: np.ndarray, block: int) -> np.ndarray:
    """float32 (M, K) in blocks of columns: sums and differences of pairs at distance 1, 2, 4, ..., then the scale."""
    if block == 1:
        return values
    y = values.reshape(-1, block).astype(F)
    columns = np.arange(block)
    half = 1
    while half < block:
        other = y[:, columns ^ half]
        y = np.where(columns & half, other - y, y + other)
        half *= 2
    return (y * F(1 / np.sqrt(block))).reshape(values.shape)


def accumulators(qx: Tensor, qw: Tensor) -> np.ndarray:
    """Exact int32 sums (M, N): float64 holds every partial sum, and BLAS is fast."""
    return (qx.numpy().astype(np.float64) @ qw.numpy().astype(np.float64).T).astype(np.int32)


def product(qx: Tensor, qw: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """((acc * sx) * sw) + bias in float32, then rounded to `out_dtype`."""
    y = accumulators(qx, qw).astype(F) * sx.numpy()[:, None] * sw.numpy()[None]
    if bias is not None:
        y = y + bias.numpy()[None]
    return torch.from_numpy(y).to(out_dtype)


def product4(
    qx: Tensor, qw: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None, out_dtype: torch.dtype, group: int
) -> Tensor:
    """Groups of columns, `sw` (groups, N), added in order in float32; then times sx, plus bias."""
    total = np.zeros((len(qx), len(qw)), F)
    for scale, x, w in zip(sw.numpy(), qx.split(group, dim=1), qw.split(group, dim=1), strict=True):
        total = total + accumulators(x, w).astype(F) * scale[None]
    y = total * sx.numpy()[:, None]
    if bias is not None:
        y = y + bias.numpy()[None]
    return torch.from_numpy(y).to(out_dtype)


def grouped(
    qx: Tensor,
    qw: Tensor,
    offsets: list[int],
    sx: Tensor,
    sw: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    product: Callable[..., Tensor] = product,
) -> Tensor:
    """Each expert's rows by that expert's weights."""
    parts = [
        product(qx[a:b], qw[e], sx[a:b], sw[e], None if bias is None else bias[e], out_dtype)
        for e, (a, b) in enumerate(itertools.pairwise(offsets))
    ]
    return torch.cat(parts)


def _row_sum(values: np.ndarray) -> np.ndarray:
    """Sums of rows in the kernel's order: a thread its groups of eight columns, a butterfly of lanes, then of warps."""
    rows, k = values.shape
    groups = values.reshape(rows, k // 8, 8)
    passes = -(-groups.shape[1] // THREADS)
    partial = np.zeros((rows, THREADS), F)
    for step in range(passes):
        chunk = groups[:, step * THREADS : (step + 1) * THREADS]
        for i in range(8):
            partial[:, : chunk.shape[1]] += chunk[:, :, i]
    warps = _butterfly(partial.reshape(rows, THREADS // 32, 32))
    lanes = np.zeros((rows, 32), F)
    lanes[:, : warps.shape[1]] = warps
    return _butterfly(lanes)


def _butterfly(lanes: np.ndarray) -> np.ndarray:
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[..., np.arange(32) ^ distance]
    return lanes[..., 0]


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """((x * inverse) * weight), inverse = 1 / sqrt(mean square + eps); all float32."""
    inverse = F(1) / np.sqrt(_row_sum(x * x) / F(x.shape[1]) + F(eps))
    return (x - F(0)) * inverse[:, None] * weight


def layernorm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """((x - mean) * inverse) * weight + bias; all float32."""
    k = F(x.shape[1])
    centred = x - (_row_sum(x) / k)[:, None]
    inverse = F(1) / np.sqrt(_row_sum(centred * centred) / k + F(eps))
    return centred * inverse[:, None] * weight + bias


def exp(x: np.ndarray) -> np.ndarray:
    """The float32 exponential of kernels/numeric.cuh, operation for operation."""
    x = np.clip(x, F(-87), F(88))
    n = np.rint(x * F(1.44269504))
    r = (x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = np.full_like(x, F(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F(c)
    y = (p * (r * r) + r) + F(1)
    return y * ((n.astype(np.int32) + 127) << 23).view(F)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up in float32."""
    return gate / (F(1) + exp(-gate)) * up


def dequant(qw: Tensor, sw: Tensor, out_dtype: torch.dtype) -> Tensor:
    """q * scale in float32, then rounded."""
    return torch.from_numpy(qw.numpy().astype(F) * sw.numpy()[:, None]).to(out_dtype)
