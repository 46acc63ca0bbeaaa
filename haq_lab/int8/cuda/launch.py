"""Define kernel launches as plain data, and choose their tiles. This module needs no GPU.

A launch names its kernel, grid, shared memory and arguments. CuPy runs it on a GPU, and the tests run the same object
with a C++ host layer or a PTX interpreter on CPU tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from haq_lab.int8.cuda.sources import module_source

MODULES = ("quantize", "gemm", "gemv", "grouped", "gemm4", "gemv4", "grouped4", "dequant")
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}
ALIGNMENT = 16  # bytes, because the kernels load 16 bytes at once
K_MULTIPLE = 16
STEP = 64  # bytes of K per step of the tiled product, as in kernels/tile.cuh
GEMV_ROWS = 8  # largest number of rows of a gemv kernel
MAX_K = (2**31 - 1) // 127**2  # 133,144; the sums of a larger K could overflow int32

Argument = Tensor | int | float | None  # passed as pointer, int32, float32 or null pointer


@dataclass(frozen=True)
class Launch:
    """One kernel call.

    Attributes:
        module: Name of the source, `kernels/<module>.cu`.
        kernel: Name of the kernel in it.
        grid: Number of blocks in x, y and z.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory per block.
        args: Arguments in the kernel's order. Tensors are passed as pointers.
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
    """The part of a product that one block computes, as in kernels/tile.cuh.

    Attributes:
        rows: Rows of the part.
        columns: Columns of the part.
        threads: Threads per block.
        stages: Number of shared-memory buffers for cp.async.
        min_blocks: Blocks that must fit on one multiprocessor at once.
    """

    rows: int
    columns: int
    threads: int
    stages: int
    min_blocks: int

    @property
    def name(self) -> str:
        """The tile's part of a kernel's name, such as `64x64`."""
        return f"{self.rows}x{self.columns}"

    def shared(self, architecture: int, weight_bits: int = 8) -> int:
        """Return the bytes of shared memory per block. sm_75 has no cp.async and uses only two buffers."""
        stage = (self.rows + self.columns * weight_bits // 8) * STEP
        return (2 if architecture < 80 else self.stages) * stage


LARGE = Tile(128, 128, threads=256, stages=3, min_blocks=2)
MEDIUM = Tile(64, 64, threads=128, stages=4, min_blocks=3)
SMALL = Tile(16, 64, threads=128, stages=4, min_blocks=4)
TILES = (LARGE, MEDIUM, SMALL)


def blocks(length: int, size: int) -> int:
    """Return how many blocks of `size` cover `length`."""
    return -(-length // size)


def gemv_rows(m: int) -> int:
    """Return for how many rows the gemv kernel for m rows is compiled: 1, 2, 4 or 8. ValueError if m is larger.

    Example:
        >>> gemv_rows(3)
        4
    """
    if m > GEMV_ROWS:
        raise ValueError(f"gemv takes at most {GEMV_ROWS} rows, not {m}. Use gemm.")
    return next(size for size in (1, 2, 4, GEMV_ROWS) if size >= m)


def choose_tile(m: int, n: int, multiprocessors: int) -> Tile:
    """Choose the largest tile that gives each multiprocessor a block, or the flat tile for at most 32 rows."""
    if m <= 32:
        return SMALL
    return LARGE if blocks(m, 128) * blocks(n, 128) >= multiprocessors else MEDIUM


def choose_split(m: int, n: int, k: int, tile: Tile, multiprocessors: int) -> int:
    """Choose into how many parts K is split, so that a small product fills the GPU. Each has at least eight steps."""
    tiles = blocks(m, tile.rows) * blocks(n, tile.columns)
    return max(1, min(tile.min_blocks * multiprocessors // max(1, tiles), k // (8 * STEP)))


def k_part(k: int, split: int) -> int:
    """Return the columns of each of `split` parts of K, a multiple of a step."""
    return blocks(blocks(k, STEP), split) * STEP


def most_row_tiles(tokens: int, experts: int, tile: Tile) -> int:
    """Return how many tiles of rows the experts can need: as if each expert's last tile had a single row."""
    return (tokens + min(experts, tokens) * (tile.rows - 1)) // tile.rows


def staged_groups(k: int, shared_limit: int) -> int:
    """Return how many groups of eight columns of a row fit in shared memory (kernels/quantize.cu)."""
    return min(k // 8, (shared_limit - 128) // 32)


def staged_groups_rotated(k: int, shared_limit: int) -> int:
    """Return the same for a row that is rotated: all of its groups, or those of whole warps."""
    groups = staged_groups(k, shared_limit)
    return groups if groups == k // 8 else groups // 32 * 32


def kernel_names(module: str, folder: Path | None = None) -> list[str]:
    """Return the names of the kernels in `<module>.cu`, from its one-line instantiations."""
    return re.findall(r"^[A-Z_]+_KERNEL\((\w+),", module_source(module, folder), re.MULTILINE)


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of it if it is not contiguous or not aligned to 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def padded(x: Tensor, multiple: int = K_MULTIPLE) -> Tensor:
    """Return x (..., K), aligned, with zero columns up to a multiple. This is x itself if nothing changes.

    Example:
        >>> padded(torch.ones(2, 17)).shape
        torch.Size([2, 32])
    """
    missing = -x.shape[-1] % multiple
    return aligned(torch.nn.functional.pad(x, (0, missing)) if missing else x)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError if a kernel cannot take this tensor as its argument `name`."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not {shape} {dtype}.")
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must be contiguous and aligned to {ALIGNMENT} bytes. Use `aligned`.")


def check_k(k: int, multiple: int = K_MULTIPLE) -> None:
    """Raise ValueError if rows of k columns are not padded to the kernels' multiple, or too long."""
    if k % multiple or not 0 < k <= MAX_K:
        raise ValueError(f"K: {k} is not a multiple of {multiple} of at most {MAX_K}. Use `padded`.")


def type_name(dtype: torch.dtype) -> str:
    """Return the part of a kernel's name that says its type of floats."""
    if dtype not in TYPE_NAMES:
        raise ValueError(f"{dtype} is not supported. Choose one of {', '.join(map(str, TYPE_NAMES))}.")
    return TYPE_NAMES[dtype]
