"""Multiply by weights that stay floats, such as the head's, with the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.cpu.bindings import check
from haq_lab.int8.cpu.library import level, library

_WEIGHT_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 4}


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by float weights, which are not converted in memory.

    Sums are float32, in another order than torch's. A row of the result does not depend on the other rows of x.

    Args:
        x: float32 (M, K).
        weight: float32, bfloat16 or float16 (N, K).

    Returns:
        float32 (M, N).

    Raises:
        ValueError: A tensor has another shape, type or layout.
    """
    m, (n, k) = x.shape[0], weight.shape
    check(x, "x", torch.float32, m, k)
    if weight.dtype not in _WEIGHT_KINDS:
        raise ValueError(f"weight must be float32, bfloat16 or float16, not {weight.dtype}.")
    check(weight, "weight", weight.dtype, n, k)
    out = torch.empty((m, n), dtype=torch.float32)
    kind = _WEIGHT_KINDS[weight.dtype]
    library().haq_float_linear(
        level(), torch.get_num_threads(), x.data_ptr(), m, k, weight.data_ptr(), kind, n, out.data_ptr()
    )
    return out
