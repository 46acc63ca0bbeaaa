"""Kernel launches as plain data, and the choice of tiles: everything about a call that needs no GPU to decide.

A launch names its kernel, grid, shared memory and arguments; whoever executes it (a GPU through CuPy, the host layer,
the PTX interpreter) takes the same object. So the tests run the launcher itself, on tensors in the CPU's memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from haq_lab.int8.cuda.sources import module_source

MODULES = ("quantize", "gemm", "gemv", "grouped", "dequant")
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}
STEP = 64  # bytes of K a step of the tiled product, as in kernels/tile.cuh
MAX_K = (2**31 - 1) // 127**2  # 133,144: beyond it a sum of products could leave int32

Argument = Tensor | int | float | None  # a pointer, an int32, a float32, a null pointer


@dataclass(frozen=True)
class Launch:
    """One kernel call.

    Attributes:
        module: The source, `kernels/<module>.cu`.
        kernel: Its name there.
        grid: Blocks in x, y, z.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory.
        args: In the kernel's order; tensors are passed as pointers.
    """

    module: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    args: tuple[Argument, ...]


Run = Callable[[Launch], None]


@dataclass(frozen=True)
class Tile:
    """A block's part of a product: `rows` x `columns`, as in kernels/tile.cuh."""

    rows: int
    columns: int
    threads: int
    stages: int
    min_blocks: int  # blocks a multiprocessor shall hold at once

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"

    def shared(self, architecture: int) -> int:
        """Bytes of shared memory: a ring of buffers, of two only where there is no cp.async (sm_75)."""
        return (2 if architecture < 80 else self.stages) * (self.rows + self.columns) * STEP


LARGE = Tile(128, 128, threads=256, stages=3, min_blocks=2)
MEDIUM = Tile(64, 64, threads=128, stages=4, min_blocks=3)
SMALL = Tile(16, 64, threads=128, stages=4, min_blocks=4)
TILES = (LARGE, MEDIUM, SMALL)


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` cover `length`."""
    return -(-length // size)


def choose_tile(m: int, n: int, multiprocessors: int) -> Tile:
    """The largest tile that still gives every multiprocessor a block; few rows take the flat one."""
    if m <= 32:
        return SMALL
    return LARGE if blocks(m, 128) * blocks(n, 128) >= multiprocessors else MEDIUM


def choose_split(m: int, n: int, k: int, tile: Tile, multiprocessors: int) -> int:
    """Parts of K, so that a small product fills the GPU; each keeps at least eight steps."""
    tiles = blocks(m, tile.rows) * blocks(n, tile.columns)
    return max(1, min(tile.min_blocks * multiprocessors // max(1, tiles), k // (8 * STEP)))


def k_part(k: int, split: int) -> int:
    """Columns of K in each of `split` parts: whole steps."""
    return blocks(blocks(k, STEP), split) * STEP


def staged_groups(k: int, shared_limit: int) -> int:
    """How many groups of eight columns of a row fit in shared memory (kernels/quantize.cu)."""
    return min(k // 8, (shared_limit - 128) // 32)


def kernel_names(module: str, folder: Path | None = None) -> list[str]:
    """The kernels that `<module>.cu` defines, by its one-line instantiations."""
    return re.findall(r"^[A-Z_]+_KERNEL\((\w+),", module_source(module, folder), re.MULTILINE)
