"""Decoder layers as one call of the native kernels: norms, products and attention without Python between them.

    stack = NativeStack(layers, parts, first=0)
    hidden = stack(hidden, position_embeddings=(cos, sin), cache=cache)

The int8 products are those of `Int8Linear`. What lies between them (norms, softmax, SiLU) is float32 and differs from
torch's in the last places, so perplexity is measured on the layers as they were; this is for running the model.
What a layer is made of follows from the family's groups. Whether it is really computed so - that the norm is an RMS
norm, that positions are rotated - is not asked of names but tried: a layer that is not reproduced stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from haq_lab.int8 import native
from haq_lab.int8.key_values import KeyValues
from haq_lab.int8.layer_parts import LayerParts

PROBE_TOKENS, PROBES = 40, 4  # tokens: more than a panel of keys
TOLERANCE = 1e-4  # of what the layer adds to a token, for most tokens: where a value lies between two int8 levels,
# the last place of a float32 decides to which side it falls, and a token is off by one level of one value.


class NativeStack(nn.Module):
    """Takes the place of decoder layers that follow one another, which it keeps for what the kernels do not do.

    One sequence at a time, causal, is done natively; batches and masks go the layers' own way.

    Args:
        layers: The decoder layers.
        parts: What they are made of, with the same heads in all.
        first: The first one's number in the model.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.first = first
        self.kv_heads, self.head_dim = parts[0].heads_of
        self.width: int = parts[0].output.n
        self._parts = (LayerParts * len(parts))(*parts)
        self._run = native.library().haq_decoder_layers

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> Tensor:
        """Hidden states (1, t, d) float32 -> the same; (b, t, d) and masks by the layers' own code."""
        kept = self.new_cache() if cache is None else self._kept(cache)
        native_case = attention_mask is None and hidden.shape[0] == 1 and hidden.dtype == torch.float32
        if native_case and position_embeddings is not None and kept is not None:
            return self.step(hidden, *position_embeddings, kept)
        if cache is not None and kept is not None:
            cache.layers[self.first : self.first + len(self.layers)] = kept.plain()
        arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "cache": cache}
        for layer in self.layers:
            hidden = layer(hidden, **arguments, **others)
        return hidden

    def new_cache(self) -> KeyValues:
        """Empty keys and values."""
        return KeyValues(len(self.layers), self.kv_heads, self.head_dim)

    def _kept(self, cache: Cache) -> KeyValues | None:
        """The stack's keys and values in the cache, put there if it is new; None if it holds another kind."""
        while len(cache.layers) < self.first + len(self.layers):
            cache.layers.append(DynamicLayer())
        kept = cache.layers[self.first]
        if type(kept) is DynamicLayer and kept.get_seq_length() == 0:
            kept = cache.layers[self.first] = self.new_cache()
        return kept if isinstance(kept, KeyValues) else None

    def step(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kept: KeyValues) -> Tensor:
        """Hidden states (1, t, d) that follow those of `kept`, at positions (1, t, head_dim); `kept` grows by t."""
        tokens = hidden.shape[1]
        kept.reserve(tokens)
        out = hidden.clone(memory_format=torch.contiguous_format)
        cosines, sines = cosines.contiguous(), sines.contiguous()
        failed = self._run(
            native.level(), torch.get_num_threads(), ctypes.byref(self._parts), len(self._parts),
            out.data_ptr(), tokens, cosines.data_ptr(), sines.data_ptr(),
            kept.panels.data_ptr(), kept.rows.data_ptr(), kept.capacity, kept.length,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"decoder layers over {tokens} tokens")
        kept.length += tokens
        return out

    @torch.no_grad()
    def reproduces_its_layers(self) -> bool:
        """Whether the tokens of a prompt, and one after it, come out as from the layers' own code."""
        # Where an early token's key falls to another level, all later ones see it: hence several probes.
        try:
            return any(bool(self._errors(seed).median() <= TOLERANCE) for seed in range(PROBES))
        except (TypeError, RuntimeError, ValueError):  # they need other arguments: not this kind of layer
            return False

    def _errors(self, seed: int) -> Tensor:
        """By how much each of a few random tokens differs, as a share of what the layers' own code adds to it."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, PROBE_TOKENS, self.width, generator=generator)
        angles = torch.randn(1, PROBE_TOKENS, self.head_dim // 2, generator=generator).repeat(1, 1, 2)
        cosines, sines = angles.cos(), angles.sin()
        wanted = hidden.clone()
        for layer in self.layers:
            wanted = layer(wanted, position_embeddings=(cosines, sines), attention_mask=None)
        kept, last = self.new_cache(), PROBE_TOKENS - 1
        parts = (slice(last), slice(last, None))
        got = torch.cat([self.step(hidden[:, p], cosines[:, p], sines[:, p], kept) for p in parts], dim=1)
        return (got - wanted).norm(dim=-1) / (wanted - hidden).norm(dim=-1)


def stacked(layers: Sequence[nn.Module], parts: Sequence[LayerParts | None]) -> list[nn.Module]:
    """The layers with every run of native ones, of the same heads, replaced by a stack."""
    result: list[nn.Module] = []
    run: list[tuple[nn.Module, LayerParts]] = []
    for index, (layer, part) in enumerate(zip([*layers, None], [*parts, None], strict=True)):
        if run and (part is None or part.heads_of != run[0][1].heads_of):
            result.append(NativeStack([one for one, _ in run], [its for _, its in run], index - len(run)))
            run = []
        if layer is not None and part is not None:
            run.append((layer, part))
        elif layer is not None:
            result.append(layer)
    return result
