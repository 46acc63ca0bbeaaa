"""Number the positions of tokens that follow a prefix.

A prefix of p tokens has the positions -p to -1, and the tokens after it have the positions that they would have without
it. A table of learned positions has no negative ones, so it is shifted: position i reads row i + p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ShiftedPositions(nn.Module):
    """A table of learned positions that is read `shift` rows later.

    Args:
        table: The table, whose forward takes `position_ids`.
        shift: Number of rows.
    """

    def __init__(self, table: nn.Module, shift: int):
        super().__init__()
        self.table, self.shift = table, shift

    def forward(self, *arguments: Any, position_ids: Tensor, **others: Any) -> Tensor:
        """Return the embeddings (b, t, d) of positions (b, t)."""
        return self.table(*arguments, position_ids=position_ids + self.shift, **others)


def number_padded_batches(decoder: nn.Module) -> None:
    """Make a module that calls decoder layers number the tokens of a padded batch from 0, whatever is left of them.

    transformers counts padding if a forward gets no `position_ids`. Without a prefix this makes no difference, because
    only differences of positions matter. With one, padding would lie between the prefix and the tokens. Calling this
    twice changes nothing.

    Args:
        decoder: A transformers module that takes token ids or embeddings, and an attention mask.
    """
    if _number not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_number, with_kwargs=True)


def _number(
    decoder: nn.Module, arguments: tuple[Any, ...], others: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    inputs = dict(zip(("input_ids", "attention_mask", "position_ids"), arguments, strict=False)) | {**others}
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or inputs.get("position_ids") is not None or len(arguments) > 2:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    positions = (torch.cumsum(mask.long(), dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return arguments, {**others, "position_ids": positions}
