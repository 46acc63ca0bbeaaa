"""Convert float8 and MXFP4 weights to wider floats.

A checkpoint stores such a weight as two tensors, levels and scales:

    q_proj.weight, q_proj.weight_scale_inv       float8 with scales of blocks, or one for the tensor (DeepSeek-V3)
    q_proj.weight, q_proj.weight_scale           float8 with one scale for each row or for the tensor
    gate_up_proj_blocks, gate_up_proj_scales     MXFP4 (gpt-oss): blocks of 32 values with a power of two for each

`stored_parts` finds the pairs by their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

FLOAT8_SCALES = ("_scale_inv", "_scale")  # both are multiplied
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Values of a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats v1.0, section 5.3.3).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127  # of the exponent that an MXFP4 scale is
UNUSED = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")  # of activations


def stored_parts(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the weights of a checkpoint, each with the names of the tensors that store it.

    Args:
        names: Names of all tensors.

    Returns:
        By name: the tensor, or the levels and their scales.

    Example:
        >>> stored_parts(["up_proj.weight", "up_proj.weight_scale"])
        {'up_proj.weight': ('up_proj.weight', 'up_proj.weight_scale')}
    """
    present = {name: None for name in names if name.rpartition(".")[2] not in UNUSED}
    parts: dict[str, tuple[str, ...]] = {}
    scales = set()
    for name in present:
        own = [name + suffix for suffix in FLOAT8_SCALES if name + suffix in present]
        if name.endswith(BLOCKS) and (scale := name.removesuffix(BLOCKS) + BLOCK_SCALES) in present:
            parts[name.removesuffix(BLOCKS)] = (name, scale)
            scales.add(scale)
        else:
            parts[name] = (name, *own[:1])
            scales |= {*own}
    return {name: own for name, own in parts.items() if name not in scales}


def widen_float8(levels: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None) -> Tensor:
    """Return levels * scales (..., n, k).

    Args:
        levels: float8 (..., n, k).
        scales: One scale, one for each row, (n,) or (..., n, 1), or one for each block, (..., a, b).
        dtype: Type of the result.
        block: Rows and columns of a block. The last blocks may be smaller. If None, all blocks are equal.

    Raises:
        ValueError: The scales do not fit the levels.
    """
    factor = scales.to(torch.float32)
    if factor.numel() == 1:
        return (levels.to(torch.float32) * factor.reshape(())).to(dtype)
    factor = factor[:, None] if factor.dim() == 1 else factor
    for dim in (-2, -1):
        size, count = levels.shape[dim], factor.shape[dim]
        step = size // count if block is None or count in (1, size) else block[dim]
        if -(-size // step) != count:
            raise ValueError(f"scales {tuple(scales.shape)} do not fit weights {tuple(levels.shape)}")
        factor = factor.repeat_interleave(step, dim=dim).narrow(dim, 0, size)
    return (levels.to(torch.float32) * factor).to(dtype)


def widen_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of MXFP4 blocks as transformers names them: (..., k, n), the transposed view of (..., n, k).

    Args:
        blocks: uint8 (..., n, k / 32, 16). The lower half of a byte is the first of its two values.
        scales: uint8 (..., n, k / 32), exponents of two with a bias of 127.
        dtype: Type of the result. bfloat16 holds all values exactly.

    Raises:
        ValueError: The scales do not fit the blocks.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit blocks {tuple(blocks.shape)}")
    values = torch.tensor(FP4, dtype=dtype)
    *lead, groups, width = blocks.shape
    weights = torch.empty(*lead, groups, width, 2, dtype=dtype)
    # One expert at a time, because indices take eight times the memory of the blocks.
    for own, exponents, target in zip(blocks, scales, weights, strict=True):
        target[..., 0] = values[(own & 15).int()]
        target[..., 1] = values[(own >> 4).int()]
        target.mul_(torch.exp2(exponents.float() - BIAS).to(dtype)[..., None, None])
    return weights.view(*lead, groups * width * 2).transpose(-1, -2)


def refused_format(quantization: Mapping[str, object]) -> str | None:
    """Return the name of a checkpoint's number format if it is not one of floats that can be widened, else None.

    Args:
        quantization: `quantization_config` of the checkpoint.
    """
    method = str(quantization.get("quant_method"))
    if method in ("fp8", "fbgemm_fp8", "mxfp4"):
        return None
    if method == "compressed-tensors":
        form = str(quantization.get("format"))
        return None if form == "float-quantized" else f"{method}, {form}"
    if method == "modelopt":
        form = str(quantization.get("quant_algo"))
        return None if form == "FP8" else f"{method}, {form}"
    bits = quantization.get("bits")
    return method if bits is None else f"{method}, {bits} bits"
