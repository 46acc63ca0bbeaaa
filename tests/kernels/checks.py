"""One check a call: draw inputs from a seed, call the launcher, compare every bit with the reference.

Shared by whoever can execute a launch: the host layer, the PTX interpreter and, on a machine that has one, a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haq_lab.int8.cuda.four_bit import pack_blocks
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import LARGE, MEDIUM, SMALL, TILES, TYPE_NAMES, Tile, blocks

from . import reference
from .reference import assert_same_bits

EPS = 1e-5
FOUR_BIT_TILES = (MEDIUM, SMALL)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Draw:
    """Random tensors from one seed, made on the CPU and sent to `device`."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device

    def int8(self, *shape: int) -> Tensor:
        """Full-range values; about one row in four is all extremes, where an inexact sum shows first."""
        values = torch.randint(-127, 128, shape, generator=self._generator, dtype=torch.int8)
        extreme = torch.randint(0, 4, (*shape[:-1], 1), generator=self._generator) == 0
        return torch.where(extreme, torch.where(values < 0, -127, 127).to(torch.int8), values).to(self._device)

    def int4(self, *shape: int) -> Tensor:
        """The same for levels of 4 bits, in [-7, 7]."""
        return torch.div(self.int8(*shape), 17, rounding_mode="trunc")

    def scale(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self._generator) * 1e-2 + 1e-4).to(self._device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype).to(self._device)

    def activations(self, m: int, k: int, dtype: torch.dtype) -> Tensor:
        """Rows of very different size, one of them zero; some values halfway between two steps."""
        x = torch.randn(m, k, generator=self._generator)
        x *= torch.exp2(torch.randint(-6, 7, (m, 1), generator=self._generator))
        x[m // 2] = 0.0
        x[0] = torch.arange(k).remainder(255).sub(127) * 0.5  # scale 0.5: every second value is a tie
        return x.to(dtype).to(self._device)


def check_quantize(
    kernels: Kernels,
    kind: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    *,
    static: bool,
    seed: int,
    device: str = "cpu",
    rotation: int = 1,
) -> None:
    """`kind`: plain, rmsnorm, layernorm or swiglu; `rotation`: block of a rotation before the rounding."""
    draw = Draw(seed, device)
    scale = draw.scale(1) if static else None
    x = draw.activations(m, 2 * k if kind == "swiglu" else k, dtype)
    weight, bias = draw.normal(k), draw.normal(k)
    values = x.cpu().float().numpy()
    if kind == "plain":
        plain = kernels.quantize_rows(x, rotation) if scale is None else kernels.quantize_static(x, scale, rotation)
        actual = plain
    elif kind == "rmsnorm":
        actual = kernels.rmsnorm_quantize(x, weight, EPS, scale, rotation)
        values = reference.rmsnorm(values, weight.cpu().numpy(), EPS)
    elif kind == "layernorm":
        actual = kernels.layernorm_quantize(x, weight, bias, EPS, scale, rotation)
        values = reference.layernorm(values, weight.cpu().numpy(), bias.cpu().numpy(), EPS)
    else:
        actual = kernels.swiglu_quantize(x, scale, rotation)
        values = reference.swiglu(values[:, :k], values[:, k:])
    values = reference.rotate(values, rotation)
    q, scales = reference.quantize(values, None if scale is None else scale.item())
    assert_same_bits(actual[1].cpu(), scales)
    assert_same_bits(actual[0].cpu(), q)


def _on_cpu(*values: Any) -> list[Any]:
    return [value.cpu() if isinstance(value, Tensor) else value for value in values]


def check_product(
    kernels: Kernels,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    seed: int,
    call: str = "gemm",
    tile: Tile | None = None,
    split: int | None = None,
    device: str = "cpu",
) -> None:
    """`call`: gemm, gemv or accumulate (which ignores `dtype` and `bias`)."""
    draw = Draw(seed, device)
    qx, qw, sx, sw = draw.int8(m, k), draw.int8(n, k), draw.scale(m), draw.scale(n)
    b = draw.normal(n) if bias else None
    if call == "accumulate":
        actual = kernels.accumulate(qx, qw, tile=tile, split=split)
        expected = torch.from_numpy(reference.accumulators(qx.cpu(), qw.cpu()))
    else:
        if call == "gemv":
            actual = kernels.gemv(qx, qw, sx, sw, b, dtype)
        else:
            actual = kernels.gemm(qx, qw, sx, sw, b, dtype, tile=tile, split=split)
        on_cpu = _on_cpu(qx, qw, sx, sw, b)
        expected = reference.product(*on_cpu, dtype)
    assert_same_bits(actual.cpu(), expected)


def check_grouped(
    kernels: Kernels,
    counts: list[int],
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    seed: int,
    tile: Tile | None = None,
    device: str = "cpu",
) -> None:
    """`counts`: tokens of each expert, some of them zero."""
    draw = Draw(seed, device)
    offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
    t, e = offsets[-1], len(counts)
    qx, qw, sx, sw = draw.int8(t, k), draw.int8(e, n, k), draw.scale(t), draw.scale(e, n)
    b = draw.normal(e, n) if bias else None
    at = torch.tensor(offsets, dtype=torch.int32, device=device)
    actual = kernels.grouped(qx, qw, at, sx, sw, b, dtype, tile=tile)
    on_cpu = _on_cpu(qx, qw, offsets, sx, sw, b)
    assert_same_bits(actual.cpu(), reference.grouped(*on_cpu, dtype))


def check_product4(
    kernels: Kernels,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    group: int,
    bias: bool,
    seed: int,
    call: str = "gemm",
    tile: Tile | None = None,
    device: str = "cpu",
) -> None:
    """4-bit weights. `call`: gemm or gemv (which ignores `tile`); `group`: columns that share a scale."""
    draw = Draw(seed, device)
    qx, levels, sx, sw = draw.int8(m, k), draw.int4(n, k), draw.scale(m), draw.scale(blocks(k, group), n)
    b = draw.normal(n) if bias else None
    arguments = (qx, pack_blocks(levels), sx, sw, b, dtype, group)
    actual = kernels.four_bit.gemv(*arguments) if call == "gemv" else kernels.four_bit.gemm(*arguments, tile=tile)
    on_cpu = _on_cpu(qx, levels, sx, sw, b)
    assert_same_bits(actual.cpu(), reference.product4(*on_cpu, dtype, group))


def check_grouped4(
    kernels: Kernels,
    counts: list[int],
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    group: int,
    bias: bool,
    seed: int,
    tile: Tile | None = None,
    device: str = "cpu",
) -> None:
    """4-bit weights of experts. `counts`: tokens of each expert, some of them zero."""
    draw = Draw(seed, device)
    offsets = [sum(counts[:e]) for e in range(len(counts) + 1)]
    t, e = offsets[-1], len(counts)
    qx, levels, sx, sw = draw.int8(t, k), draw.int4(e, n, k), draw.scale(t), draw.scale(e, blocks(k, group), n)
    b = draw.normal(e, n) if bias else None
    at = torch.tensor(offsets, dtype=torch.int32, device=device)
    packed = pack_blocks(levels.flatten(0, 1)).view(e, n, -1)
    actual = kernels.four_bit.grouped(qx, packed, at, sx, sw, b, dtype, group, tile=tile)
    on_cpu = _on_cpu(qx, levels, offsets, sx, sw, b)
    product = partial(reference.product4, group=group)
    assert_same_bits(actual.cpu(), reference.grouped(*on_cpu, dtype, product))


def check_dequant(kernels: Kernels, n: int, k: int, dtype: torch.dtype, *, seed: int, device: str = "cpu") -> None:
    """Weights back to a 16-bit float."""
    draw = Draw(seed, device)
    qw, sw = draw.int8(n, k), draw.scale(n)
    assert_same_bits(kernels.dequant(qw, sw, dtype).cpu(), reference.dequant(qw.cpu(), sw.cpu(), dtype))


Check = Callable[[Kernels, str], None]  # the launcher, the device of its tensors


def beyond(tile: Tile | None) -> int:
    """How far a check goes past one tile: a little, or, where a tile is slow to interpret, not quite there."""
    return -3 if tile == LARGE else 3


def _quantize(kind: str, dtype: torch.dtype, k: int = 1040, rotation: int = 1) -> Check:
    def check(kernels: Kernels, device: str) -> None:
        check_quantize(kernels, kind, 3, k, dtype, static=False, seed=1, device=device, rotation=rotation)

    return check


def _product(call: str, dtype: torch.dtype, m: int, tile: Tile | None, split: int | None) -> Check:
    def check(kernels: Kernels, device: str) -> None:
        n = (tile.columns if tile else 8) + beyond(tile)
        check_product(kernels, m, n, 336, dtype, bias=True, seed=1, call=call, tile=tile, split=split, device=device)

    return check


def _grouped(dtype: torch.dtype, tile: Tile) -> Check:
    def check(kernels: Kernels, device: str) -> None:
        counts = [2, 0, tile.rows + beyond(tile)]
        check_grouped(
            kernels, counts, tile.columns + beyond(tile), 208, dtype, bias=True, seed=1, tile=tile, device=device
        )

    return check


def _product4(call: str, dtype: torch.dtype, m: int, tile: Tile | None) -> Check:
    def check(kernels: Kernels, device: str) -> None:
        n = (tile.columns if tile else 16) + beyond(tile)
        for group in (64, 352):
            check_product4(
                kernels, m, n, 352, dtype, group=group, bias=True, seed=1, call=call, tile=tile, device=device
            )

    return check


def _grouped4(dtype: torch.dtype, tile: Tile) -> Check:
    def check(kernels: Kernels, device: str) -> None:
        counts, n = [2, 0, tile.rows + beyond(tile)], tile.columns + beyond(tile)
        check_grouped4(kernels, counts, n, 224, dtype, group=128, bias=True, seed=1, tile=tile, device=device)

    return check


def _dequant(dtype: torch.dtype) -> Check:
    return lambda kernels, device: check_dequant(kernels, 3, 2192, dtype, seed=1, device=device)


def every_kernel() -> dict[str, Check]:
    """A check for each kernel there is, by its name."""
    checks: dict[str, Check] = {}
    for dtype in FLOATS:
        name = TYPE_NAMES[dtype]
        for kind in ("plain", "rmsnorm", "layernorm", "swiglu"):
            checks[f"{kind}_quantize_{name}".removeprefix("plain_")] = _quantize(kind, dtype)
            checks[f"{kind}_rotate_quantize_{name}".removeprefix("plain_")] = _quantize(kind, dtype, 512, 512)
        for tile in TILES:
            checks[f"gemm_{tile.name}_{name}"] = _product("gemm", dtype, tile.rows + beyond(tile), tile, 1)
            checks[f"grouped_{tile.name}_{name}"] = _grouped(dtype, tile)
        for rows in (1, 2, 4, 8):
            checks[f"gemv_{rows}_{name}"] = _product("gemv", dtype, rows - (rows > 2), None, None)
            checks[f"gemv4_{rows}_{name}"] = _product4("gemv", dtype, rows - (rows > 2), None)
        for tile in FOUR_BIT_TILES:
            checks[f"gemm4_{tile.name}_{name}"] = _product4("gemm", dtype, tile.rows + beyond(tile), tile)
            checks[f"grouped4_{tile.name}_{name}"] = _grouped4(dtype, tile)
        checks[f"finish_{name}"] = _product("gemm", dtype, 3, SMALL, 2)
        if dtype != torch.float32:
            checks[f"dequant_{name}"] = _dequant(dtype)
    for tile in TILES:
        checks[f"gemm_{tile.name}_i32"] = _product("accumulate", torch.int32, tile.rows + beyond(tile), tile, 2)
    return checks
