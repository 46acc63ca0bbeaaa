"""Multiply by 4-bit weights on a GPU: their layout, and the calls of kernels/gemv4.cu, gemm4.cu and grouped4.cu.

    packed = pack_blocks(levels)                                         # int8 (N, K) -> uint8 (N, K / 2)
    y = gpu.four_bit.gemm(qx, packed, sx, scales, bias, x.dtype, 64)     # scales (groups, N) -> (M, N)

A row is blocks of 32 columns in 16 bytes. Byte i of a block holds column i in its lower and column 16 + i in its upper
four bits, both in two's complement. Four such bytes are two words of int8 for dp4a or mma, without a permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.cuda.launch import (
    MEDIUM,
    SMALL,
    Launch,
    Run,
    Tile,
    aligned,
    blocks,
    check,
    check_k,
    gemv_rows,
    most_row_tiles,
    padded,
    type_name,
)
from haq_lab.int8.weight_format import GROUPS

BLOCK = 32  # columns


def pack_blocks(levels: Tensor) -> Tensor:
    """Pack levels in [-8, 7], int8 (n, k), in blocks of 32 columns: uint8 (n, 16 ceil(k / 32)). Missing levels are 0.

    Example:
        >>> pack_blocks(torch.tensor([[-7, 7] + 14 * [0] + [1]], dtype=torch.int8))[0, :3].tolist()
        [25, 7, 0]
    """
    halves = padded(levels, BLOCK).view(torch.uint8).view(len(levels), -1, 2, BLOCK // 2)
    return aligned((halves[:, :, 0] & 15 | halves[:, :, 1] << 4).flatten(1))


def unpack_blocks(packed: Tensor, columns: int) -> Tensor:
    """Return the levels, int8 (n, columns), of packed weights, uint8 (n, 16 ceil(columns / 32))."""
    bytes_of_blocks = packed.view(torch.int8).view(len(packed), -1, BLOCK // 2)
    halves = torch.stack((bytes_of_blocks << 4, bytes_of_blocks), dim=2) >> 4  # the shift to the right keeps the sign
    return halves.flatten(1)[:, :columns].contiguous()


class FourBitKernels:
    """The W4A8 kernels of one device. All methods raise ValueError for tensors other than documented.

    Args:
        run: Executes a launch.
        architecture: Compute capability of the device, such as 86 for 8.6.
    """

    def __init__(self, run: Run, architecture: int) -> None:
        self._run = run
        self._architecture = architecture

    def gemv(
        self,
        qx: Tensor,
        packed: Tensor,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        group: int,
    ) -> Tensor:
        """Compute the same as `gemm` for at most eight rows. It is limited by the bandwidth of reading the weights."""
        m, n, k = _check_product(qx, packed, sx, sw, bias, group)
        rows = gemv_rows(m)
        out = torch.empty(m, n, dtype=out_dtype, device=qx.device)
        if out.numel():
            args = (qx, packed, sx, sw, bias, out, m, n, k, min(group, k))
            self._run(Launch("gemv4", f"gemv4_{rows}_{type_name(out_dtype)}", (blocks(n, 16), 1, 1), 128, 0, args))
        return out

    def gemm(
        self,
        qx: Tensor,
        packed: Tensor,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        group: int,
        *,
        tile: Tile | None = None,
    ) -> Tensor:
        """Multiply by 4-bit weights, as `haq_lab.int8.numerics` defines it.

        Args:
            qx: int8 (M, K), where K is a multiple of 32.
            packed: Result of `pack_blocks`, uint8 (N, K / 2).
            sx: float32 (M,).
            sw: float32 (groups, N).
            bias: float32 (N,), or None.
            out_dtype: Type of the result.
            group: Columns that share a scale: 128, 64, 32, or at least K. The last group may be shorter.
            tile: MEDIUM or SMALL; chosen by the shape if None. The result is bit-identical for both.

        Returns:
            (M, N) of `out_dtype`.
        """
        m, n, k = _check_product(qx, packed, sx, sw, bias, group)
        tile = tile or (SMALL if m <= 32 else MEDIUM)
        out = torch.empty(m, n, dtype=out_dtype, device=qx.device)
        if out.numel():
            grid = (blocks(m, tile.rows), blocks(n, tile.columns), 1)
            args = (qx, packed, sx, sw, bias, out, m, n, k, min(group, k))
            name, shared = f"gemm4_{tile.name}_{type_name(out_dtype)}", tile.shared(self._architecture, 4)
            self._run(Launch("gemm4", name, grid, tile.threads, shared, args))
        return out

    def grouped(
        self,
        qx: Tensor,
        packed: Tensor,
        offsets: Tensor,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        group: int,
        *,
        tile: Tile | None = None,
    ) -> Tensor:
        """Compute the products of all experts in one launch.

        Args:
            qx: Tokens sorted by expert, int8 (T, K), where K is a multiple of 32.
            packed: Packed weights of the experts, uint8 (E, N, K / 2).
            offsets: int32 (E + 1,) on the device. Expert e has the rows from offsets[e] up to offsets[e + 1].
            sx: float32 (T,).
            sw: float32 (E, groups, N).
            bias: float32 (E, N), or None.
            out_dtype: A floating type.
            group: As for `gemm`.
            tile: MEDIUM or SMALL; chosen by the average number of tokens per expert if None.

        Returns:
            (T, N) of `out_dtype`, with rows in the order of qx.
        """
        (t, k), (e, n, _) = qx.shape, packed.shape
        _check(k, group)
        check("qx", qx, (t, k), torch.int8)
        check("packed", packed, (e, n, k // 2), torch.uint8)
        check("offsets", offsets, (e + 1,), torch.int32)
        check("sx", sx, (t,), torch.float32)
        check("sw", sw, (e, blocks(k, group), n), torch.float32)
        if bias is not None:
            check("bias", bias, (e, n), torch.float32)
        out = torch.empty(t, n, dtype=out_dtype, device=qx.device)
        if out.numel():
            tile = tile or (SMALL if t <= 32 * e else MEDIUM)
            args = (qx, packed, offsets, sx, sw, bias, out, e, n, k, min(group, k))
            grid = (most_row_tiles(t, e, tile), blocks(n, tile.columns), 1)
            name, shared = f"grouped4_{tile.name}_{type_name(out_dtype)}", tile.shared(self._architecture, 4)
            self._run(Launch("grouped4", name, grid, tile.threads, shared, args))
        return out


def _check(k: int, group: int) -> None:
    check_k(k, BLOCK)
    if group not in GROUPS and group < k:
        raise ValueError(f"group: {group} is not one of {', '.join(map(str, GROUPS))}, nor a whole row of {k} columns.")


def _check_product(
    qx: Tensor, packed: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None, group: int
) -> tuple[int, int, int]:
    (m, k), n = qx.shape, packed.shape[0]
    _check(k, group)
    check("qx", qx, (m, k), torch.int8)
    check("packed", packed, (n, k // 2), torch.uint8)
    check("sx", sx, (m,), torch.float32)
    check("sw", sw, (blocks(k, group), n), torch.float32)
    if bias is not None:
        check("bias", bias, (n,), torch.float32)
    return m, n, k
