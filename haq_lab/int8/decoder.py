"""A decoder layer as one call of the native kernels: norm, q/k/v, attention, MLP, without Python between them.

    fused = NativeLayer.of(layer, groups)        # None where the layer is of another kind
    hidden = fused(hidden, position_embeddings=(cos, sin), cache=cache)

The int8 products are those of `Int8Linear`. What lies between them (norms, softmax, SiLU) is float32 and differs from
torch's in the last places, so perplexity is measured on the layers as they were; this is for running the model.
What a layer is made of follows from the family's groups. Whether it is really computed so - that the norm is an RMS
norm, that positions are rotated - is not asked of names but tried: a layer that does not reproduce itself stays as
it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from haq_lab.int8 import native
from haq_lab.int8.cpu import CpuBackend
from haq_lab.int8.joint import Joint
from haq_lab.int8.key_values import KeyValues
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.families import Group

PROBE_TOKENS = 40  # more than a panel of keys
TOLERANCE = 1e-4  # of what the layer adds to a token, for most tokens: where a value lies between two int8 levels,
# the last place of a float32 decides to which side it falls, and a token is off by one level of one value.

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = [("packed", _PTR), ("scale", _PTR), ("bias", _PTR), ("n", _I64), ("k", _I64), ("activation_scale", _F32)]

    @classmethod
    def of(cls, linear: Int8Linear | Joint) -> _Linear:
        bias = None if linear.bias is None else linear.bias.data_ptr()
        static = 0.0 if linear.input_scale is None else float(linear.input_scale)
        shape = linear.out_features, linear.in_features
        return cls(linear.packed.data_ptr(), linear.weight_scale.data_ptr(), bias, *shape, static)


class _Layer(ctypes.Structure):
    """`Layer` of kernels/cpu/decoder.h."""

    _fields_ = [
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, _PTR) for name in ("attention_norm", "mlp_norm")),
        *((name, _F32) for name in ("attention_eps", "mlp_eps", "scaling")),
        *((name, _Linear) for name in ("qkv", "output", "gate_up", "down")),
    ]


class NativeLayer(nn.Module):
    """Takes the place of a decoder layer, which it keeps for whatever the kernels do not do.

    One sequence at a time, causal, is done natively; batches and masks go the layer's own way.
    """

    def __init__(self, layer: nn.Module, index: int, parts: dict[str, Any]):
        super().__init__()
        self.layer = layer
        self.index = index
        self._parts = parts  # keeps the tensors alive whose addresses `_native` holds
        attention = parts["attention"]
        qkv, output = parts["qkv"], parts["output"]
        self.head_dim: int = attention.head_dim
        self.heads = output.in_features // self.head_dim
        self.kv_heads = (qkv.out_features // self.head_dim - self.heads) // 2
        norms = parts["attention_norm"], parts["mlp_norm"]
        self._native = _Layer(
            self.heads,
            self.kv_heads,
            self.head_dim,
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms),
            attention.scaling,
            *(_Linear.of(parts[name]) for name in ("qkv", "output", "gate_up", "down")),
        )
        self._address = ctypes.byref(self._native)
        self._run = native.library().haq_decoder_layer

    @classmethod
    def of(cls, layer: nn.Module, index: int, groups: Sequence[Group]) -> NativeLayer | None:
        """The layer's native form, or None where it has none."""
        parts = _parts(layer, groups)
        if parts is None:
            return None
        native_layer = cls(layer, index, parts)
        return native_layer if native_layer._reproduces_itself() else None

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> Tensor:
        """Hidden states (1, t, d) float32 -> the same; (b, t, d) and masks by the layer's own code."""
        kept = None if cache is None else self._kept(cache)
        plain = attention_mask is not None or position_embeddings is None or len(hidden) != 1
        if plain or (kept is None and cache is not None) or hidden.dtype != torch.float32:
            if cache is not None and kept is not None:
                cache.layers[self.index] = kept.plain()
            arguments = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "cache": cache}
            return self.layer(hidden, **arguments, **others)
        assert position_embeddings is not None
        return self.step(hidden, *position_embeddings, kept or KeyValues(self.kv_heads, self.head_dim))

    def _kept(self, cache: Cache) -> KeyValues | None:
        """This layer's keys and values in the cache, put there if it is new; None if it holds another kind."""
        while len(cache.layers) <= self.index:
            cache.layers.append(KeyValues(self.kv_heads, self.head_dim))
        kept = cache.layers[self.index]
        if type(kept) is DynamicLayer and kept.get_seq_length() == 0:
            kept = cache.layers[self.index] = KeyValues(self.kv_heads, self.head_dim)
        return kept if isinstance(kept, KeyValues) else None

    def step(self, hidden: Tensor, cosines: Tensor, sines: Tensor, kept: KeyValues) -> Tensor:
        """Hidden states (1, t, d) that follow those of `kept`, at positions (1, t, head_dim); `kept` grows by t."""
        tokens = hidden.shape[1]
        kept.reserve(tokens)
        out = hidden.clone(memory_format=torch.contiguous_format)
        failed = self._run(
            native.level(), torch.get_num_threads(), self._address, out.data_ptr(), tokens,
            cosines.contiguous().data_ptr(), sines.contiguous().data_ptr(),
            kept.panels.data_ptr(), kept.rows.data_ptr(), kept.capacity, kept.length,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"decoder layer over {tokens} tokens")
        kept.length += tokens
        return out

    @torch.no_grad()
    def _reproduces_itself(self) -> bool:
        """Whether a prompt, and a token after it, come out as from the layer's own code."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, PROBE_TOKENS, self._native.output.n, generator=generator)
        angles = torch.randn(1, PROBE_TOKENS, self.head_dim // 2, generator=generator).repeat(1, 1, 2)
        cosines, sines = angles.cos(), angles.sin()
        try:
            wanted = self.layer(hidden.clone(), position_embeddings=(cosines, sines), attention_mask=None)
        except (TypeError, RuntimeError, ValueError):  # it needs other arguments: not this kind of layer
            return False
        kept = KeyValues(self.kv_heads, self.head_dim)
        last = PROBE_TOKENS - 1
        got = torch.cat(
            [
                self.step(hidden[:, part], cosines[:, part], sines[:, part], kept)
                for part in (slice(last), slice(last, None))
            ],
            dim=1,
        )
        error, size = (got - wanted).norm(dim=-1), (wanted - hidden).norm(dim=-1)
        return isinstance(wanted, Tensor) and bool((error / size).median() <= TOLERANCE)


def _parts(layer: nn.Module, groups: Sequence[Group]) -> dict[str, Any] | None:
    """The modules that the family's groups name, by their part in the layer; None if they are not all there."""
    norms = [group for group in groups if group.kind == "norm" and group.source is not None]
    values = [group for group in groups if group.kind == "value"]
    ups = [group for group in groups if group.kind == "up"]
    if not (len(norms) == 2 and len(values) == len(ups) == 1):
        return None
    attention_norm, mlp_norm = (layer.get_submodule(norm.source) for norm in norms if norm.source is not None)
    output, down = (layer.get_submodule(group.consumers[0]) for group in (*values, *ups))
    joints = [_joint(layer, norm) for norm in norms]
    attention = layer.get_submodule(norms[0].consumers[0].rpartition(".")[0])
    usable = (
        all(joints)
        and all(_is_native(linear) for linear in (*joints, output, down))
        and all(hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.float32
                for norm in (attention_norm, mlp_norm))
        and hasattr(attention, "scaling") and getattr(attention, "sliding_window", None) is None
    )  # fmt: skip
    if not usable:
        return None
    return {
        "attention": attention,
        "attention_norm": attention_norm,
        "mlp_norm": mlp_norm,
        "qkv": joints[0],
        "output": output,
        "gate_up": joints[1],
        "down": down,
    }


def _joint(layer: nn.Module, group: Group) -> Joint | None:
    """The one joint product of a group's linears."""
    joints = {getattr(layer.get_submodule(name), "joint", None) for name in group.consumers}
    return joints.pop() if len(joints) == 1 else None


def _is_native(linear: Any) -> bool:
    return (
        isinstance(linear, Int8Linear | Joint)
        and isinstance(linear.backend, CpuBackend)
        and linear.packed.dtype == torch.uint8
        and linear.scheme != "tensor"
        and (linear.bias is None or linear.bias.dtype == torch.float32)
    )
