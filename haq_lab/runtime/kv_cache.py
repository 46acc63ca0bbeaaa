"""Store keys and values in the native kernels' layout, as one layer of a transformers cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from haq_lab.hardware.huge_pages import huge_pages
from haq_lab.int8.cpu.bindings import PANEL


class KVCache(DynamicLayer):
    """KV cache of the layers of one `NativeStack`, for a batch of sequences.

    Padding is not stored. Transformers counts it as positions, so `length` includes it. The capacity doubles when it
    is used up, so most decode steps copy and allocate nothing. kernels/cpu/decoder.h describes the layout.

    A prefix is stored before the tokens of every sequence. Transformers does not count it, so `length` does not
    include it.

    Args:
        layers: Number of decoder layers. 1 if each layer may overwrite the keys and values of the layer before it.
        heads: Key-value heads of a layer.
        head_dim: Width of a head.
        prefix: Keys and values of a prefix, each (layers, heads, p, head_dim), or None.
        is_sliding: Whether the layers have a sliding window. All keys stay in the cache nevertheless.

    Attributes:
        length: Number of positions, including padding.
        tokens: Which positions are tokens and not padding, bool (b, length). None if there is no padding.
        stored: Number of tokens of each sequence, with the prefix. Empty if the cache is new.
        capacity: Number of tokens of a sequence that fit.
        panels: Keys, float32 (layers, b, heads, capacity / 32, head_dim, 32).
        rows: Values, float32 (layers, b, heads, capacity, head_dim rounded up to a multiple of 32).
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        prefix: tuple[Tensor, Tensor] | None = None,
        is_sliding: bool = False,
    ):
        super().__init__()
        self.head_dim, self.is_sliding = head_dim, is_sliding  # transformers reads the second
        self._shape = layers, heads, head_dim
        self._prefix = prefix
        self._before = 0 if prefix is None else prefix[0].shape[2]
        self.reset()

    def reset(self) -> None:
        """Remove all sequences."""
        layers, heads, head_dim = self._shape
        self.length = self.capacity = 0
        self.tokens: Tensor | None = None
        self.stored: list[int] = []
        self.panels = torch.empty(layers, 0, heads, 0, head_dim, PANEL)
        self.rows = torch.empty(layers, 0, heads, 0, -(-head_dim // PANEL) * PANEL)

    def reserve(self, more: Sequence[int]) -> None:
        """Enlarge the capacity so that `more[i]` tokens can be added to sequence i. A new cache gets `len(more)`."""
        is_new = not self.stored
        if is_new:
            self.stored = [self._before] * len(more)
        needed = max(stored + new for stored, new in zip(self.stored, more, strict=True))
        if needed <= self.capacity and not is_new:
            return
        batch = len(self.stored)
        capacity = max(-(-needed // PANEL), 2 * self.capacity // PANEL, 8 // batch) * PANEL
        layers, heads, head_dim = self._shape
        panels = _zeros(layers, batch, heads, capacity // PANEL, head_dim, PANEL)
        rows = _zeros(layers, batch, heads, capacity, self.rows.shape[-1])
        if self.capacity:
            panels[:, :, :, : self.capacity // PANEL], rows[:, :, :, : self.capacity] = self.panels, self.rows
        self.panels, self.rows, self.capacity = panels, rows, capacity
        if is_new and self._prefix is not None:
            self._write_prefix(*self._prefix)

    def _write_prefix(self, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values (layers, heads, p, head_dim) of a prefix before the tokens of every sequence."""
        self.rows[:, :, :, : self._before, : values.shape[-1]] = values[:, None]
        for position, key in enumerate(keys.unbind(dim=2)):
            self.panels[:, :, :, position // PANEL, :, position % PANEL] = key[:, None]

    def extend(self, positions: int, more: Sequence[int], tokens: Tensor | None) -> None:
        """Count new positions, whose keys and values the kernels have written.

        Args:
            positions: Number of new positions, including padding.
            more: Number of new tokens of each sequence.
            tokens: As the attribute, for all positions.
        """
        self.length += positions
        self.stored = [stored + new for stored, new in zip(self.stored, more, strict=True)]
        self.tokens = tokens

    def get_seq_length(self) -> int:
        """Return the number of positions, including padding."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions. The number is negative, as in transformers."""
        removed = min(abs(tokens_to_remove), self.length)
        if removed == 0:
            return
        self.length -= removed
        if self.tokens is None:
            self.stored = [self._before + self.length] * len(self.stored)
        else:
            self.tokens = self.tokens[:, : self.length]
            self.stored = (self._before + self.tokens.sum(1)).tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those with the given indices, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.batch_select_indices(torch.arange(len(self.stored)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences with the given indices, in this order."""
        if not self.stored:
            return
        self.panels, self.rows = self.panels.index_select(1, indices), self.rows.index_select(1, indices)
        self.stored = [self.stored[index] for index in indices.tolist()]
        self.tokens = None if self.tokens is None else self.tokens[indices]

    def to_dynamic_layers(self) -> list[DynamicLayer]:
        """Convert to transformers' own cache layers, one per decoder layer, for code that the kernels do not cover.

        Keys and values of padding are zeros. No query attends to them. The prefix is left out, because the layers have
        it themselves.
        """
        layers = []
        for panels, rows in zip(self.panels, self.rows, strict=True):
            layer = DynamicLayer()
            if self.length:
                keys = panels.transpose(3, 4).flatten(2, 3)
                layer.update(self._with_padding(keys), self._with_padding(rows[..., : keys.shape[-1]]))
            layers.append(layer)
        return layers

    def _with_padding(self, x: Tensor) -> Tensor:
        """Put the stored tokens (b, heads, capacity, head_dim) at their positions, (b, heads, length, head_dim)."""
        if self.tokens is None:
            return x[:, :, self._before : self._before + self.length].contiguous()
        padded = x.new_zeros(*x.shape[:2], self.length, x.shape[-1])
        for sequence, tokens in enumerate(self.tokens):
            padded[sequence, :, tokens] = x[sequence, :, self._before : self.stored[sequence]]
        return padded


def _zeros(*shape: int) -> Tensor:
    return huge_pages(4 * math.prod(shape)).view(torch.float32).view(shape).zero_()
