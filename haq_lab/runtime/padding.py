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


def find_tokens(
    mask: Tensor | None, batch: int, new: int, past: int, earlier: Tensor | None, window: int = 0
) -> Tensor | None:
    """Return which positions of a batch are tokens and not padding.

    Padding may be anywhere: on the left, on the right, or between a padded prompt and its continuation.

    Args:
        mask: True, or 0 to be added, where a query may attend to a key: (batch or 1, 1, new, past + new). None means
            causal attention without padding.
        batch: Number of sequences.
        new: Number of new positions, including padding.
        past: Number of positions in the KV cache, including padding.
        earlier: The result for the positions in the cache.
        window: Number of positions that a query sees, its own among them; 0 if it sees all before it.

    Returns:
        bool (batch, past + new), or None if there is no padding.

    Raises:
        UnsupportedCallError: The mask is not causal attention to the tokens.
        UserError: The mask shows a position that was padding in an earlier call, so the cache has no key for it.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask == 0
    tokens = None if mask is None else _seen(mask, batch, new, past, earlier, window)
    if earlier is not None:
        _refuse_shown_padding(tokens, earlier)
    if mask is None or tokens is None:
        if window and past + new > window:
            raise UnsupportedCallError("there is no attention mask for the sliding window")
        return None
    if not bool((tokens[:, :past] if earlier is None else tokens[:, :past] == earlier).all()):
        raise UnsupportedCallError("the attention mask hides tokens that an earlier call has shown")
    # The rows of padding do not matter, because they are not computed.
    causal = torch.ones(new, past + new, dtype=torch.bool, device=mask.device).tril(past)
    if window:
        causal = causal.triu(past + 1 - window)
    same = (mask[:, 0] == (causal & tokens[:, None])) | ~tokens[:, past:, None]
    if not bool(same.all()):
        raise UnsupportedCallError("the attention mask is not causal")
    if bool(tokens.all()):
        return None
    if window and past + new > window and bool((tokens[:, :-1] & ~tokens[:, 1:]).any()):
        raise UnsupportedCallError("padding follows tokens, and there is a sliding window")
    return tokens


def _seen(mask: Tensor, batch: int, new: int, past: int, earlier: Tensor | None, window: int) -> Tensor:
    """Return the keys that a position sees, bool (batch, past + new): the last position, or each one itself.

    With a sliding window, the last position does not see all tokens. The earlier ones are then those of the cache.
    """
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise UnsupportedCallError("the attention mask is not a boolean mask with four dimensions")
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, new, past + new):
        raise UnsupportedCallError(f"the attention mask of shape {tuple(mask.shape)} does not fit the KV cache")
    if not window:
        return mask[:, 0, -1].expand(batch, -1)
    before = mask.new_ones(batch, past) if earlier is None else earlier
    return torch.cat([before, mask[:, 0].diagonal(past, 1, 2).expand(batch, -1)], dim=1)


def _refuse_shown_padding(tokens: Tensor | None, earlier: Tensor) -> None:
    padding = ~earlier
    shown = padding if tokens is None else padding & tokens[:, : padding.shape[1]]
    if bool(shown.any()):
        sequence, position = shown.nonzero()[0].tolist()
        raise UserError(
            f"attention_mask: position {position} of sequence {sequence} was padding in an earlier call, so the KV "
            "cache has no key for it. Mask it in every call, or begin with a new cache."
        )
