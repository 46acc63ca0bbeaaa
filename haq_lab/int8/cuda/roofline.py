"""The least time a call can take on a GPU: its operations at peak rate or its bytes at full bandwidth.

Operations and bytes are counted as the kernels' loops do them, padding of tiles included; the host layer counts what
really ran, and the tests hold one against the other. Time is a bound, never a prediction.

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
    """What one call does.

    Attributes:
        multiplies: int8 multiply-adds executed, those on padding included.
        copied: Bytes brought from global to shared memory, repeated reads included (most of them hit the L2 cache).
        memory: Bytes that must cross to or from device memory at least once.
    """

    multiplies: int
    copied: int
    memory: int

    def __add__(self, other: Work) -> Work:
        return Work(self.multiplies + other.multiplies, self.copied + other.copied, self.memory + other.memory)


def least_seconds(work: Work, hardware: Hardware) -> float:
    """The larger of the two bounds."""
    return max(2 * work.multiplies / (hardware.int8_tops * 1e12), work.memory / (hardware.bandwidth_gbs * 1e9))


def gemm_work(m: int, n: int, k: int, tile: Tile, *, split: int = 1, out_bytes: int = 2, bias: bool = False) -> Work:
    """kernels/gemm.cu: every tile takes steps of 64 columns; each row of x is read once per tile column, and so on.

    With split K the int32 sums are zeroed, added to (read and written) and read once more.
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
    """kernels/gemv.cu: pairs of columns times 1, 2, 4 or 8 rows; nothing goes through shared memory."""
    rows = next(size for size in (1, 2, 4, 8) if size >= m)
    memory = m * k + n * k + 4 * (m + n) + (4 * n if bias else 0) + out_bytes * m * n
    return Work(multiplies=rows * 2 * blocks(n, 2) * k, copied=0, memory=memory)


def grouped_work(counts: Sequence[int], n: int, k: int, tile: Tile, *, out_bytes: int = 2, bias: bool = False) -> Work:
    """kernels/grouped.cu: a product for each expert that has tokens; the weights of the others are not read."""
    work = Work(0, 0, 4 * (len(counts) + 1))
    for count in counts:
        if count:
            work += gemm_work(count, n, k, tile, out_bytes=out_bytes, bias=bias)
    return work


def quantize_work(m: int, k: int, *, in_bytes: int = 2, inputs: int = 1, channels: int = 0) -> Work:
    """kernels/quantize.cu: `inputs` rows in (two for SwiGLU), int8 and a scale out, `channels` float32 vectors (K,)."""
    return Work(0, 0, m * k * (in_bytes * inputs + 1) + 4 * m + 4 * k * channels)


def dequant_work(n: int, k: int) -> Work:
    """kernels/dequant.cu: int8 in, 16 bits out."""
    return Work(0, 0, 3 * n * k + 4 * n)
