"""Runs sequences one by one and in one batch, to test that they do not change each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 2


def sequences(count: int = 3, tokens: int = 8) -> Tensor:
    """Return token ids (count, tokens)."""
    return torch.randint(1, 257, (count, tokens), generator=torch.Generator().manual_seed(4))


def decode(whole: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the hidden states (b, t, d) before the head. The last `STEPS` tokens are decoded one by one."""
    states, cache, first = [], None, 0
    for end in range(tokens.shape[1] - STEPS, tokens.shape[1] + 1):
        own_mask = None if mask is None else mask[:, :end]
        output = whole.base_model(tokens[:, first:end], attention_mask=own_mask, cache=cache, use_cache=True)
        states.append(output.last_hidden_state)
        cache, first = output.cache, end
    return torch.cat(states, dim=1)


def largest_change(whole: nn.Module, batch_of: nn.Module | None = None) -> float:
    """Return how much the hidden states of a sequence change in a batch, relative to their norm.

    Attention and the router multiply floats, and their sums may have another order in a batch. Another scale changes
    the states by more than 1e-3.

    Args:
        whole: The model that runs each sequence alone.
        batch_of: The model that runs the batch, if it is another one.
    """
    tokens = sequences()
    alone = torch.cat([decode(whole, row[None]) for row in tokens])
    change = (decode(batch_of or whole, tokens) - alone).norm(dim=-1) / alone.norm(dim=-1)
    return float(change.max())
