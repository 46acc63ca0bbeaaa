"""Rotate activations by a block Hadamard matrix before they are rounded (QuaRot, arXiv 2404.00456).

    x W^T = (x R) (W R)^T        R = diag(H, ..., H) / sqrt(b),  H = the Hadamard matrix of size b

R is orthogonal and symmetric, so it does not change the function of a linear. It spreads an outlier over the b channels
of its block, so rounding errors shrink. A linear's weights are rotated once, before they are rounded. Its input is
rotated at run time, before it is quantised.

    block = block_size(1536, 128)             # 128: the largest block that divides the width
    y = int8_linear(rotate(x, block))         # with weights rotate(w, block)
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

NO_ROTATION = 1  # a block of one channel, whose Hadamard matrix is 1


def block_size(width: int, limit: int | None = None) -> int:
    """Return the largest power of two that divides a width and is at most `limit`.

    Args:
        width: Number of channels.
        limit: Largest block, at least 1. None for no limit.

    Example:
        >>> [block_size(width, 128) for width in (576, 1536, 4096)], block_size(1536)
        ([64, 128, 128], 512)
    """
    block = width & -width
    return block if limit is None else min(block, 1 << (limit.bit_length() - 1))


def rotate(x: Tensor, block: int) -> Tensor:
    """Return x R, where R rotates each block of consecutive channels by a Hadamard matrix.

    The order of the operations is part of the definition, so every backend returns these bits. The stages have
    h = 1, 2, 4, ... block / 2. In a stage, channels i and i + h of a block become their sum and their difference. At
    the end each value is multiplied by 1 / sqrt(block), rounded to float32.

    Args:
        x: (..., k) of any floating type. The computation is in float32.
        block: Channels of a block, a power of two that divides k. 1 for no rotation.

    Returns:
        float32 (..., k), or x itself if `block` is 1.

    Raises:
        ValueError: `block` is not a power of two that divides k.
    """
    if block <= NO_ROTATION:
        return x
    if x.shape[-1] % block or block & (block - 1):
        raise ValueError(f"block: {block} is not a power of two that divides {x.shape[-1]} channels.")
    y = x.float().reshape(-1, block).t().contiguous()  # a row for each channel of a block
    other = torch.empty_like(y)
    half = 1
    while half < block:
        pairs = (block // (2 * half), 2, half, y.shape[1])
        first, second = y.view(pairs).unbind(1)
        total, difference = other.view(pairs).unbind(1)
        torch.add(first, second, out=total)
        torch.sub(first, second, out=difference)
        y, other = other, y
        half *= 2
    return y.mul_(scale_of_block(block)).t().reshape(x.shape)


@cache
def hadamard(block: int) -> Tensor:
    """Return one block of R, (block, block). Blocks of x times it are `rotate(x, block)` up to rounding."""
    return rotate(torch.eye(block), block)


@cache
def scale_of_block(block: int) -> float:
    """Return 1 / sqrt(block), rounded to float32."""
    return float(torch.tensor(1 / math.sqrt(block), dtype=torch.float32))
