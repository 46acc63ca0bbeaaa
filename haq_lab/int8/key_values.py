"""Keys and values of one decoder layer in the native kernels' layout, as a layer of transformers' cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from haq_lab.int8.native import PANEL


class KeyValues(DynamicLayer):
    """Room for positions that grows by doubling: a decode step copies nothing and allocates nothing.

    `keys` (heads, capacity / 32, head_dim, 32) and `values` (heads, capacity, head_dim up to a multiple of 32) are
    what kernels/cpu/decoder.h describes.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.length = self.capacity = 0
        self.panels = torch.empty(heads, 0, head_dim, PANEL)
        self.rows = torch.empty(heads, 0, -(-head_dim // PANEL) * PANEL)

    def reserve(self, more: int) -> None:
        """Make room for `more` positions."""
        needed = self.length + more
        if needed <= self.capacity:
            return
        capacity = max(-(-needed // PANEL) * PANEL, 2 * self.capacity, 8 * PANEL)
        panels = torch.zeros(self.heads, capacity // PANEL, self.head_dim, PANEL)
        rows = torch.zeros(self.heads, capacity, self.rows.shape[-1])
        panels[:, : self.panels.shape[1]], rows[:, : self.capacity] = self.panels, self.rows
        self.panels, self.rows, self.capacity = panels, rows, capacity

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def plain(self) -> DynamicLayer:
        """The same keys and values as transformers' own kind of layer, for what the kernels do not do."""
        layer = DynamicLayer()
        keys = self.panels.transpose(2, 3).flatten(1, 2)[:, : self.length]
        if self.length:
            layer.update(keys[None].contiguous(), self.rows[None, :, : self.length, : self.head_dim].contiguous())
        return layer
