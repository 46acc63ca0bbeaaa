"""Put the keys and values of a prefix before those of every sequence, in the attention function.

`haq_lab.prefix` says why here. transformers looks the function up by `config._attn_implementation`, so it serves every
architecture. Every query sees the whole prefix, also with a sliding window, and padding hides none of it.

    config._attn_implementation = IMPLEMENTATION
    attach(layer.self_attn, keys, values)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "haq_lab_prefix"
KEYS, VALUES = "prefix_keys", "prefix_values"  # buffers of an attention module: (1, key-value heads, p, head_dim)


def attach(attention: nn.Module, keys: Tensor, values: Tensor) -> None:
    """Give an attention module its own copy of the keys and values (heads, p, head_dim) of a prefix.

    They are part of its state, because what is folded into the value projection is folded into the values too.
    """
    attention.register_buffer(KEYS, keys[None].clone())
    attention.register_buffer(VALUES, values[None].clone())


def attached(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the keys and values (heads, p, head_dim) of the prefix in a decoder layer, or None if it has none."""
    for module in layer.modules():
        if KEYS in module._buffers:
            return module.get_buffer(KEYS)[0], module.get_buffer(VALUES)[0]
    return None


def prefix_values(attention: nn.Module) -> Tensor | None:
    """Return the values (1, heads, p, head_dim) of the prefix in an attention module, or None if it has none.

    Whoever changes what the value projection computes must change them in place in the same way.
    """
    return attention._buffers.get(VALUES)


@contextmanager
def detached(layer: nn.Module) -> Iterator[None]:
    """Run a decoder layer without its prefix within a `with` statement."""
    modules = [module for module in layer.modules() if KEYS in module._buffers]
    buffers = [{name: module._buffers.pop(name) for name in (KEYS, VALUES)} for module in modules]
    try:
        yield
    finally:
        for module, own in zip(modules, buffers, strict=True):
            module._buffers |= own


def prefixed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Compute attention to the module's prefix and to the given keys. Without a prefix this is transformers' `sdpa`.

    Args:
        module: The attention module.
        query: Queries (b, heads, t, head_dim).
        key: Keys (b, key-value heads, n, head_dim), without the prefix.
        value: Values (b, key-value heads, n, head_dim).
        attention_mask: Mask (b or 1, heads or 1, t, n), boolean or added to the scores. None means causal attention.
        arguments: Further arguments of `sdpa`.

    Returns:
        Outputs (b, t, heads, head_dim), and None in place of the attention weights.
    """
    keys = module._buffers.get(KEYS)
    if keys is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    new, batch = query.shape[2], len(query)
    if attention_mask is None and new > 1:  # as `sdpa`, which drops the free places of a static cache
        key, value = key[:, :, :new], value[:, :, :new]
        attention_mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        shape = *attention_mask.shape[:-1], keys.shape[2]
        visible = torch.ones if attention_mask.dtype == torch.bool else torch.zeros
        seen = visible(shape, dtype=attention_mask.dtype, device=attention_mask.device)
        attention_mask = torch.cat([seen, attention_mask], dim=-1)
    both = (keys, key), (module.get_buffer(VALUES), value)
    key, value = (torch.cat([first.to(own.dtype).expand(batch, -1, -1, -1), own], dim=2) for first, own in both)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)


AttentionInterface.register(IMPLEMENTATION, prefixed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
