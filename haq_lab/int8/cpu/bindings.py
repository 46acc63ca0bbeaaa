"""Call the native CPU kernels (kernels/cpu) on torch tensors, without copies.

    packed = native.pack(weight)                              # (N, K) int8, once
    y = native.linear(x, packed, weight_scale, bias, None)    # (M, K) float32 or bfloat16 -> (M, N)

One call quantises the rows, computes the exact int8 product and applies the epilogue `(acc * sx[m]) * sw[n] + b[n]`.
For q/k/v or gate/up, `pack([wq, wk, wv])` makes one matrix: the rows are quantised once and the outputs are
concatenated. The best instruction set of the CPU is used. `HAQ_LAB_ISA` or `forced_isa` selects a lower one. All
instruction sets and the reference backend are bit-identical.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haq_lab.int8.cpu.library import level, library
from haq_lab.int8.cpu.weight_block import allocate
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.int8.weight_format import INT8, ZERO, WeightFormat

# Output channels whose weights are stored together, and consecutive k of each (kernels/cpu/kernels.h).
PANEL, GROUP = 32, 4
PAIR = 2 * GROUP  # consecutive k of a column's 4 bytes of 4-bit weights
_INT32, _INT8 = 0, 3
_FLOAT_KINDS = {torch.float32: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Packed:
    """An int8 or int4 weight matrix (N, K) in the kernels' layout (kernels/cpu/kernels.h).

    Attributes:
        data: The packed weights, uint8.
        n: Rows N.
        k: Columns K.
        format: Bits of the weights, and columns that share a scale.
    """

    data: Tensor
    n: int
    k: int
    format: WeightFormat = INT8


def check(tensor: Tensor, name: str, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError unless a tensor has this type and shape, and is contiguous in CPU memory."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be a contiguous CPU tensor {dtype} {shape}, "
            f"not {tensor.device.type} {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}."
        )


def _wrong_x(x: Tensor, k: int) -> ValueError:
    return ValueError(
        f"x must be a contiguous CPU tensor (..., {k}), float32 or bfloat16, "
        f"not {x.device.type} {x.dtype} {tuple(x.shape)}, strides {x.stride()}."
    )


def _check_x(x: Tensor, k: int) -> int:
    """Check a float tensor (..., k) and return its number of rows."""
    if x.dtype not in _FLOAT_KINDS or x.ndim == 0 or x.shape[-1] != k or not x.is_contiguous() or not x.is_cpu:
        raise _wrong_x(x, k)
    return x.shape[:-1].numel()


def _static_scale(scale: float | None) -> float:
    """Return the scale as the kernels take it: 0 means one scale per row. Infinity and NaN reach the outputs."""
    if scale is None:
        return 0.0
    if scale <= 0.0:
        raise ValueError(f"activation scale must be positive, not {scale}.")
    return scale


def _rotation(block: int, k: int) -> int:
    """Return the block of a rotation as the kernels take it."""
    if block < 1 or block & (block - 1) or k % block:
        raise ValueError(f"rotation: {block} is not a power of two that divides {k} columns.")
    return block


def pack(weight: Tensor | Sequence[Tensor], format: WeightFormat = INT8) -> Packed:
    """Convert int8 weights to the kernels' layout.

    Args:
        weight: int8 (N, K), or several matrices of the same K, which are concatenated along N.
        format: Format of the weights.

    Raises:
        UserError: The kernels are not available.
        ValueError: A tensor is not a contiguous int8 CPU tensor, or 4-bit weights have no columns.
    """
    lib = library()
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    k = parts[0].shape[-1]
    for part in parts:
        check(part, "weight", torch.int8, part.shape[0], k)
    if format.bits == 4 and k == 0:
        raise ValueError("4-bit weights must have at least one column.")
    n = sum(part.shape[0] for part in parts)
    data = allocate(packed_bytes(n, k, format))
    data[packed_bytes(n - n % PANEL, k, format) :].zero_()  # a last panel that is not full
    column, threads = 0, torch.get_num_threads()
    write = lib.haq_pack if format.bits == 8 else lib.haq_pack4
    for part in parts:
        write(part.data_ptr(), part.shape[0], k, column, data.data_ptr(), threads)
        column += part.shape[0]
    return Packed(data, n, k, format)


def packed_bytes(n: int, k: int, format: WeightFormat = INT8) -> int:
    """Return the size of packed weights (N, K)."""
    lib = library()
    return lib.haq_packed_bytes(n, k) if format.bits == 8 else lib.haq_packed4_bytes(n, k)


def unpack(packed: Packed) -> Tensor:
    """Return the exact int8 weights (N, K) of a packed matrix."""
    if packed.format.bits == 4:
        pairs = -(-packed.k // PAIR)
        both = packed.data.view(-1, pairs, 1, PANEL, GROUP)
        levels = torch.cat((both & 15, both >> 4), dim=2).permute(0, 3, 1, 2, 4).reshape(-1, pairs * PAIR)
        return levels[: packed.n, : packed.k].view(torch.int8) - ZERO
    groups = -(-packed.k // GROUP)
    rows = packed.data.view(-1, groups, PANEL, GROUP).permute(0, 2, 1, 3).reshape(-1, groups * GROUP)
    return (rows[: packed.n, : packed.k] ^ 128).view(torch.int8).contiguous()  # a byte holds w + 128


def kernel_group(format: WeightFormat, k: int) -> int:
    """Return `group` of kernels/cpu/linear.h for weights of width k: 0 for 8-bit weights."""
    if format.bits == 8:
        return 0
    return k if format.group is None else format.group


class Linear:
    """One int8 linear whose arguments are checked once, for fast calls in decoding (about 4 us of overhead).

    The tensors must not be resized or moved.

    Args:
        packed: The weights (N, K).
        weight_scale: One scale per row, float32 (N,), or per group and row, (groups, N).
        bias: float32 (N,), or None.
        activation_scale: The static scale; None for one scale per row of x.
        rotation: Block of x's rotation before it is quantised (`haq_lab.int8.rotation`); 1 for none.

    Raises:
        ValueError: A tensor has another shape, type or layout, or the static scale or the rotation is not possible.
    """

    def __init__(
        self,
        packed: Packed,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation_scale: float | None = None,
        rotation: int = NO_ROTATION,
    ):
        check(weight_scale, "weight_scale", torch.float32, *packed.format.scale_shape(packed.n, packed.k))
        if bias is not None:
            check(bias, "bias", torch.float32, packed.n)
        self.n, self.k = packed.n, packed.k
        self._tensors = (packed, weight_scale, bias)  # keeps their memory allocated
        self._weights = packed.data.data_ptr()
        self._scale = weight_scale.data_ptr()
        self._bias = None if bias is None else bias.data_ptr()
        self._static_scale = _static_scale(activation_scale)
        self._rotation, self._group = _rotation(rotation, packed.k), kernel_group(packed.format, packed.k)
        self._run = library().haq_linear if packed.format.bits == 8 else library().haq_linear4

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute the linear.

        Args:
            x: Contiguous (..., K), float32 or bfloat16.
            out: Where to write the result; a new tensor if None.

        Returns:
            (..., N) in x's type.

        Raises:
            ValueError: x or `out` has another shape, type or layout.
            MemoryError: The kernels could not allocate their buffers.
        """
        shape, dtype = x.shape, x.dtype
        kind = _FLOAT_KINDS.get(dtype)
        if kind is None or not shape or shape[-1] != self.k or not x.is_contiguous() or not x.is_cpu:
            raise _wrong_x(x, self.k)
        if out is None:
            out = torch.empty((*shape[:-1], self.n), dtype=dtype)
        else:
            check(out, "out", dtype, *shape[:-1], self.n)
        m = out.numel() // self.n if self.n else 0
        arguments = (level(), torch.get_num_threads(), x.data_ptr(), kind, m, self.k, self._weights, self.n)
        scales = (self._scale, self._bias) if self._group == 0 else (self._group, self._scale, self._bias, None)
        failed = self._run(*arguments, *scales, self._static_scale, self._rotation, out.data_ptr(), kind)
        if failed:
            raise MemoryError(
                f"An int8 linear of {m} x {self.n} x {self.k} has no memory for its buffers. Use fewer rows."
            )
        return out


def linear(
    x: Tensor,
    packed: Packed,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation_scale: float | None = None,
    out: Tensor | None = None,
    rotation: int = NO_ROTATION,
) -> Tensor:
    """Compute one int8 linear. For many calls with the same weights, create a `Linear` once.

    Args:
        x: Contiguous (..., K), float32 or bfloat16.
        packed: The weights (N, K).
        weight_scale: One scale per row, float32 (N,).
        bias: float32 (N,), or None.
        activation_scale: The static scale; None for one scale per row of x.
        out: Where to write the result; a new tensor if None.
        rotation: Block of x's rotation; 1 for none.

    Returns:
        (..., N) in x's type.

    Raises:
        ValueError: A tensor has another shape, type or layout, or the static scale or the rotation is not possible.
        MemoryError: The kernels could not allocate their buffers.
    """
    return Linear(packed, weight_scale, bias, activation_scale, rotation)(x, out)


def product4(qx: Tensor, row_scale: Tensor, packed: Packed, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply quantised rows by 4-bit weights and scale.

    Args:
        qx: int8 (M, K).
        row_scale: float32 (M,).
        packed: The weights (N, K).
        weight_scale: float32 (N,) or (groups, N).
        bias: float32 (N,), or None.

    Returns:
        float32 (M, N).

    Raises:
        ValueError: A tensor has another shape, type or layout.
        MemoryError: The kernels could not allocate their buffers.
    """
    m = qx.shape[0]
    check(qx, "qx", torch.int8, m, packed.k)
    check(row_scale, "row_scale", torch.float32, m)
    check(weight_scale, "weight_scale", torch.float32, *packed.format.scale_shape(packed.n, packed.k))
    if bias is not None:
        check(bias, "bias", torch.float32, packed.n)
    out = torch.empty((m, packed.n), dtype=torch.float32)
    failed = library().haq_linear4(
        level(), torch.get_num_threads(), qx.data_ptr(), _INT8, m, packed.k, packed.data.data_ptr(), packed.n,
        kernel_group(packed.format, packed.k), weight_scale.data_ptr(), None if bias is None else bias.data_ptr(),
        row_scale.data_ptr(), 0.0, NO_ROTATION, out.data_ptr(), _FLOAT_KINDS[torch.float32],
    )  # fmt: skip
    if failed:
        raise MemoryError(f"A product of {m} x {packed.n} x {packed.k} has no memory. Use fewer rows.")
    return out


def accumulate(qx: Tensor, packed: Packed, out: Tensor | None = None) -> Tensor:
    """Multiply int8 `qx` (M, K) by packed weights (N, K) transposed. Returns the exact int32 sums (M, N)."""
    m = qx.shape[0]
    check(qx, "qx", torch.int8, m, packed.k)
    if out is None:
        out = torch.empty((m, packed.n), dtype=torch.int32)
    else:
        check(out, "out", torch.int32, m, packed.n)
    failed = library().haq_linear(
        level(), torch.get_num_threads(), qx.data_ptr(), _INT8, m, packed.k,
        packed.data.data_ptr(), packed.n, None, None, 0.0, NO_ROTATION, out.data_ptr(), _INT32,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"An int8 product of {m} x {packed.n} x {packed.k} has no memory. Use fewer rows.")
    return out


def quantize_rows(x: Tensor, rotation: int = NO_ROTATION) -> tuple[Tensor, Tensor]:
    """Rotate x (M, K) and quantise it to int8 (M, K) with one float32 scale per row (M,).

    The scale is 1 if max|x| / 127 is 0. `rotation` is the block of the rotation; 1 for none.
    """
    return _quantize(x, 0.0, rotation)


def quantize_static(x: Tensor, scale: float, rotation: int = NO_ROTATION) -> Tensor:
    """Rotate x (M, K) and quantise it to int8 (M, K) with one given scale."""
    return _quantize(x, _static_scale(scale), rotation)[0]


def _quantize(x: Tensor, scale: float, rotation: int) -> tuple[Tensor, Tensor]:
    m = _check_x(x, x.shape[-1])
    q = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32)
    failed = library().haq_quantize(
        level(),
        torch.get_num_threads(),
        x.data_ptr(),
        _FLOAT_KINDS[x.dtype],
        m,
        x.shape[-1],
        scale,
        _rotation(rotation, x.shape[-1]),
        q.data_ptr(),
        scales.data_ptr(),
    )
    if failed:
        raise MemoryError(f"Quantising {m} x {x.shape[-1]} values has no memory for its buffers. Use fewer rows.")
    return q, scales


def silu_mul(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    The result is within a few ulp of torch's and bit-identical to that of the CUDA kernels (kernels/numeric.cuh).

    Args:
        gate_up: (..., 2N), float32 or bfloat16: gate in the first N columns, up in the others.

    Returns:
        (..., N) in the same type.

    Raises:
        ValueError: The width is odd, or the type or layout is not supported.
    """
    m, n = _check_x(gate_up, gate_up.shape[-1]), gate_up.shape[-1] // 2
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even number of columns, not {gate_up.shape[-1]}.")
    out = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype)
    threads, kind = torch.get_num_threads(), _FLOAT_KINDS[gate_up.dtype]
    library().haq_silu_mul(level(), threads, gate_up.data_ptr(), kind, m, n, out.data_ptr())
    return out


def expert(
    qx: Tensor,
    row_scale: Tensor,
    packed: Sequence[Packed],
    scales: Sequence[Tensor],
    activation_scale: float | None = None,
    rotation: int = NO_ROTATION,
) -> Tensor:
    """Compute one expert, down(silu(gate(x)) * up(x)).

    The result is bit-identical to the products of gate and up, `silu_mul` and `linear` in this order.

    Args:
        qx: int8 (M, K).
        row_scale: Its scales, float32 (M,).
        packed: gate (F, K), up (F, K) and down (K, F).
        scales: Their weight scales, float32 (F,), (F,) and (K,); with groups, (groups, ...).
        activation_scale: The static scale of down's input; None for one scale per row.
        rotation: Block of the rotation of down's input; 1 for none.

    Returns:
        float32 (M, K).

    Raises:
        ValueError: A tensor has another shape, type or layout.
        MemoryError: The kernels could not allocate their buffers.
    """
    (m, k), f = qx.shape, packed[0].n
    check(qx, "qx", torch.int8, m, k)
    check(row_scale, "row_scale", torch.float32, m)
    weights: list[int] = []
    for part, scale, (rows, columns) in zip(packed, scales, ((f, k), (f, k), (k, f)), strict=True):
        fits = part.data.numel() == packed_bytes(rows, columns, part.format)
        if not fits or tuple(scale.shape) != part.format.scale_shape(rows, columns):
            raise ValueError(
                f"{part.data.numel()} packed bytes and {tuple(scale.shape)} scales do not fit weights of "
                f"{rows} x {columns}."
            )
        weights += part.data.data_ptr(), scale.data_ptr(), kernel_group(part.format, columns)
    out = torch.empty((m, k), dtype=torch.float32)
    failed = library().haq_expert(
        level(), torch.get_num_threads(), qx.data_ptr(), row_scale.data_ptr(), m, k, f,
        *weights, _static_scale(activation_scale), _rotation(rotation, f), out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"An int8 expert of width {f} has no memory for {m} x {k} inputs. Use fewer rows.")
    return out


def read_bytes(data: Tensor) -> int:
    """Read a contiguous tensor once with all threads and return its checksum, to measure memory bandwidth."""
    return library().haq_read(level(), torch.get_num_threads(), data.data_ptr(), data.nbytes)
