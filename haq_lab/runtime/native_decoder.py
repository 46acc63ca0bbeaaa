"""Decoder layers as one call of the native kernels: norms, products and attention without Python between them.

    stack = NativeStack(layers, parts, first=0)
    hidden = stack(hidden, position_embeddings=(cos, sin), cache=cache)

The int8 products are those of `Int8Linear`. What lies between them (norms, softmax, SiLU) is float32 and differs from
torch's in the last places, so perplexity is measured on the layers as they were; this is for running the model.
What a layer is made of follows from the family's groups. Whether it is really computed so - that the norm is an RMS
norm, that positions are rotated - is not asked of names but tried: a layer that is not reproduced stays as it is.

Layers with a Mixture of Experts are part of the call where all experts are in memory. Where an engine is to serve them,
or their activation is not ours, each one's attention half is a call, and its MLP runs as it does alone (`MoeStack`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from haq_lab.int8.cpu import bindings as native
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.runtime.kv_cache import KVCache
from haq_lab.runtime.layer_parts import LayerParts

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
        self.kv_heads, self.head_dim = parts[0].kv_heads, parts[0].head_dim
        self.width: int = parts[0].output.n
        self._parts = (LayerParts * len(parts))(*parts)
        self._experts = [module for layer in layers for module in layer.modules() if isinstance(module, Int8Experts)]

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
        native_case = native_case and not self._taken_over()
        if native_case and position_embeddings is not None and kept is not None:
            return self.step(hidden, *position_embeddings, kept)
        if cache is not None and kept is not None:
            cache.layers[self.first : self.first + len(self.layers)] = kept.plain()
        arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "cache": cache}
        for layer in self.layers:
            hidden = layer(hidden, **arguments, **others)
        return hidden

    def _taken_over(self) -> bool:
        """Whether an engine has put itself before experts that the native layers hold: their weights are gone."""
        return any("forward" in vars(experts) for experts in self._experts)

    def new_cache(self) -> KVCache:
        """Empty keys and values."""
        return KVCache(len(self.layers), self.kv_heads, self.head_dim)

    def _kept(self, cache: Cache) -> KVCache | None:
        """The stack's keys and values in the cache, put there if it is new; None if it holds another kind."""
        while len(cache.layers) < self.first + len(self.layers):
            cache.layers.append(DynamicLayer())
        kept = cache.layers[self.first]
        if type(kept) is DynamicLayer and kept.get_seq_length() == 0:
            kept = cache.layers[self.first] = self.new_cache()
        return kept if isinstance(kept, KVCache) else None

    def step(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kept: KVCache) -> Tensor:
        """Hidden states (1, t, d) that follow those of `kept`, at positions (1, t, head_dim); `kept` grows by t."""
        tokens = hidden.shape[1]
        kept.reserve(tokens)
        out = hidden.clone(memory_format=torch.contiguous_format)
        self._compute(out, cosines.contiguous(), sines.contiguous(), kept)
        kept.length += tokens
        return out

    def _compute(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kept: KVCache) -> None:
        """The layers, in place; there is room for the tokens' keys and values."""
        tokens = hidden.shape[1]
        failed = native.library().haq_decoder_layers(
            native.level(), torch.get_num_threads(), ctypes.byref(self._parts), len(self._parts),
            hidden.data_ptr(), tokens, cosines.data_ptr(), sines.data_ptr(),
            kept.panels.data_ptr(), kept.rows.data_ptr(), kept.capacity, kept.length,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"decoder layers over {tokens} tokens")

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


class MoeStack(NativeStack):
    """A stack of Mixture-of-Experts layers: each one's attention half is a call, then its own router and experts run.

    Args:
        layers: As for a `NativeStack`.
        parts: As for a `NativeStack`.
        first: As for a `NativeStack`.
        block: The name in a layer of what it has for an MLP.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int, block: str):
        super().__init__(layers, parts, first)
        self.block = block

    def _taken_over(self) -> bool:
        return False  # experts are called as modules, whoever serves them

    def _compute(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kept: KVCache) -> None:
        run, level, threads = native.library().haq_attention, native.level(), torch.get_num_threads()
        normed, tokens = torch.empty_like(hidden), hidden.shape[1]
        parts, given, read = ctypes.byref(self._parts), hidden.data_ptr(), normed.data_ptr()
        tables = cosines.data_ptr(), sines.data_ptr(), kept.panels.data_ptr(), kept.rows.data_ptr()
        for index, layer in enumerate(self.layers):
            if run(level, threads, parts, index, given, read, tokens, *tables, kept.capacity, kept.length):
                raise MemoryError(f"attention over {tokens} tokens")
            hidden += layer.get_submodule(self.block)(normed)

    def _errors(self, seed: int) -> Tensor:
        """Of the attention halves, with nothing added after them, and of what the MLPs read: not of the MLPs, which
        are the same, and whose experts may not be in memory."""
        with self._stand_ins() as notes:
            errors = super()._errors(seed)
        for wanted, *got in (note.read for note in notes):
            error = (torch.cat(got, dim=1) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            errors = torch.maximum(errors, error)
        return errors

    @contextmanager
    def _stand_ins(self) -> Iterator[list[_Note]]:
        """Within the block, notes take the MLPs' places."""
        blocks = [layer.get_submodule(self.block) for layer in self.layers]
        notes = [_Note() for _ in blocks]
        try:
            for layer, note in zip(self.layers, notes, strict=True):
                layer.set_submodule(self.block, note)
            yield notes
        finally:
            for layer, block in zip(self.layers, blocks, strict=True):
                layer.set_submodule(self.block, block)


class _Note(nn.Module):
    """Notes what it reads, and gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.read.append(x.clone())
        return torch.zeros_like(x)


def stack_of(layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int, block: str | None) -> NativeStack:
    """Layers of one kind as a stack; `block` is what those with a Mixture of Experts have for an MLP."""
    if parts[0].whole:
        return NativeStack(layers, parts, first)
    assert block is not None, "a dense MLP is in every part"
    return MoeStack(layers, parts, first, block)


def stacked(
    layers: Sequence[nn.Module], parts: Sequence[LayerParts | None], block: str | None = None
) -> list[nn.Module]:
    """The layers with every run of native ones, of the same kind, replaced by a stack."""
    result: list[nn.Module] = []
    run: list[tuple[nn.Module, LayerParts]] = []
    for index, (layer, part) in enumerate(zip([*layers, None], [*parts, None], strict=True)):
        if run and (part is None or part.kind != run[0][1].kind):
            result.append(stack_of([one for one, _ in run], [its for _, its in run], index - len(run), block))
            run = []
        if layer is not None and part is not None:
            run.append((layer, part))
        elif layer is not None:
            result.append(layer)
    return result
