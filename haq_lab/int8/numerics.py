"""The W8A8 contract, in plain torch. Every backend gives these values, bit for bit.

    y[m, n] = (sum_k qx[m, k] * qw[n, k]) * sx[m] * sw[n] + b[n]

Symmetric int8 in [-127, 127], round half to even, exact int32 accumulation, epilogue in float32 in that order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ActivationScheme = Literal["token", "tensor", "static"]
QMAX = 127
EXP_LOG2_E, EXP_LN2_HIGH, EXP_LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def scale_of(maximum: Tensor, qmax: int = QMAX) -> Tensor:
    """The float32 scale that maps `maximum` (>= 0) to `qmax`; 1 where the maximum is zero (or its scale would be)."""
    scale = maximum.to(torch.float32) / qmax
    return torch.where(scale > 0, scale, 1.0)


def round_to_grid(x: Tensor, scale: Tensor | float, qmax: int = QMAX) -> Tensor:
    """Integer values clamp(round(x / scale), -qmax, qmax), still as floats."""
    return torch.round(x / scale).clamp_(-qmax, qmax)


def quantize_activations(x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of activations to int8.

    Args:
        x: (m, k), any floating type; computed in float32.
        scheme: `token`: one scale a row; `tensor`: one for all rows; `static`: `static_scale`, known before.
        static_scale: Scalar tensor, for `static`.

    Returns:
        int8 (m, k) and float32 scales (m, 1).
    """
    x = x.float()
    if scheme == "static":
        assert static_scale is not None, "the static scheme needs the scale from calibration"
        scale = static_scale.expand(x.shape[0], 1)
    elif scheme == "tensor":
        scale = scale_of(x.abs().amax()).expand(x.shape[0], 1) if x.numel() else x.new_ones(x.shape[0], 1)
    else:
        scale = scale_of(x.abs().amax(dim=1, keepdim=True))
    return round_to_grid(x, scale).to(torch.int8), scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of float32 tensors of one shape, in operations that are the same to the bit on every device.

    exp is n ln 2 + r with Cephes' polynomial, each operation rounded on its own (kernels/numeric.cuh,
    kernels/cpu/rows.h): within 2 units of the last place of torch's, and the bits do not depend on a math library.
    """
    x = (-gate).clamp(-87.0, 88.0)
    n = torch.round(x * EXP_LOG2_E)
    r = x - n * EXP_LN2_HIGH - n * EXP_LN2_LOW
    p = torch.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    y = p * (r * r) + r + 1.0
    return gate / (1.0 + y * (n.to(torch.int32).add_(127) << 23).view(torch.float32)) * up


def epilogue(accumulators: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    """int32 (m, n) -> float32 (m, n): times the row scale (m, 1), times the column scale (n,), plus bias (n,)."""
    y = accumulators.to(torch.float32).mul_(row_scale).mul_(column_scale)
    return y if bias is None else y.add_(bias)
