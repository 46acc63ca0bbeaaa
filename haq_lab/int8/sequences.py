"""Find out which activation rows belong to the same sequence, for the activation scheme `tensor`.

A linear often receives the rows of a batch without its shape: OPT flattens the batch before its MLP, and an expert
receives tokens of several sequences. So whoever runs a batch declares it, and the linears look it up:

    with batch_of(2, 5):          # two sequences of five tokens
        y = linear(x.view(10, k))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sequences:
    """Assigns each activation row to a sequence.

    Attributes:
        index: (m,) int64, the sequence of each row.
        count: Number of sequences. Every index is smaller.
    """

    index: Tensor
    count: int

    @classmethod
    def of_batch(cls, batch: int, tokens: int, mask: Tensor | None = None) -> Sequences | None:
        """Return the sequences of a flattened batch (b, t), or None if all rows belong to one sequence.

        Args:
            batch: Number of sequences b.
            tokens: Number of tokens t of each sequence, with padding.
            mask: (b, t), zero at padding, or None without padding. The padding of a sequence counts as a sequence of
                its own, so it does not change the scale of the other tokens.
        """
        padded = mask is not None and not bool(mask.all())
        if batch == 1 and not padded:
            return None
        index = torch.arange(batch, device=None if mask is None else mask.device)[:, None].expand(batch, tokens)
        if mask is not None and padded:
            index = torch.where(mask.bool(), index, index + batch)
        return cls(index.reshape(-1), 2 * batch if padded else batch)

    def select(self, rows: Tensor) -> Sequences:
        """Return the sequences of some rows, given their indices (m,)."""
        return Sequences(self.index[rows], self.count)

    def maximum(self, values: Tensor) -> Tensor:
        """Return, for each row, the largest of the `values` (m,) >= 0 in its sequence."""
        index = self.index.to(values.device)
        return values.new_zeros(self.count).scatter_reduce_(0, index, values, "amax")[index]


class _Rows:
    """The rows that the model is running. Their sequences are computed only if a linear looks them up."""

    def __init__(self, count: int, find: Callable[[], Sequences | None]):
        self.count, self._find = count, find

    @cached_property
    def sequences(self) -> Sequences | None:
        return self._find()


_rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)


@contextmanager
def batch_of(batch: int, tokens: int) -> Iterator[None]:
    """Declare a batch of sequences of equal length for the forward within the block."""
    before = _rows.set(_Rows(batch * tokens, lambda: Sequences.of_batch(batch, tokens)))
    try:
        yield
    finally:
        _rows.reset(before)


@contextmanager
def only_rows(rows: Tensor) -> Iterator[None]:
    """Within the block, linears receive only these rows (m,) of the declared batch."""
    outer = _rows.get()

    def select() -> Sequences | None:
        sequences = None if outer is None else outer.sequences
        return None if sequences is None else sequences.select(rows)

    before = _rows.set(_Rows(len(rows), select))
    try:
        yield
    finally:
        _rows.reset(before)


def sequences_of(x: Tensor) -> Sequences | None:
    """Return the sequences of the rows of x (..., k), or None if all rows belong to one sequence.

    They are those of the declared batch. If x has other rows, or no batch is declared, x (b, t, k) is a batch itself.
    """
    declared, shape = _rows.get(), x.shape[:-1]
    if declared is not None and declared.count == shape.numel():
        return declared.sequences
    return Sequences.of_batch(len(x), shape[1:].numel()) if len(shape) > 1 else None


def declare_batches(model: nn.Module) -> None:
    """Make the module that calls the decoder layers declare its batch in every forward, with the mask's padding.

    Args:
        model: A transformers module that takes token ids or embeddings, and an attention mask.
    """
    model.register_forward_pre_hook(_declare, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def _declare(model: nn.Module, arguments: tuple[Any, ...], others: Mapping[str, Any]) -> None:
    inputs = dict(zip(("input_ids", "attention_mask"), arguments, strict=False)) | {**others}
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:  # transformers refuses it
        return
    batch, length = tokens.shape[:2]
    # The mask also covers earlier tokens, whose keys are in the KV cache.
    recent = mask[:, -length:] if isinstance(mask, Tensor) and mask.dim() == 2 else None
    _rows.set(_Rows(batch * length, lambda: Sequences.of_batch(batch, length, recent)))


def _end(model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    _rows.set(None)
