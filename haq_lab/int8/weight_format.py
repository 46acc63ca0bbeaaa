"""Describe how weights are stored: 8 or 4 bits, and how many columns of a row share a scale.

    INT4_64 = WeightFormat(bits=4, group=64)
    packed = pack_nibbles(levels)                  # (n, k) int8 in [-7, 7] -> (n, ceil(k / 2)) uint8

Two 4-bit levels share a byte. The lower four bits hold the even column, as in the `pack-quantized` format of
compressed-tensors. A nibble holds the level plus 8, so it is never negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ZERO = 8  # what a nibble holds for the level 0
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class WeightFormat:
    """The number format of one linear's weights.

    Attributes:
        bits: Bits of a level. Levels are in [-127, 127] or in [-7, 7].
        group: Consecutive columns of a row that share a scale, None if each row has one scale. The last group is
            shorter if the width is not a multiple. Only 4-bit weights have groups.
    """

    bits: Literal[8, 4] = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is not None and (self.bits != 4 or self.group not in GROUPS):
            raise ValueError(f"{self.bits} bits in groups of {self.group} are not supported. Groups need 4 bits.")

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the weight scales of a weight (rows, columns): (rows,), or (groups, rows)."""
        return (rows,) if self.group is None else (-(-columns // self.group), rows)

    def row_scales(self, scale: Tensor, columns: int) -> Tensor:
        """Return the scale of each weight, in a shape that broadcasts to (n, columns)."""
        return spread_scales(scale, columns, self.group)

    @property
    def tensor(self) -> str:
        """Name of the stored levels: `weight`, int8 (n, k), or `weight_packed`, uint8 (n, ceil(k / 2))."""
        return "weight" if self.bits == 8 else "weight_packed"

    def stored(self, levels: Tensor) -> Tensor:
        """Return levels, int8 (n, k), as a checkpoint stores them."""
        return levels if self.bits == 8 else pack_nibbles(levels)

    def levels(self, stored: Tensor, columns: int) -> Tensor:
        """Return the levels, int8 (n, columns), of stored weights."""
        return stored if self.bits == 8 else unpack_nibbles(stored, columns)

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of stored weights (rows, columns)."""
        return rows, columns if self.bits == 8 else -(-columns // 2)


INT8 = WeightFormat()


def spread_scales(scale: Tensor, columns: int, group: int | None) -> Tensor:
    """Return weight scales, (n,) or (groups, n), in a shape that broadcasts to (n, columns)."""
    return scale[:, None] if group is None else scale.t().repeat_interleave(group, dim=1)[:, :columns]


def pack_nibbles(levels: Tensor) -> Tensor:
    """Pack levels in [-8, 7], int8 (n, k), two to a byte: uint8 (n, ceil(k / 2)). A missing last level is 0.

    Example:
        >>> pack_nibbles(torch.tensor([[-7, 7, 1]], dtype=torch.int8)).tolist()
        [[241, 137]]
    """
    nibbles = (levels + ZERO).view(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=ZERO)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return the levels, int8 (n, columns), of packed weights, uint8 (n, ceil(columns / 2))."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=2).view(torch.int8) - ZERO
    return pairs.reshape(len(packed), 2 * packed.shape[1])[:, :columns].contiguous()
