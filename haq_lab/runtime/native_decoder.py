"""Run decoder layers in one call of the native CPU kernels, with no Python between norms, products and attention.

    stack = NativeStack(layers, parts, first=0)
    hidden = stack(hidden, position_embeddings=(cos, sin), cache=cache)

The int8 products are bit-identical to those of `Int8Linear`. Norms, softmax and SiLU are float32 and differ from
torch's in the last bits. Perplexity is therefore measured on the original layers, and stacks are used to run the model.

The family's groups say which modules a layer has. Whether the layer really computes RMSNorm, rotary positions and so
on is not read from class names. Instead the stack's output is compared with the layer's on random tokens, and a layer
that differs is not replaced.

Padding is removed before the call, so batches with left or right padding run natively, and a sequence has the same bits
alone and in a batch (`padding`).

A prefix (`haq_lab.prefix`) is the beginning of every KV cache. Its keys and values are those of the layers.

A Mixture of Experts is part of the call if all its experts are in memory and use SwiGLU. Otherwise the attention half
and a shared expert are native, and the router and the other experts run as modules (`MoeStack`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from haq_lab.int8.cpu import library
from haq_lab.models.families.family import Moe
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.prefix.attention import attached
from haq_lab.runtime.kv_cache import KVCache
from haq_lab.runtime.layer_parts import LayerParts, SequenceParts
from haq_lab.runtime.padding import UnsupportedCallError, find_tokens

_log = logging.getLogger(__name__)

PROBE_TOKENS = 40  # more than one panel of 32 keys
PROBES = 4
# Largest median error, as a share of what the layer adds to a token. Single tokens may differ by more: if a value is
# halfway between two int8 levels, the last bit of a float32 decides how it is rounded.
TOLERANCE = 1e-4


class NativeStack(nn.Module):
    """Consecutive decoder layers that run as one native call.

    Batches run natively if the attention is causal, with or without padding. Other attention masks, types and caches
    run through the original layers. The log says why, once for each reason.

    Args:
        layers: The decoder layers.
        parts: Their descriptions for the kernels. All have the same heads.
        first: Index of the first layer in the model.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.first = first
        self.kv_heads, self.head_dim = parts[0].kv_heads, parts[0].head_dim
        self.width: int = parts[0].output.n
        self.window: int = parts[0].window
        self.rotates = any(part.rotary for part in parts)
        self.rotary: int = max(part.rotary for part in parts) or self.head_dim
        self._parts = (LayerParts * len(parts))(*parts)
        self._norms = [part.norms for part in parts]  # which the structures point to
        self._experts = [module for layer in layers for module in layer.modules() if isinstance(module, Int8Experts)]
        self._logged: set[str] = set()
        prefixes = [prefix for layer in layers if (prefix := attached(layer)) is not None]
        self._prefix: tuple[Tensor, Tensor] | None = None
        if prefixes:
            keys, values = zip(*prefixes, strict=True)
            self._prefix = torch.stack(keys), torch.stack(values)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: Hidden states (b, t, d).
            attention_mask: As transformers passes it to a decoder layer.
            position_embeddings: Cosines and sines, as for `step`.
            cache: The model's KV cache, or None.
            others: Further arguments for the original layers.

        Returns:
            Hidden states (b, t, d). Those of padding are undefined.

        Raises:
            UserError: The attention mask shows a position that was padding in an earlier call.
        """
        kv = self._scratch() if cache is None else self._kv_in(cache)
        if position_embeddings is None and not self.rotates:
            position_embeddings = (hidden.new_zeros(1, hidden.shape[1], self.rotary),) * 2  # which no layer reads
        if not self._experts_replaced():
            try:
                positions, own = _check_call(hidden, position_embeddings, kv, self.rotary)
                batch, new = hidden.shape[:2]
                tokens = find_tokens(attention_mask, batch, new, own.length, own.tokens, self.window)
            except UnsupportedCallError as reason:
                self._log_once(str(reason))
            else:
                return self.step(hidden, *positions, own, tokens)
        if cache is not None and kv is not None:
            cache.layers[self.first : self.first + len(self.layers)] = kv.to_dynamic_layers()
        arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "cache": cache}
        for layer in self.layers:
            hidden = layer(hidden, **arguments, **others)
        return hidden

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("native decoder not used for this call: %s", reason)

    def _experts_replaced(self) -> bool:
        """Return whether an offload engine replaced the experts' forward. Their weights are then no longer here."""
        return any("forward" in vars(experts) for experts in self._experts)

    def new_cache(self) -> KVCache:
        """Return a KV cache for these layers, without tokens."""
        return KVCache(len(self.layers), self.kv_heads, self.head_dim, self._prefix, self.window > 0)

    def _scratch(self) -> KVCache:
        """Return a KV cache for one call. Its layers share their memory, unless each has its own prefix."""
        return KVCache(1, self.kv_heads, self.head_dim) if self._prefix is None else self.new_cache()

    def _kv_in(self, cache: Cache) -> KVCache | None:
        """Return this stack's KVCache in a model's cache, added if the cache is new. None if it has another kind."""
        while len(cache.layers) < self.first + len(self.layers):
            cache.layers.append(DynamicLayer())
        kv: Any = cache.layers[self.first]
        if type(kv) in (DynamicLayer, DynamicSlidingWindowLayer) and kv.get_seq_length() == 0:
            kv = cache.layers[self.first] = self.new_cache()
        return kv if isinstance(kv, KVCache) else None

    def step(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kv: KVCache, tokens: Tensor | None = None) -> Tensor:
        """Run the layers natively on the next positions of a batch.

        Args:
            hidden: Hidden states of t new positions, (b, t, d) float32.
            cosines: Of their rotary positions, (b or 1, t, rotated channels of a head, or half of them if both halves
                are equal).
            sines: As `cosines`.
            kv: KV cache of the positions before them. It grows by t.
            tokens: Which positions, with those in the cache, are tokens and not padding, bool (b, length). None if
                there is no padding.

        Returns:
            Hidden states (b, t, d). Those of padding are not changed.

        Raises:
            MemoryError: The kernels could not allocate their buffers.
        """
        batch, length, _ = hidden.shape
        out = hidden.clone(memory_format=torch.contiguous_format)
        if cosines.shape[-1] < self.rotary:  # both halves of a head turn by these angles
            cosines, sines = torch.cat((cosines, cosines), dim=-1), torch.cat((sines, sines), dim=-1)
        # The kernels expect rows of head_dim numbers, whose last ones they do not read if a part is rotated.
        cosines, sines = (F.pad(x, (0, self.head_dim - self.rotary)) for x in (cosines, sines))
        cosines, sines = (x.expand(batch, -1, -1).contiguous() for x in (cosines, sines))
        new = None if tokens is None else tokens[:, kv.length :]
        counts = [length] * batch if new is None else new.sum(1).tolist()
        kv.reserve(counts)
        sequences = (SequenceParts * batch)(*map(SequenceParts, counts, kv.stored))
        if new is None:
            self._compute(out.view(1, batch * length, self.width), cosines, sines, sequences, kv)
        elif any(counts):
            packed = out[new][None]
            self._compute(packed, cosines[new], sines[new], sequences, kv)
            out[new] = packed[0]
        kv.extend(length, counts, tokens)
        return out

    def _compute(
        self, hidden: Tensor, cosines: Tensor, sines: Tensor, sequences: ctypes.Array[SequenceParts], kv: KVCache
    ) -> None:
        """Run the layers in place on hidden states (1, tokens of all sequences, d). `kv` must have room for them."""
        failed = library.library().haq_decoder_layers(
            library.level(), torch.get_num_threads(), ctypes.byref(self._parts), len(self._parts), hidden.data_ptr(),
            ctypes.byref(sequences), len(sequences), cosines.data_ptr(), sines.data_ptr(),
            kv.panels.data_ptr(), kv.rows.data_ptr(), len(kv.panels), kv.capacity,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"The native decoder has no memory for {hidden.shape[1]} tokens. Use a shorter prompt.")

    @torch.no_grad()
    def reproduces_its_layers(self) -> bool:
        """Return whether the stack's output equals the layers' own, for a prompt and one token after it."""
        # One rounding difference in an early key affects all later tokens, so one probe of several must agree.
        for copies in (2, 1):  # of each angle in the position embeddings that the layer takes
            try:
                if any(bool(self._errors(seed, copies).median() <= TOLERANCE) for seed in range(PROBES)):
                    return True
            except (TypeError, RuntimeError, ValueError):  # the layer takes other arguments
                continue
        return False

    def _errors(self, seed: int, copies: int) -> Tensor:
        """Return the error of each random token, as a share of what the original layers add to it."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, PROBE_TOKENS, self.width, generator=generator)
        angles = torch.randn(1, PROBE_TOKENS, self.rotary // 2, generator=generator).repeat(1, 1, copies)
        cosines, sines = angles.cos(), angles.sin()
        wanted, mask = hidden.clone(), self._probe_mask()
        for layer in self.layers:
            wanted = layer(wanted, position_embeddings=(cosines, sines), attention_mask=mask)
        kv, last = self.new_cache(), PROBE_TOKENS - 1
        parts = (slice(last), slice(last, None))
        got = torch.cat([self.step(hidden[:, p], cosines[:, p], sines[:, p], kv) for p in parts], dim=1)
        return (got - wanted).norm(dim=-1) / (wanted - hidden).norm(dim=-1)

    def _probe_mask(self) -> Tensor:
        """Return the mask that is added to the scores of the random tokens, (1, 1, tokens, tokens)."""
        seen = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool).tril()
        if self.window:
            seen = seen.triu(1 - self.window)
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


class MoeStack(NativeStack):
    """Mixture-of-Experts layers that are native but for router and experts, which run as modules.

    Args:
        layers: As for `NativeStack`.
        parts: As for `NativeStack`.
        first: As for `NativeStack`.
        moe: Names of the router and the experts within a layer.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int, moe: Moe):
        super().__init__(layers, parts, first)
        self.moe = moe

    def _experts_replaced(self) -> bool:
        return False  # experts are called as modules, so an offload engine may replace them

    def _compute(
        self, hidden: Tensor, cosines: Tensor, sines: Tensor, sequences: ctypes.Array[SequenceParts], kv: KVCache
    ) -> None:
        run, level, threads = library.library().haq_attention, library.level(), torch.get_num_threads()
        normed = torch.empty_like(hidden)
        arguments = (
            hidden.data_ptr(), normed.data_ptr(), ctypes.byref(sequences), len(sequences),
            cosines.data_ptr(), sines.data_ptr(), kv.panels.data_ptr(), kv.rows.data_ptr(), len(kv.panels), kv.capacity,
        )  # fmt: skip
        for index, layer in enumerate(self.layers):
            if run(level, threads, ctypes.byref(self._parts), index, *arguments):
                raise MemoryError(
                    f"The native attention has no memory for {hidden.shape[1]} tokens. Use a shorter prompt."
                )
            _, weights, chosen = self.moe.router_of(layer)(normed[0])
            hidden += self._parts[index].residual * layer.get_submodule(self.moe.experts)(normed[0], chosen, weights)

    def _errors(self, seed: int, copies: int) -> Tensor:
        """Return the errors of the layers' outputs and of the experts' inputs, whichever is larger.

        The experts themselves are not run: they are the same modules, and may not be in memory. In their place the
        layer adds nothing, which shows errors of small attention outputs, and then the experts' inputs, which shows
        whether it scales what it adds.
        """
        errors = torch.zeros(PROBE_TOKENS)
        for factor in (0.0, 1.0):
            with self._recorded_experts(factor) as recorders:
                errors = torch.maximum(errors, super()._errors(seed, copies))
            for wanted, *got in (recorder.inputs for recorder in recorders):
                error = (torch.cat(got) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
                errors = torch.maximum(errors, error)
        return errors

    @contextmanager
    def _recorded_experts(self, factor: float) -> Iterator[list[_InputRecorder]]:
        """Replace the experts by recorders that return `factor` times their inputs within a `with` statement."""
        originals = [layer.get_submodule(self.moe.experts) for layer in self.layers]
        recorders = [_InputRecorder(factor) for _ in originals]
        try:
            for layer, recorder in zip(self.layers, recorders, strict=True):
                layer.set_submodule(self.moe.experts, recorder)
            yield recorders
        finally:
            for layer, experts in zip(self.layers, originals, strict=True):
                layer.set_submodule(self.moe.experts, experts)


def _check_call(
    hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, kv: KVCache | None, rotary: int
) -> tuple[tuple[Tensor, Tensor], KVCache]:
    """Return the position embeddings and the cache. Raises UnsupportedCallError if the kernels cannot use them."""
    if hidden.dtype != torch.float32:
        raise UnsupportedCallError(f"the hidden states are {hidden.dtype}, not float32")
    if position_embeddings is None:
        raise UnsupportedCallError("there are no rotary position embeddings")
    if isinstance(position_embeddings, Tensor) or position_embeddings[0].shape[-1] not in (rotary, rotary // 2):
        raise UnsupportedCallError(f"the rotary position embeddings are not {rotary} or {rotary // 2} channels wide")
    if kv is None:
        raise UnsupportedCallError("the KV cache is not a DynamicCache, or an earlier call has filled it")
    if kv.stored and len(kv.stored) != len(hidden):
        raise UnsupportedCallError(f"the KV cache has {len(kv.stored)} sequences, but the batch has {len(hidden)}")
    return position_embeddings, kv


class _InputRecorder(nn.Module):
    """Stands at the place of experts, records what they read (t, d) and returns it times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self.inputs.append(x.clone())
        return self.factor * x


def make_stack(layers: Sequence[nn.Module], parts: Sequence[LayerParts], first: int, moe: Moe | None) -> NativeStack:
    """Make a stack of layers that have the same `stack_key`.

    Args:
        layers: The decoder layers.
        parts: Their descriptions for the kernels.
        first: Index of the first layer in the model.
        moe: Names of the router and the experts within a layer; None for a dense model.
    """
    if parts[0].includes_mlp:
        return NativeStack(layers, parts, first)
    assert moe is not None, "the parts of a dense layer include its MLP"
    return MoeStack(layers, parts, first, moe)


class Passed(nn.Module):
    """Stands at the place of a layer that an earlier stack has run, and returns its input."""

    def forward(self, hidden: Tensor, **others: Any) -> Tensor:
        return hidden


def stack_native_layers(
    layers: Sequence[nn.Module],
    parts: Sequence[LayerParts | None],
    moe: Moe | None = None,
    kinds: Sequence[str] | None = None,
) -> list[nn.Module]:
    """Replace each run of consecutive native layers by a stack.

    Args:
        layers: All decoder layers of the model.
        parts: Their descriptions for the kernels; None for a layer that is not native.
        moe: Names of the router and the experts within a layer; None for a dense model.
        kinds: The kind of each layer, on which the arguments of its call depend. None if all are the same.

    Returns:
        Stacks, and the unchanged layers that are not native, in the model's order. If there are several kinds, each
        module is at the index of its first layer, because the model chooses its arguments by this index.
    """
    kinds = kinds or [""] * len(layers)
    several = len(set(kinds)) > 1
    result: list[nn.Module] = []
    run: list[tuple[nn.Module, LayerParts]] = []
    for index, (layer, part) in enumerate(zip([*layers, None], [*parts, None], strict=True)):
        if run and (part is None or part.stack_key != run[0][1].stack_key or kinds[index] != kinds[index - 1]):
            run_layers, run_parts = zip(*run, strict=True)
            result.append(make_stack(run_layers, run_parts, index - len(run), moe))
            result += [Passed() for _ in run[1:] if several]
            run = []
        if layer is not None and part is not None:
            run.append((layer, part))
        elif layer is not None:
            result.append(layer)
    return result
