"""Keys and values of decoder layers in the native kernels' layout, in the place of a layer of transformers' cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from haq_lab.int8.cpu.bindings import PANEL, huge_pages


class KVCache(DynamicLayer):
    """Room for positions that grows by doubling: a decode step copies nothing and allocates nothing.

    `panels` (layers, heads, capacity / 32, head_dim, 32) are the keys and `rows` (layers, heads, capacity, head_dim up
    to a multiple of 32) the values that kernels/cpu/decoder.h describes.
    """

    def __init__(self, layers: int, heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.length = self.capacity = 0
        self.panels = torch.empty(layers, heads, 0, head_dim, PANEL)
        self.rows = torch.empty(layers, heads, 0, -(-head_dim // PANEL) * PANEL)

    def reserve(self, more: int) -> None:
        """Make room for `more` positions."""
        needed = self.length + more
        if needed <= self.capacity:
            return
        capacity = max(-(-needed // PANEL) * PANEL, 2 * self.capacity, 8 * PANEL)
        held = self.panels.shape[2]
        panels = _zeros(*self.panels.shape[:2], capacity // PANEL, *self.panels.shape[3:])
        rows = _zeros(*self.rows.shape[:2], capacity, self.rows.shape[-1])
        panels[:, :, :held], rows[:, :, : self.capacity] = self.panels, self.rows
        self.panels, self.rows, self.capacity = panels, rows, capacity

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def plain(self) -> list[DynamicLayer]:
        """The same keys and values as transformers' own kind of layers, for what the kernels do not do."""
        layers = []
        for panels, rows in zip(self.panels, self.rows, strict=True):
            layer = DynamicLayer()
            if self.length:
                keys = panels.transpose(2, 3).flatten(1, 2)[None, :, : self.length]
                layer.update(keys.contiguous(), rows[None, :, : self.length, : self.head_dim].contiguous())
            layers.append(layer)
        return layers


def _zeros(*shape: int) -> Tensor:
    return huge_pages(4 * math.prod(shape)).view(torch.float32).view(shape).zero_()
