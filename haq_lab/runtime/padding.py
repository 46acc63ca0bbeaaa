"""Find the padding of a batch in the attention mask that transformers passes to the decoder layers.

The native kernels compute the real tokens only. They take the sequences one after the other, without padding, so a
sequence has the same bits alone and in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.utils.errors import UserError


class UnsupportedCallError(Exception):
    """A call that the native decoder cannot compute. The message is the reason in plain words."""


def find_tokens(mask: Tensor | None, batch: int, new: int, past: int, earlier: Tensor | None) -> Tensor | None:
    """Return which positions of a batch are tokens and not padding.

    Padding may be anywhere: on the left, on the right, or between a padded prompt and its continuation.

    Args:
        mask: True where a query may attend to a key, bool (batch or 1, 1, new, past + new). None means causal
            attention without padding.
        batch: Number of sequences.
        new: Number of new positions, including padding.
        past: Number of positions in the KV cache, including padding.
        earlier: The result for the positions in the cache.

    Returns:
        bool (batch, past + new), or None if there is no padding.

    Raises:
        UnsupportedCallError: The mask is not causal attention to the tokens.
        UserError: The mask shows a position that was padding in an earlier call, so the cache has no key for it.
    """
    tokens = None if mask is None else _last_row(mask, batch, new, past)
    if earlier is not None:
        _refuse_shown_padding(tokens, earlier)
    if mask is None or tokens is None:
        return None
    if not bool((tokens[:, :past] if earlier is None else tokens[:, :past] == earlier).all()):
        raise UnsupportedCallError("the attention mask hides tokens that an earlier call has shown")
    # The rows of padding do not matter, because they are not computed.
    causal = torch.ones(new, past + new, dtype=torch.bool, device=mask.device).tril(past)
    same = (mask[:, 0] == (causal & tokens[:, None])) | ~tokens[:, past:, None]
    if not bool(same.all()):
        raise UnsupportedCallError("the attention mask is not causal")
    return None if bool(tokens.all()) else tokens


def _last_row(mask: Tensor, batch: int, new: int, past: int) -> Tensor:
    """Return the keys that the last position sees, bool (batch, past + new)."""
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise UnsupportedCallError("the attention mask is not a boolean mask with four dimensions")
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, new, past + new):
        raise UnsupportedCallError(f"the attention mask of shape {tuple(mask.shape)} does not fit the KV cache")
    return mask[:, 0, -1].expand(batch, -1)


def _refuse_shown_padding(tokens: Tensor | None, earlier: Tensor) -> None:
    padding = ~earlier
    shown = padding if tokens is None else padding & tokens[:, : padding.shape[1]]
    if bool(shown.any()):
        sequence, position = shown.nonzero()[0].tolist()
        raise UserError(
            f"attention_mask: position {position} of sequence {sequence} was padding in an earlier call, so the KV "
            "cache has no key for it. Mask it in every call, or begin with a new cache."
        )
