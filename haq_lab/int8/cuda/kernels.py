"""Check the arguments of the CUDA kernels, allocate their outputs and launch them.

    gpu = haq_lab.int8.cuda.device.kernels()
    qx, sx = gpu.quantize_rows(x)                  # x (M, K) float16 -> int8 (M, K), float32 (M,)
    y = gpu.gemm(qx, qw, sx, sw, bias, x.dtype)    # qw (N, K) int8, sw (N,) -> (M, N)

Kernels get the addresses of torch tensors, copy nothing, and run on torch's current stream. Tensors must be contiguous
and aligned to 16 bytes (`aligned`), and K must be a multiple of 16. For another K the caller adds zero columns
(`padded`), which change neither a sum of products nor a row's maximum. Norms divide by K, so their K must be a multiple
of 16 without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.cuda.four_bit import FourBitKernels
from haq_lab.int8.cuda.launch import (
    TILES,
    Launch,
    Run,
    Tile,
    blocks,
    check,
    check_k,
    choose_split,
    choose_tile,
    gemv_rows,
    k_part,
    most_row_tiles,
    staged_groups,
    staged_groups_rotated,
    type_name,
)
from haq_lab.int8.rotation import NO_ROTATION, scale_of_block

WARP_COLUMNS = 256  # largest block that is rotated within a warp; a larger one needs the whole row in shared memory


class Kernels:
    """The W8A8 kernels of one device.

    All methods raise ValueError if a tensor has another shape, type or layout than documented.

    Args:
        run: Executes a launch.
        architecture: Compute capability of the device, such as 86 for 8.6.
        multiprocessors: Their number on the device. It determines tiles and splits, and never changes a result.
        shared_limit: Largest number of bytes of shared memory per block.

    Attributes:
        four_bit: The products with 4-bit weights.
    """

    def __init__(self, run: Run, *, architecture: int, multiprocessors: int, shared_limit: int) -> None:
        self._run = run
        self._architecture = architecture
        self._multiprocessors = multiprocessors
        self._shared_limit = shared_limit
        self.four_bit = FourBitKernels(run, architecture)

    def can_rotate(self, k: int, rotation: int) -> bool:
        """Return whether the kernels can rotate rows of k columns in blocks of `rotation` columns."""
        return rotation <= WARP_COLUMNS or staged_groups(k, self._shared_limit) == k // 8

    def quantize_rows(self, x: Tensor, rotation: int = NO_ROTATION) -> tuple[Tensor, Tensor]:
        """Quantise x (M, K) with one scale per row. Returns int8 (M, K) and float32 scales (M,).

        Args:
            x: (M, K), floating.
            rotation: Block of a rotation before it (`haq_lab.int8.rotation`), for which `can_rotate` is True; 1 for
                none.
        """
        return self._quantize("quantize", x.shape[0], x.shape[1], x, (x,), (), None, rotation)

    def quantize_static(self, x: Tensor, scale: Tensor, rotation: int = NO_ROTATION) -> tuple[Tensor, Tensor]:
        """Quantise x (M, K) with one float32 scale (1,). Returns int8 (M, K) and that scale for each row (M,)."""
        return self._quantize("quantize", x.shape[0], x.shape[1], x, (x,), (), scale, rotation)

    def rmsnorm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None, rotation: int = NO_ROTATION
    ) -> tuple[Tensor, Tensor]:
        """Apply RMSNorm and quantise.

        Args:
            x: (M, K), floating.
            weight: float32 (K,).
            eps: The norm's epsilon.
            scale: Static scale, float32 (1,); None for one scale per row.
            rotation: As for `quantize_rows`.

        Returns:
            int8 (M, K) and float32 scales (M,).
        """
        check("weight", weight, (x.shape[1],), torch.float32)
        extra = (weight, float(eps))
        return self._quantize("rmsnorm_quantize", x.shape[0], x.shape[1], x, (x, *extra), (), scale, rotation)

    def layernorm_quantize(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        """Apply LayerNorm and quantise. Like `rmsnorm_quantize`, with a float32 `bias` (K,)."""
        check("weight", weight, (x.shape[1],), torch.float32)
        check("bias", bias, (x.shape[1],), torch.float32)
        extra = (weight, bias, float(eps))
        return self._quantize("layernorm_quantize", x.shape[0], x.shape[1], x, (x, *extra), (), scale, rotation)

    def swiglu_quantize(
        self, gate_up: Tensor, scale: Tensor | None = None, rotation: int = NO_ROTATION
    ) -> tuple[Tensor, Tensor]:
        """Compute silu(gate) * up and quantise it.

        Args:
            gate_up: (M, 2 K): gate in the first K columns, up in the others.
            scale: Static scale, float32 (1,); None for one scale per row.
            rotation: As for `quantize_rows`.

        Returns:
            int8 (M, K) and float32 scales (M,).
        """
        m, k = gate_up.shape[0], gate_up.shape[1] // 2
        if gate_up.shape[1] % 2:
            raise ValueError(f"gate_up: {gate_up.shape[1]} columns are not an even number.")
        halves = (gate_up[:, :k], gate_up[:, k:])
        return self._quantize("swiglu_quantize", m, k, gate_up, halves, (2 * k,), scale, rotation)

    def _quantize(
        self,
        kernel: str,
        m: int,
        k: int,
        x: Tensor,
        inputs: tuple[Tensor | float, ...],
        strides: tuple[int, ...],
        scale: Tensor | None,
        rotation: int,
    ) -> tuple[Tensor, Tensor]:
        check("x", x, (m, x.shape[1]), x.dtype)
        check_k(k)
        if k % rotation or not self.can_rotate(k, rotation):
            raise ValueError(f"rotation: the kernels cannot rotate {k} columns in blocks of {rotation}.")
        if scale is not None:
            check("scale", scale, (1,), torch.float32)
        q = torch.empty(m, k, dtype=torch.int8, device=x.device)
        scales = torch.empty(m, dtype=torch.float32, device=x.device)
        args: tuple[Tensor | float | None, ...] = (*inputs, scale, q, scales, *strides, k)
        if rotation != NO_ROTATION:
            staged = staged_groups_rotated(k, self._shared_limit)
            kernel, args = kernel.replace("quantize", "rotate_quantize"), (*args, staged, rotation)
            args = (*args, scale_of_block(rotation))
        else:
            # With a static scale and no norm, each row is read only once, so it is not staged in shared memory.
            once = scale is not None and kernel in ("quantize", "swiglu_quantize")
            staged = 0 if once else staged_groups(k, self._shared_limit)
            args = (*args, staged)
        if m:
            name = f"{kernel}_{type_name(x.dtype)}"
            self._run(Launch("quantize", name, (m, 1, 1), 128, 128 + 32 * staged, args))
        return q, scales

    def gemm(
        self,
        qx: Tensor,
        qw: Tensor,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        *,
        tile: Tile | None = None,
        split: int | None = None,
    ) -> Tensor:
        """Compute (qx . qw^T) * sx * sw + bias.

        Args:
            qx: int8 (M, K).
            qw: int8 (N, K).
            sx: float32 (M,).
            sw: float32 (N,).
            bias: float32 (N,), or None.
            out_dtype: Type of the result.
            tile: Tile of a block; chosen by the shape if None. The result is bit-identical for every tile.
            split: Parts into which K is split; chosen by the shape if None. The result is bit-identical for every
                split.

        Returns:
            (M, N) of `out_dtype`.
        """
        m, n, _ = self._check_product(qx, qw, sx, sw, bias)
        name = type_name(out_dtype)
        tile = tile or choose_tile(m, n, self._multiprocessors)
        split = split or choose_split(m, n, qx.shape[1], tile, self._multiprocessors)
        out = torch.empty(m, n, dtype=out_dtype, device=qx.device)
        if not out.numel():
            return out
        if split == 1:
            self._gemm(qx, qw, sx, sw, bias, out, name, tile, 1)
        else:
            sums = torch.zeros(m, n, dtype=torch.int32, device=qx.device)
            self._gemm(qx, qw, sx, sw, None, sums, "i32", tile, split)
            args = (sums, sx, sw, bias, out, n)
            self._run(Launch("gemm", f"finish_{name}", (blocks(n, 128), m, 1), 128, 0, args))
        return out

    def accumulate(self, qx: Tensor, qw: Tensor, *, tile: Tile | None = None, split: int | None = None) -> Tensor:
        """Multiply int8 (M, K) by int8 (N, K) transposed. Returns the exact int32 sums (M, N)."""
        m, n, k = self._check_product(qx, qw, None, None, None)
        tile = tile or choose_tile(m, n, self._multiprocessors)
        split = split or choose_split(m, n, k, tile, self._multiprocessors)
        sums = (torch.empty if split == 1 else torch.zeros)(m, n, dtype=torch.int32, device=qx.device)
        if sums.numel():
            self._gemm(qx, qw, None, None, None, sums, "i32", tile, split)
        return sums

    def _gemm(
        self,
        qx: Tensor,
        qw: Tensor,
        sx: Tensor | None,
        sw: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        name: str,
        tile: Tile,
        split: int,
    ) -> None:
        (m, k), n = qx.shape, qw.shape[0]
        part = k_part(k, split)
        grid = (blocks(m, tile.rows), blocks(n, tile.columns), blocks(k, part))
        args = (qx, qw, sx, sw, bias, out, m, n, k, part)
        shared = tile.shared(self._architecture)
        self._run(Launch("gemm", f"gemm_{tile.name}_{name}", grid, tile.threads, shared, args))

    def gemv(
        self, qx: Tensor, qw: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """Compute the same as `gemm` for at most eight rows. It is limited by the bandwidth of reading the weights."""
        m, n, k = self._check_product(qx, qw, sx, sw, bias)
        rows = gemv_rows(m)
        out = torch.empty(m, n, dtype=out_dtype, device=qx.device)
        if out.numel():
            args = (qx, qw, sx, sw, bias, out, m, n, k)
            self._run(Launch("gemv", f"gemv_{rows}_{type_name(out_dtype)}", (blocks(n, 8), 1, 1), 128, 0, args))
        return out

    def grouped(
        self,
        qx: Tensor,
        qw: Tensor,
        offsets: Tensor,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        *,
        tile: Tile | None = None,
    ) -> Tensor:
        """Compute the products of all experts in one launch.

        Args:
            qx: Tokens sorted by expert, int8 (T, K).
            qw: int8 (E, N, K).
            offsets: int32 (E + 1,) on the device. Expert e has the rows from offsets[e] up to offsets[e + 1].
            sx: float32 (T,).
            sw: float32 (E, N).
            bias: float32 (E, N), or None.
            out_dtype: A floating type.
            tile: Tile of a block; chosen by the average number of tokens per expert if None.

        Returns:
            (T, N) of `out_dtype`, with rows in the order of qx.
        """
        (t, k), (e, n, _) = qx.shape, qw.shape
        check_k(k)
        check("qx", qx, (t, k), torch.int8)
        check("qw", qw, (e, n, k), torch.int8)
        check("offsets", offsets, (e + 1,), torch.int32)
        check("sx", sx, (t,), torch.float32)
        check("sw", sw, (e, n), torch.float32)
        if bias is not None:
            check("bias", bias, (e, n), torch.float32)
        out = torch.empty(t, n, dtype=out_dtype, device=qx.device)
        if out.numel():
            tile = tile or TILES[2 if t <= 32 * e else 1 if t <= 128 * e else 0]
            grid = (most_row_tiles(t, e, tile), blocks(n, tile.columns), 1)
            args = (qx, qw, offsets, sx, sw, bias, out, e, n, k)
            name = f"grouped_{tile.name}_{type_name(out_dtype)}"
            self._run(Launch("grouped", name, grid, tile.threads, tile.shared(self._architecture), args))
        return out

    def dequant(self, qw: Tensor, sw: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Dequantise int8 (N, K) with float32 scales (N,). Returns float16 or bfloat16 (N, K)."""
        n, k = qw.shape
        check_k(k)
        check("qw", qw, (n, k), torch.int8)
        check("sw", sw, (n,), torch.float32)
        out = torch.empty(n, k, dtype=out_dtype, device=qw.device)
        if n:
            name = f"dequant_{type_name(out_dtype)}"
            self._run(Launch("dequant", name, (n, blocks(k, 2048), 1), 128, 0, (qw, sw, out, k)))
        return out

    def _check_product(
        self, qx: Tensor, qw: Tensor, sx: Tensor | None, sw: Tensor | None, bias: Tensor | None
    ) -> tuple[int, int, int]:
        (m, k), n = qx.shape, qw.shape[0]
        check_k(k)
        check("qx", qx, (m, k), torch.int8)
        check("qw", qw, (n, k), torch.int8)
        for name, tensor, length in (("sx", sx, m), ("sw", sw, n), ("bias", bias, n)):
            if tensor is not None:
                check(name, tensor, (length,), torch.float32)
        return m, n, k
