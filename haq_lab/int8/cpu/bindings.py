"""INT8 products on the CPU by our own C++ kernels (`kernels/cpu`), on torch tensors and without copies.

    packed = native.pack(weight)                              # (N, K) int8, once
    y = native.linear(x, packed, weight_scale, bias, None)    # (M, K) float32 or bfloat16 -> (M, N)

Quantisation of the rows, the exact int8 product and the epilogue `(acc * sx[m]) * sw[n] + b[n]` are one call.
For q/k/v or gate/up, `pack([wq, wk, wv])` makes one matrix: the rows are quantised once and the outputs lie
side by side. The instruction set is the best that the CPU has; `HAQ_LAB_ISA` or `forced_isa` asks for a lower
one. All of them, and the reference backend, agree bit for bit.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from haq_lab.int8.cpu.build import BuildError, build
from haq_lab.utils.errors import UserError, nearest

PANEL, GROUP = 32, 4  # columns whose weights lie together, and consecutive k of each (kernels/cpu/kernels.h)
_INT32, _INT8 = 0, 3
_FLOAT_KINDS = {torch.float32: 1, torch.bfloat16: 2}
_HALF_KINDS = {torch.bfloat16: 2, torch.float16: 4}
_forced: str | None = None


@dataclass(frozen=True)
class Packed:
    """An int8 weight matrix (N, K) in the kernels' layout (kernels/cpu/kernels.h)."""

    data: Tensor  # uint8, opaque
    n: int
    k: int


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and why there is none."""
    try:
        lib = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        return None, str(error)
    i32, i64, f32, ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    for name, result, arguments in (
        ("haq_level_name", ctypes.c_char_p, (i32,)),
        ("haq_level_supported", i32, (i32,)),
        ("haq_packed_bytes", i64, (i64, i64)),
        ("haq_prefer_huge_pages", None, (ptr, i64)),
        ("haq_pack", None, (ptr, i64, i64, i64, ptr, i32)),
        ("haq_linear", i32, (i32, i32, ptr, i32, i64, i64, ptr, i64, ptr, ptr, f32, ptr, i32)),
        ("haq_quantize", None, (i32, i32, ptr, i32, i64, i64, f32, ptr, ptr)),
        ("haq_silu_mul", None, (i32, i32, ptr, i32, i64, i64, ptr)),
        ("haq_half_linear", None, (i32, i32, ptr, i64, i64, ptr, i32, i64, ptr)),
        ("haq_decoder_layers", i32, (i32, i32, ptr, i64, ptr, i64, ptr, ptr, ptr, ptr, i64, i64)),
        ("haq_attention", i32, (i32, i32, ptr, i64, ptr, ptr, i64, ptr, ptr, ptr, ptr, i64, i64)),
        ("haq_route", i32, (i32, i32, ptr, ptr, i64, i64, ptr, ptr, ptr)),
        ("haq_expert", i32, (i32, i32, ptr, ptr, i64, i64, i64, ptr, ptr, ptr, ptr, ptr, ptr, f32, ptr)),
        ("haq_read", ctypes.c_uint64, (i32, i32, ptr, i64)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, ""


def available() -> bool:
    """Whether the kernels can be used here; the first call may build them (some seconds)."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why `available()` is False; empty when it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The built kernels. Raises UserError where there are none."""
    lib, reason = _load()
    if lib is None:
        raise UserError(f"the native CPU backend is not available: {reason}")
    return lib


@cache
def _levels() -> dict[str, int]:
    lib = library()
    names: list[str] = []
    while name := lib.haq_level_name(len(names)):
        names.append(name.decode())
    return {name: level for level, name in enumerate(names) if lib.haq_level_supported(level)}


def isas() -> tuple[str, ...]:
    """The instruction sets usable on this CPU, slowest first."""
    return tuple(_levels())


def isa() -> str:
    """The instruction set in use: forced, else `HAQ_LAB_ISA` as it was at first use, else the best."""
    if _forced is not None:
        return _forced
    return next(name for name, level in _levels().items() if level == _default_level())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Within the block, use this instruction set (for tests and measurements; not per thread)."""
    global _forced
    _level_of(name, "forced_isa")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _level_of(name: str, setting: str) -> int:
    if name not in _levels():
        raise UserError(
            f"{setting}: '{name}' is not one that this CPU can run: {', '.join(isas())}{nearest(name, isas())}"
        )
    return _levels()[name]


@cache
def _default_level() -> int:
    return _level_of(os.environ.get("HAQ_LAB_ISA") or isas()[-1], "HAQ_LAB_ISA")


def level() -> int:
    """The number of the instruction set in use, as the library takes it."""
    return _default_level() if _forced is None else _levels()[_forced]


def _check(tensor: Tensor, name: str, dtype: torch.dtype, *shape: int) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be a contiguous CPU tensor {dtype} {shape}, "
            f"not {tensor.device.type} {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        )


def _wrong_x(x: Tensor, k: int) -> ValueError:
    return ValueError(
        f"x must be a contiguous CPU tensor (..., {k}), float32 or bfloat16, "
        f"not {x.device.type} {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
    )


def _check_x(x: Tensor, k: int) -> int:
    """The number of rows of a float tensor (..., k)."""
    if x.dtype not in _FLOAT_KINDS or x.ndim == 0 or x.shape[-1] != k or not x.is_contiguous() or not x.is_cpu:
        raise _wrong_x(x, k)
    return x.shape[:-1].numel()


def _static_scale(scale: float | None) -> float:
    """As the kernels take it: 0 stands for a scale per row. An infinite one or NaN is let through to the outputs."""
    if scale is None:
        return 0.0
    if scale <= 0.0:
        raise ValueError(f"activation scale must be positive, not {scale}")
    return scale


def pack(weight: Tensor | Sequence[Tensor]) -> Packed:
    """Pack int8 weights (N, K), or several of the same K as one matrix of all their rows."""
    lib = library()
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    k = parts[0].shape[-1]
    for part in parts:
        _check(part, "weight", torch.int8, part.shape[0], k)
    n = sum(part.shape[0] for part in parts)
    data = huge_pages(lib.haq_packed_bytes(n, k)).zero_()
    column, threads = 0, torch.get_num_threads()
    for part in parts:
        lib.haq_pack(part.data_ptr(), part.shape[0], k, column, data.data_ptr(), threads)
        column += part.shape[0]
    return Packed(data, n, k)


def huge_pages(count: int) -> Tensor:
    """So many bytes, in huge pages where the system has some to give."""
    data = torch.empty(count, dtype=torch.uint8)
    library().haq_prefer_huge_pages(data.data_ptr(), count)
    return data


def unpack(packed: Packed) -> Tensor:
    """The int8 weights (N, K) that were packed, exactly."""
    groups = -(-packed.k // GROUP)
    rows = packed.data.view(-1, groups, PANEL, GROUP).permute(0, 2, 1, 3).reshape(-1, groups * GROUP)
    return (rows[: packed.n, : packed.k] ^ 128).view(torch.int8).contiguous()  # a byte holds w + 128


class Linear:
    """A packed product with its scales, checked once: what a decode step calls (some 4 us a call here).

    Arguments as for `linear`. The tensors are kept alive and must not be resized or moved.
    """

    def __init__(
        self,
        packed: Packed,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation_scale: float | None = None,
    ):
        _check(weight_scale, "weight_scale", torch.float32, packed.n)
        if bias is not None:
            _check(bias, "bias", torch.float32, packed.n)
        self.n, self.k = packed.n, packed.k
        self._kept = (packed, weight_scale, bias)
        self._weights = packed.data.data_ptr()
        self._scale = weight_scale.data_ptr()
        self._bias = None if bias is None else bias.data_ptr()
        self._static_scale = _static_scale(activation_scale)
        self._run = library().haq_linear

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x (..., K) -> (..., N)` in x's type."""
        shape, dtype = x.shape, x.dtype
        kind = _FLOAT_KINDS.get(dtype)
        if kind is None or not shape or shape[-1] != self.k or not x.is_contiguous() or not x.is_cpu:
            raise _wrong_x(x, self.k)
        if out is None:
            out = torch.empty((*shape[:-1], self.n), dtype=dtype)
        else:
            _check(out, "out", dtype, *shape[:-1], self.n)
        m = out.numel() // self.n if self.n else 0
        failed = self._run(
            level(), torch.get_num_threads(), x.data_ptr(), kind, m, self.k, self._weights, self.n,
            self._scale, self._bias, self._static_scale, out.data_ptr(), kind,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"int8 linear of {m} x {self.n} x {self.k}")
        return out


def linear(
    x: Tensor,
    packed: Packed,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x (..., K) -> (..., N)` in x's type, float32 or bfloat16.

    `weight_scale` and `bias` are float32 (N,). Without `activation_scale` each row gets its own scale.
    To call it often, make a `Linear` once.
    """
    return Linear(packed, weight_scale, bias, activation_scale)(x, out)


def accumulate(qx: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """The exact sums: int8 `qx (M, K)` -> int32 (M, N)."""
    m = qx.shape[0]
    _check(qx, "qx", torch.int8, m, packed.k)
    if out is None:
        out = torch.empty((m, packed.n), dtype=torch.int32)
    else:
        _check(out, "out", torch.int32, m, packed.n)
    failed = library().haq_linear(
        level(), torch.get_num_threads(), qx.data_ptr(), _INT8, m, packed.k,
        packed.data.data_ptr(), packed.n, None, None, 0.0, out.data_ptr(), _INT32,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"int8 product of {m} x {packed.n} x {packed.k}")
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x (M, K)` -> int8 (M, K) and a float32 scale per row (M,); scale 1 where max|x| / 127 is 0."""
    return _quantize(x, 0.0)


def quantize_static(x: Tensor, scale: float) -> Tensor:
    """`x (M, K)` -> int8 (M, K) under one given scale."""
    return _quantize(x, _static_scale(scale))[0]


def _quantize(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    m = _check_x(x, x.shape[-1])
    q = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32)
    library().haq_quantize(
        level(),
        torch.get_num_threads(),
        x.data_ptr(),
        _FLOAT_KINDS[x.dtype],
        m,
        x.shape[-1],
        scale,
        q.data_ptr(),
        scales.data_ptr(),
    )
    return q, scales


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate_up (..., 2N)`, which holds gate | up as a packed gate/up product does.

    In fp32 within a few units of the last place of torch's, and the very bits of the CUDA kernels' (numeric.cuh).
    """
    m, n = _check_x(gate_up, gate_up.shape[-1]), gate_up.shape[-1] // 2
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must hold gate | up, so an even width, not {gate_up.shape[-1]}")
    out = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype)
    threads, kind = torch.get_num_threads(), _FLOAT_KINDS[gate_up.dtype]
    library().haq_silu_mul(level(), threads, gate_up.data_ptr(), kind, m, n, out.data_ptr())
    return out


def expert(
    qx: Tensor,
    row_scale: Tensor,
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    activation_scale: float | None = None,
) -> Tensor:
    """`down(silu(gate(x)) * up(x))` of int8 `qx (M, K)` with float32 `row_scale (M,)` -> float32 (M, K).

    `packed` are the data of gate and up (F, K) and of down (K, F), `scales` their float32 (F,), (F,) and (K,). What
    down reads is quantised with `activation_scale`, or each row with its own. The bits are those of `accumulate` and
    the epilogue, `silu_mul` and `linear` one after the other.
    """
    (m, k), f = qx.shape, len(scales[0])
    _check(qx, "qx", torch.int8, m, k)
    _check(row_scale, "row_scale", torch.float32, m)
    for data, scale, (rows, columns) in zip(packed, scales, ((f, k), (f, k), (k, f)), strict=True):
        if data.numel() != -(-rows // PANEL) * PANEL * -(-columns // GROUP) * GROUP or len(scale) != rows:
            raise ValueError(
                f"{data.numel()} packed bytes and {len(scale)} scales are not of weights {rows} x {columns}"
            )
    out = torch.empty((m, k), dtype=torch.float32)
    gate, up, down = ((data.data_ptr(), scale.data_ptr()) for data, scale in zip(packed, scales, strict=True))
    failed = library().haq_expert(
        level(), torch.get_num_threads(), qx.data_ptr(), row_scale.data_ptr(), m, k, f,
        *gate, *up, *down, _static_scale(activation_scale), out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"int8 expert of {m} x {k}, {f} wide")
    return out


def half_linear(x: Tensor, weight: Tensor) -> Tensor:
    """float32 `x (M, K)` times `weight (N, K)`, bfloat16 or float16 as it lies there, transposed: float32 (M, N).

    The weights widen exactly and sums are float32, in an order of their own. Made for few rows: time grows with M.
    """
    m, (n, k) = x.shape[0], weight.shape
    _check(x, "x", torch.float32, m, k)
    if weight.dtype not in _HALF_KINDS:
        raise ValueError(f"weight must be bfloat16 or float16, not {weight.dtype}")
    _check(weight, "weight", weight.dtype, n, k)
    out = torch.empty((m, n), dtype=torch.float32)
    kind = _HALF_KINDS[weight.dtype]
    library().haq_half_linear(
        level(), torch.get_num_threads(), x.data_ptr(), m, k, weight.data_ptr(), kind, n, out.data_ptr()
    )
    return out


def read_bytes(data: Tensor) -> int:
    """Read a contiguous tensor once, as fast as the threads can, and return its checksum (for bandwidth)."""
    return library().haq_read(level(), torch.get_num_threads(), data.data_ptr(), data.nbytes)
