"""Compute a lower bound for the time of a kernel call, with the roofline model (Williams et al., 2009).

The bound is the larger of its operations at peak rate and its bytes at full bandwidth. `useful_work` counts what any
kernel must do. The other functions count the loops of our kernels, including the padding of tiles. The tests compare
their counts with those of the C++ host layer.

    hardware = load_hardware("rtx4090")
    least_seconds(gemm_work(512, 4096, 4096, LARGE), hardware)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haq_lab.hardware.spec import Hardware
from haq_lab.int8.cuda.launch import STEP, Tile, blocks, k_part


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call.

    Attributes:
        multiplies: int8 multiply-adds, including those on padding.
        copied: Bytes copied from global to shared memory, including repeated reads. Most of these hit the L2 cache.
        memory: Bytes that must be read from or written to device memory at least once.
    """

    multiplies: int
    copied: int
    memory: int

    def __add__(self, other: Work) -> Work:
        return Work(self.multiplies + other.multiplies, self.copied + other.copied, self.memory + other.memory)


def least_seconds(work: Work, hardware: Hardware) -> float:
    """Return the lower bound in seconds.

    Args:
        work: Operations and bytes of the call.
        hardware: Peak rate and bandwidth.
    """
    return max(2 * work.multiplies / (hardware.int8_tops * 1e12), work.memory / (hardware.bandwidth_gbs * 1e9))


def useful_work(m: int, n: int, k: int, *, out_bytes: int = 2, scales: bool = True) -> Work:
    """Count the work that any W8A8 product must do: no padding, and each value is read or written once.

    Args:
        m: Rows of activations.
        n: Rows of weights.
        k: Columns of both.
        out_bytes: Bytes per output value.
        scales: Whether the float32 scales of rows and columns are read.
    """
    memory = m * k + n * k + out_bytes * m * n + (4 * (m + n) if scales else 0)
    return Work(multiplies=m * n * k, copied=0, memory=memory)


def gemm_work(m: int, n: int, k: int, tile: Tile, *, split: int = 1, out_bytes: int = 2, bias: bool = False) -> Work:
    """Count the work of kernels/gemm.cu.

    A tile reads K in steps of 64 columns. Each row of x is read once per tile column, and each row of weights once per
    tile row. If K is split, the int32 sums are zeroed, added to (read and written) and read once more.

    Args:
        m: Rows of activations.
        n: Rows of weights.
        k: Columns of both.
        tile: The tile of a block.
        split: Parts into which K is split.
        out_bytes: Bytes per output value.
        bias: Whether there is a bias.
    """
    tiles_m, tiles_n = blocks(m, tile.rows), blocks(n, tile.columns)
    part = k_part(k, split)
    steps = sum(blocks(min(part, k - begin), STEP) for begin in range(0, k, part))
    sums = 16 * m * n if part < k else 0
    operands = m * k + n * k + 4 * (m + n) + (4 * n if bias else 0)
    return Work(
        multiplies=tiles_m * tiles_n * steps * tile.rows * tile.columns * STEP,
        copied=tiles_n * m * k + tiles_m * n * k,
        memory=operands + sums + out_bytes * m * n,
    )


def gemv_work(m: int, n: int, k: int, *, out_bytes: int = 2, bias: bool = False) -> Work:
    """Count the work of kernels/gemv.cu: pairs of columns times 1, 2, 4 or 8 rows, without shared memory.

    Arguments are those of `gemm_work`.
    """
    rows = next(size for size in (1, 2, 4, 8) if size >= m)
    memory = m * k + n * k + 4 * (m + n) + (4 * n if bias else 0) + out_bytes * m * n
    return Work(multiplies=rows * 2 * blocks(n, 2) * k, copied=0, memory=memory)


def gemm4_work(m: int, n: int, k: int, tile: Tile, group: int, *, out_bytes: int = 2, bias: bool = False) -> Work:
    """Count the work of kernels/gemm4.cu: that of `gemm_work` with half the bytes of weights, and scales by group.

    Args:
        m: Rows of activations.
        n: Rows of weights.
        k: Columns of both, a multiple of 32. No more are multiplied.
        tile: The tile of a block.
        group: Columns that share a scale.
        out_bytes: Bytes per output value.
        bias: Whether there is a bias.
    """
    tiles_m, tiles_n = blocks(m, tile.rows), blocks(n, tile.columns)
    return Work(
        multiplies=tiles_m * tiles_n * tile.rows * tile.columns * k,
        copied=tiles_n * m * k + tiles_m * n * k // 2,
        memory=_memory4(m, n, k, group, out_bytes, bias),
    )


def gemv4_work(m: int, n: int, k: int, group: int, *, out_bytes: int = 2, bias: bool = False) -> Work:
    """Count the work of kernels/gemv4.cu: 16 columns of a block times 1, 2, 4 or 8 rows, without shared memory.

    Arguments are those of `gemm4_work`.
    """
    rows = next(size for size in (1, 2, 4, 8) if size >= m)
    return Work(rows * 16 * blocks(n, 16) * k, 0, _memory4(m, n, k, group, out_bytes, bias))


def _memory4(m: int, n: int, k: int, group: int, out_bytes: int, bias: bool) -> int:
    scales = 4 * (m + n * blocks(k, group) + (n if bias else 0))
    return m * k + n * k // 2 + scales + out_bytes * m * n


def grouped_work(counts: Sequence[int], n: int, k: int, tile: Tile, *, out_bytes: int = 2, bias: bool = False) -> Work:
    """Count the work of kernels/grouped.cu. The weights of experts without tokens are not read.

    Args:
        counts: Tokens of each expert.
        n: Rows of an expert's weights.
        k: Columns of an expert's weights.
        tile: The tile of a block.
        out_bytes: Bytes per output value.
        bias: Whether there is a bias.
    """
    work = Work(0, 0, 4 * (len(counts) + 1))
    for count in counts:
        if count:
            work += gemm_work(count, n, k, tile, out_bytes=out_bytes, bias=bias)
    return work


def quantize_work(m: int, k: int, *, in_bytes: int = 2, inputs: int = 1, channels: int = 0) -> Work:
    """Count the work of kernels/quantize.cu.

    Args:
        m: Rows.
        k: Columns.
        in_bytes: Bytes per input value.
        inputs: Input values per output value: two for SwiGLU, else one.
        channels: Number of float32 vectors (K,) that are read: a norm's weight and bias.
    """
    return Work(0, 0, m * k * (in_bytes * inputs + 1) + 4 * m + 4 * k * channels)


def dequant_work(n: int, k: int) -> Work:
    """Count the work of kernels/dequant.cu: int8 (n, k) in, 16-bit values out."""
    return Work(0, 0, 3 * n * k + 4 * n)
