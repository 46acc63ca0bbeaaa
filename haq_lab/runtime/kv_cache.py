"""Store keys and values in the native kernels' layout, as one layer of a transformers cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from haq_lab.int8.cpu.bindings import PANEL
from haq_lab.utils.huge_pages import huge_pages


class KVCache(DynamicLayer):
    """KV cache of the layers of one `NativeStack`.

    The capacity doubles when it is used up, so most decode steps copy and allocate nothing. kernels/cpu/decoder.h
    describes the layout.

    Args:
        layers: Number of decoder layers.
        heads: Key-value heads of a layer.
        head_dim: Width of a head.

    Attributes:
        length: Number of positions stored.
        capacity: Number of positions that fit.
        panels: Keys, float32 (layers, heads, capacity / 32, head_dim, 32).
        rows: Values, float32 (layers, heads, capacity, head_dim rounded up to a multiple of 32).
    """

    def __init__(self, layers: int, heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.length = self.capacity = 0
        self.panels = torch.empty(layers, heads, 0, head_dim, PANEL)
        self.rows = torch.empty(layers, heads, 0, -(-head_dim // PANEL) * PANEL)

    def reserve(self, more: int) -> None:
        """Enlarge the capacity so that `more` positions can be added."""
        needed = self.length + more
        if needed <= self.capacity:
            return
        capacity = max(-(-needed // PANEL) * PANEL, 2 * self.capacity, 8 * PANEL)
        filled = self.panels.shape[2]
        panels = _zeros(*self.panels.shape[:2], capacity // PANEL, *self.panels.shape[3:])
        rows = _zeros(*self.rows.shape[:2], capacity, self.rows.shape[-1])
        panels[:, :, :filled], rows[:, :, : self.capacity] = self.panels, self.rows
        self.panels, self.rows, self.capacity = panels, rows, capacity

    def get_seq_length(self) -> int:
        """Return the number of positions stored."""
        return self.length

    def to_dynamic_layers(self) -> list[DynamicLayer]:
        """Convert to transformers' own cache layers, one per decoder layer, for code that the kernels do not cover."""
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
