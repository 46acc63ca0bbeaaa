"""Define the W8A8 arithmetic in plain torch. Every exact backend returns bit-identical values.

    y[m, n] = (sum_k qx[m, k] * qw[n, k]) * sx[m] * sw[n] + b[n]

Integers are symmetric, in [-127, 127], and rounded half to even. Sums are exact in int32. The epilogue multiplies and
adds in float32, in the order above.

4-bit weights are in [-7, 7] and have one scale for each group g of consecutive columns. (One scale a row means one
group.) The int32 sum S of a group is exact, and the groups are added in float32:

    t = 0;  for g = 0, 1, ...: t = t + S[g, m, n] * sw[g, n];   y[m, n] = t * sx[m] + b[n]

The groups are added in the order of the columns. Each multiplication and each addition is rounded on its own, so there
is no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from haq_lab.int8.sequences import Sequences

ActivationScheme = Literal["token", "tensor", "static"]  # defined by `quantize_activations`
QMAX = 127
EXP_LOG2_E, EXP_LN2_HIGH, EXP_LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def scale_of(maximum: Tensor, qmax: int = QMAX) -> Tensor:
    """Return the float32 scale that maps `maximum` (>= 0) to `qmax`. It is 1 if the quotient is zero."""
    # Not divided by a number: a GPU would multiply by its reciprocal, which rounds differently.
    scale = maximum.to(torch.float32) / torch.full_like(maximum, qmax, dtype=torch.float32)
    return torch.where(scale > 0, scale, 1.0)


def round_to_grid(x: Tensor, scale: Tensor | float, qmax: int = QMAX) -> Tensor:
    """Return clamp(round(x / scale), -qmax, qmax): integer values in a float tensor."""
    return torch.round(x / scale).clamp_(-qmax, qmax)


def quantize_activations(
    x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise rows of activations to int8.

    Dynamic scales never depend on another sequence, so a sequence has the same bits alone and in a batch.

    Args:
        x: (m, k) of any floating type. The computation is in float32.
        scheme: `token`: one scale per row. `tensor`: one scale for all rows of a sequence. `static`: the scale from
            calibration.
        static_scale: Scalar tensor for `static`, else None.
        sequences: Sequences of the rows for `tensor`. None if all rows belong to one sequence.

    Returns:
        int8 (m, k) and float32 scales (m, 1).
    """
    x = x.float()
    if scheme == "static":
        assert static_scale is not None, "The static scheme needs a scale from calibration."
        scale = static_scale.expand(x.shape[0], 1)
    elif scheme == "tensor":
        scale = _scale_by_sequence(x, sequences)
    else:
        scale = scale_of(x.abs().amax(dim=1, keepdim=True))
    return round_to_grid(x, scale).to(torch.int8), scale


def _scale_by_sequence(x: Tensor, sequences: Sequences | None) -> Tensor:
    """Return the scale (m, 1) of each row's sequence, which covers the rows (m, k) of that sequence."""
    if not x.numel():
        return x.new_ones(len(x), 1)
    if sequences is None:
        return scale_of(x.abs().amax()).expand(len(x), 1)
    return scale_of(sequences.maximum(x.abs().amax(dim=1)))[:, None]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, bit-identical on every device.

    The exponential splits its argument into n ln 2 + r and uses the polynomial of the Cephes library (`expf`). Each
    operation is rounded separately, as in kernels/numeric.cuh and kernels/cpu/rows.h. The result is within 2 ulp of
    torch's and does not depend on a math library.

    Args:
        gate: float32.
        up: float32, of the same shape.

    Returns:
        float32, of the same shape.
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
    """Scale int32 sums to float32.

    Args:
        accumulators: int32 (m, n).
        row_scale: Activation scales, float32 (m, 1).
        column_scale: Weight scales, float32 (n,).
        bias: (n,), or None.

    Returns:
        float32 (m, n).
    """
    y = accumulators.to(torch.float32).mul_(row_scale).mul_(column_scale)
    return y if bias is None else y.add_(bias)


def grouped_epilogue(
    accumulators: Iterable[Tensor], row_scale: Tensor, group_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Scale and add the int32 sums of all groups of columns, in the order of the columns.

    Args:
        accumulators: int32 (m, n) for each group.
        row_scale: Activation scales, float32 (m, 1).
        group_scale: Weight scales, float32 (groups, n).
        bias: (n,), or None.

    Returns:
        float32 (m, n).
    """
    y = row_scale.new_zeros(len(row_scale), group_scale.shape[1])
    for sums, scale in zip(accumulators, group_scale, strict=True):
        y.add_(sums.to(torch.float32).mul_(scale))
    y.mul_(row_scale)
    return y if bias is None else y.add_(bias)
