"""Compute the keys and values of a prefix in full precision, one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from haq_lab.models.layerwise import LayeredModel
from haq_lab.prefix.contents import Prefix, States
from haq_lab.result_cache.keys import key_of, of_text
from haq_lab.result_cache.store import Artifact, Store
from haq_lab.utils.malloc import release_memory

STAGE = "prefix"


@torch.no_grad()
def compute_prefix(model: LayeredModel, tokens: tuple[int, ...], text: str) -> Prefix:
    """Run the tokens of a prefix through the full-precision model, and return their keys and values.

    Args:
        model: The full-precision model, without a prefix.
        tokens: Token ids.
        text: The tokens as text.
    """
    ids, first = torch.tensor([tokens]), 0 if model.family.learned_positions else -len(tokens)
    hidden, arguments = model.embed_at(ids, torch.arange(first, first + len(tokens))[None])
    keys, values = [], []
    for index in range(model.depth):
        cache = DynamicCache()
        hidden = model.load_layer(index)(hidden, **arguments[index] | {"cache": cache})
        stored: Any = cache.layers[index]
        keys.append(stored.keys[0].float())
        values.append(stored.values[0].float())
        release_memory()
    return Prefix(tokens, text, States(torch.stack(keys), torch.stack(values)))


def cached_prefix(store: Store, model: LayeredModel, tokens: tuple[int, ...], text: str) -> Prefix:
    """Return the same prefix from the result cache, or compute and store it. See `compute_prefix`."""
    if store.folder is None:
        return compute_prefix(model, tokens, text)

    def compute() -> Artifact:
        states = compute_prefix(model, tokens, text).states
        return Artifact(vars(states).copy())

    key = key_of(STAGE, (__name__,), **of_text(model, torch.tensor([tokens])))
    found = store.fetch(STAGE, key, compute, f"{model.folder.name}, {len(tokens)} tokens")
    return Prefix(tokens, text, States(**found.tensors))
