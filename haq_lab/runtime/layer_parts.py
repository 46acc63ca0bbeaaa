"""Describe a decoder layer to the native kernels in C structures.

The family table says which modules play which role, so module names are not guessed here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haq_lab.int8.cpu.bindings import kernel_group
from haq_lab.int8.linear import Int8Linear, MergedLinear
from haq_lab.models.experts import Expert
from haq_lab.models.families.family import Family, Group, Moe
from haq_lab.models.int8_experts import Int8Experts, projections
from haq_lab.prefix.attention import attached
from haq_lab.runtime.equivalence import CLOSE
from haq_lab.runtime.native_router import NativeRouter, RouterParts

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# Of a layer: before the two halves, after them, and of queries and keys.
NORMS = ("attention", "mlp", "attention_output", "mlp_output", "queries", "keys")
# Of the MLP, in the order of `Activation` of kernels/cpu/kernels.h.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, partial(F.gelu, approximate="tanh"), F.relu)


class UnsupportedLayerError(Exception):
    """A decoder layer that the native decoder cannot compute. The message is the reason in plain words."""


class LinearParts(ctypes.Structure):
    """`Linear` of kernels/cpu/decoder.h."""

    _fields_ = [
        *((name, _PTR) for name in ("packed", "scale", "bias")),
        *((name, _I64) for name in ("n", "k", "group")),
        ("activation_scale", _F32),
        ("rotation", _I64),
    ]

    @classmethod
    def of(cls, linear: Int8Linear | MergedLinear) -> LinearParts:
        """Return the addresses of a linear's tensors. The tensors must not move afterwards."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        static_scale = 0.0 if linear.input_scale is None else float(linear.input_scale)
        shape = linear.out_features, linear.in_features, kernel_group(linear.format, linear.in_features)
        return cls(
            linear.packed.data_ptr(), linear.weight_scale.data_ptr(), bias, *shape, static_scale, linear.rotation
        )


class NormTensors(NamedTuple):
    """A norm: its gain (k,), its bias (k,) if it is a LayerNorm, and its epsilon."""

    gain: Tensor
    bias: Tensor | None
    eps: float


class NormParts(ctypes.Structure):
    """`Norm` of kernels/cpu/decoder.h. All null: there is no such norm."""

    _fields_ = [("gain", _PTR), ("bias", _PTR), ("width", _I64), ("eps", _F32)]

    @classmethod
    def of(cls, norm: NormTensors) -> NormParts:
        """Return the addresses of a norm's tensors, which must not move afterwards."""
        bias = None if norm.bias is None else norm.bias.data_ptr()
        return cls(norm.gain.data_ptr(), bias, norm.gain.numel(), norm.eps)


class ExpertParts(ctypes.Structure):
    """`Expert` of kernels/cpu/moe.h."""

    _fields_ = [(name, LinearParts) for name in ("gate", "up", "down")]


class MoeParts(ctypes.Structure):
    """`Moe` of kernels/cpu/moe.h."""

    _fields_ = [
        ("router", RouterParts),
        ("experts", ctypes.POINTER(ExpertParts)),
        ("activation_scale", _F32),
        ("rotation", _I64),
    ]

    @classmethod
    def of(cls, layer: nn.Module, moe: Moe) -> MoeParts | None:
        """Return the addresses of a Mixture of Experts' tensors, which must not move afterwards.

        Returns:
            None if an expert is not in memory, or if the kernels cannot compute the router or an expert.
        """
        router, experts = (layer.get_submodule(name) for name in (moe.router, moe.experts))
        if not isinstance(router, NativeRouter) or not isinstance(experts, Int8Experts) or not experts.swiglu:
            return None
        linears = [projections(cast(Expert, expert)) for expert in experts]
        for linear in (linear for expert in linears for linear in expert):
            if _obstacle(linear) is not None or not linear.packed.numel():
                return None
        table = (ExpertParts * len(linears))(*(ExpertParts(*map(LinearParts.of, expert)) for expert in linears))
        scale = 0.0 if experts.input_scale is None else float(experts.input_scale)
        return cls(router.parts, table, scale, experts.rotation)


class SequenceParts(ctypes.Structure):
    """`Sequence` of kernels/cpu/decoder.h."""

    _fields_ = [("tokens", _I64), ("past", _I64)]


class LayerParts(ctypes.Structure):
    """`Layer` of kernels/cpu/decoder.h. The experts are null if a Mixture of Experts is not fully native.

    Attributes:
        norms: The tensors of the norms, which must live as long as the structure is used.
        has_experts: Whether the layer is a Mixture of Experts, native or not.
        pairs: Whether the rotary embedding turns neighbouring channels. `of` sets it to False; the layer says nothing
            about it, so it has to be tried.
    """

    _fields_ = [
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim", "window", "rotary", "pairs", "activation")),
        *((name, _F32) for name in ("scaling", "soft_cap", "residual")),
        *((name, NormParts) for name in NORMS),
        *((name, LinearParts) for name in ("qkv", "output")),
        ("sinks", _PTR),
        *((name, LinearParts) for name in ("gate_up", "down")),
        ("shared_gate", _PTR),
        ("moe", MoeParts),
    ]

    norms: tuple[NormTensors, ...] = ()
    has_experts: bool = False

    @classmethod
    def of(cls, layer: nn.Module, groups: Sequence[Group], family: Family) -> LayerParts:
        """Describe a decoder layer whose linears have been merged.

        Args:
            layer: The decoder layer.
            groups: The family's groups, with the experts' names written out.
            family: The model's row of the family table.

        Raises:
            UnsupportedLayerError: A part of the layer is missing, or the kernels cannot compute it.
        """
        modules = dict(layer.named_modules())
        moe = family.moe_in(modules)
        inputs, outputs = _find_groups(groups, moe)
        for name in (name for group in (*inputs[: len(outputs)], *outputs) for name in _outside_experts(group)):
            _check_linear(layer, name)
        norms = _find_norms(layer, inputs, family)
        linears = _find_products(layer, inputs, outputs)
        attention = _find_attention(layer, inputs[0])
        heads, kv_heads = _count_heads(linears, attention.head_dim)
        _check_head_norms(norms, family.head_norms, (heads, kv_heads), attention.head_dim)
        residual = float(getattr(layer, "residual_multiplier", 1.0))
        if moe is not None and (family.output_norms or "mlp" not in norms):
            raise UnsupportedLayerError("its experts have no norm before them, or one after them")
        moe_parts = moe and MoeParts.of(layer, moe)
        parts = cls(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=attention.head_dim,
            window=_window(attention),
            rotary=_rotary(attention),
            activation=_activation(layer, outputs[1]) if len(outputs) > 1 else 0,
            scaling=attention.scaling,
            soft_cap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
            residual=residual,
            **{name: NormParts.of(norm) for name, norm in norms.items()},
            sinks=_sinks(attention, heads),
            **dict(zip(("qkv", "output", "gate_up", "down"), map(LinearParts.of, linears), strict=False)),
            shared_gate=moe and _shared_gate(layer, inputs[1], moe),
            moe=moe_parts or MoeParts(),
        )
        parts.norms, parts.has_experts = tuple(norms.values()), moe is not None
        return parts

    @property
    def includes_mlp(self) -> bool:
        """Whether the kernels compute the MLP or the experts as well as the attention."""
        return bool(self.moe.experts) or not self.has_experts

    @property
    def stack_key(self) -> tuple[int, int, int, bool]:
        """What all layers of one stack must share: key-value heads, head width, window, and whether it has the MLP."""
        return self.kv_heads, self.head_dim, self.window, self.includes_mlp


def _find_groups(groups: Sequence[Group], moe: Moe | None) -> tuple[list[Group], list[Group]]:
    """Return the groups behind the two norms, and those of the output projections.

    They are that of the attention, and that of a dense MLP or of a shared expert.
    """
    inputs = [group for group in groups if group.kind == "norm"]
    values = [group for group in groups if group.kind == "value"]
    ups = [group for group in groups if group.kind == "up" and group.expert is None]
    if len(inputs) != 2 or len(values) != 1 or len(ups) > 1 or (moe is None and not ups):
        raise UnsupportedLayerError("it is not a norm and attention followed by a norm and an MLP")
    return inputs, [*values, *ups]


def _outside_experts(group: Group) -> tuple[str, ...]:
    return group.consumers_by_expert().get(None, ())


def _shared_gate(layer: nn.Module, group: Group, moe: Moe) -> int | None:
    """Return the address of the weights of a shared expert's gate, or None if it has none."""
    gates = [name for name in group.float_consumers if name != moe.router]
    if not gates:
        return None
    gate: Any = layer.get_submodule(gates[0])
    norm: Any = layer.get_submodule(group.source or "")
    shape = 1, norm.weight.numel()
    if gate.weight.dtype != torch.float32 or gate.weight.shape != shape or gate.bias is not None:
        raise UnsupportedLayerError(f"{gates[0]} is not one float32 product without a bias")
    return int(gate.weight.data_ptr())


def _check_linear(layer: nn.Module, name: str) -> None:
    if (obstacle := _obstacle(layer.get_submodule(name))) is not None:
        raise UnsupportedLayerError(f"{name} {obstacle}")


def _obstacle(linear: Any) -> str | None:
    """Return why the native kernels cannot compute a linear, or None if they can."""
    if not isinstance(linear, Int8Linear):
        return "is not an int8 linear"
    if not linear.backend.native:
        return f"is not in the native kernels' layout ({linear.backend.why_not_native})"
    if linear.scheme == "tensor":
        return "quantises its input with one scale per sequence"
    if linear.bias is not None and linear.bias.dtype != torch.float32:
        return f"has a bias of type {linear.bias.dtype}, not float32"
    return None


def _find_norms(layer: nn.Module, inputs: Sequence[Group], family: Family) -> dict[str, NormTensors]:
    """Return each norm that the layer has, by its name in the structure."""
    before = [group.source for group in inputs]
    names = *before, *(family.output_norms or (None, None)), *(family.head_norms or (None, None))
    modules = dict(layer.named_modules())
    return {ours: _find_norm(layer, theirs) for ours, theirs in zip(NORMS, names, strict=True) if theirs in modules}


def _find_norm(layer: nn.Module, name: str) -> NormTensors:
    """Return an RMSNorm, whose gain is its weight or 1 + weight, or a LayerNorm."""
    norm: Any = layer.get_submodule(name)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if eps is None or weight is None:
        raise UnsupportedLayerError(f"{name} is neither an RMSNorm nor a LayerNorm")
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != torch.float32:
            raise UnsupportedLayerError(f"{name} has weights of type {tensor.dtype}, not float32")
    x = torch.linspace(-1, 2, len(weight))
    rms, gain, shift = F.rms_norm(x, x.shape, eps=eps), 1 + weight, torch.zeros_like(weight) if bias is None else bias
    for found, wanted in (
        (NormTensors(weight, None, eps), rms * weight),
        (NormTensors(gain, None, eps), rms * gain),
        (NormTensors(weight, shift, eps), F.layer_norm(x, x.shape, weight, shift, eps)),
    ):
        if torch.allclose(norm(x), wanted, rtol=CLOSE, atol=CLOSE):
            return found
    raise UnsupportedLayerError(f"{name} is neither an RMSNorm nor a LayerNorm")


def _find_products(layer: nn.Module, inputs: Sequence[Group], outputs: Sequence[Group]) -> list[Any]:
    """Return the merged q/k/v, the attention's output projection, the merged gate/up and the down projection.

    The last two are those of a shared expert, or missing, if the MLP is a Mixture of Experts.
    """
    products: list[Any] = []
    for group, output in zip(inputs, outputs, strict=False):
        names = _outside_experts(group)
        linears = [cast(Int8Linear, layer.get_submodule(name)) for name in names]
        merged: set[Any] = {linear.merged for linear in linears} if len(linears) > 1 else {*linears}
        if len(merged) != 1 or None in merged:
            raise UnsupportedLayerError(f"{', '.join(names)} cannot be merged into one product")
        products += [merged.pop(), layer.get_submodule(output.consumers[0])]
    if len(products) > 2 and products[2].out_features not in (products[3].in_features, 2 * products[3].in_features):
        raise UnsupportedLayerError("its MLP is not two or three linears")
    return products


def _find_attention(layer: nn.Module, group: Group) -> Any:
    name = group.consumers[0].rpartition(".")[0]
    attention: Any = layer.get_submodule(name)
    for attribute in ("scaling", "head_dim"):
        if not hasattr(attention, attribute):
            raise UnsupportedLayerError(f"{name} has no attribute `{attribute}`")
    if _window(attention) and attached(layer) is not None:
        raise UnsupportedLayerError(f"{name} has a sliding window and a prefix")
    return attention


def _window(attention: Any) -> int:
    """Return the number of positions that a query sees, or 0 if it sees all before it."""
    config = getattr(attention, "config", None)
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 0


def _rotary(attention: Any) -> int:
    """Return how many channels of a head are rotated by their position: the first ones, or 0 for none."""
    config: Any = getattr(attention, "config", None)
    if not hasattr(config, "rope_parameters") or not getattr(attention, "use_rope", True):
        return 0
    share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return int(attention.head_dim * share)  # as transformers rounds it


def _sinks(attention: Any, heads: int) -> int | None:
    """Return the address of the sinks (heads,), or None if the attention has none."""
    sinks = getattr(attention, "sinks", None)
    if sinks is None:
        return None
    if sinks.dtype != torch.float32 or sinks.shape != (heads,):
        raise UnsupportedLayerError("its attention's sinks are not one float32 number for each head")
    return int(sinks.data_ptr())


def _activation(layer: nn.Module, down: Group) -> int:
    """Return which of `ACTIVATIONS` the only module without weights beside an MLP's linears computes."""
    mlp = layer.get_submodule(down.consumers[0].rpartition(".")[0])
    others = [child for child in mlp.children() if not (isinstance(child, Int8Linear) or child.state_dict())]
    x = torch.linspace(-10, 10, 401)
    found = others[0](x) if len(others) == 1 else None
    for number, activation in enumerate(ACTIVATIONS):
        if isinstance(found, Tensor) and torch.allclose(found, activation(x), rtol=CLOSE, atol=CLOSE):
            return number
    raise UnsupportedLayerError("its MLP's activation is not SiLU, ReLU or GELU's tanh form")


def _count_heads(linears: Sequence[Any], head_dim: int) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads."""
    heads = linears[1].in_features // head_dim
    return heads, (linears[0].out_features // head_dim - heads) // 2


def _check_head_norms(
    norms: Mapping[str, NormTensors], names: Sequence[str], heads: Sequence[int], head_dim: int
) -> None:
    for ours, name, count in zip(("queries", "keys"), names, heads, strict=False):
        width = norms[ours].gain.numel()
        if count * head_dim % width:
            raise UnsupportedLayerError(f"{name} has {width} weights, which do not divide its heads")
