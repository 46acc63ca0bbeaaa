"""What a decoder layer is made of, as the native kernels need it: found by the family table, not by names."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from haq_lab.int8.linear import Int8Linear, MergedLinear
from haq_lab.models.architectures import Family, Group
from haq_lab.models.experts import Expert
from haq_lab.models.int8_experts import Int8Experts, projections
from haq_lab.runtime.native_router import NativeRouter, RouterParts

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearParts(ctypes.Structure):
    """`Linear` of kernels/cpu/decoder.h."""

    _fields_ = [("packed", _PTR), ("scale", _PTR), ("bias", _PTR), ("n", _I64), ("k", _I64), ("activation_scale", _F32)]

    @classmethod
    def of(cls, linear: Int8Linear | MergedLinear) -> LinearParts:
        """Addresses of a linear's tensors, which must stay where they are."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        static = 0.0 if linear.input_scale is None else float(linear.input_scale)
        shape = linear.out_features, linear.in_features
        return cls(linear.packed.data_ptr(), linear.weight_scale.data_ptr(), bias, *shape, static)


class NormParts(ctypes.Structure):
    """`Norm` of kernels/cpu/decoder.h."""

    _fields_ = [("weight", _PTR), ("width", _I64), ("eps", _F32)]

    @classmethod
    def of(cls, norm: nn.Module) -> NormParts:
        """The address of a norm's weights, which must stay there."""
        given: Any = norm
        return cls(given.weight.data_ptr(), given.weight.numel(), given.variance_epsilon)


class ExpertParts(ctypes.Structure):
    """`Expert` of kernels/cpu/moe.h."""

    _fields_ = [(name, LinearParts) for name in ("gate", "up", "down")]


class MoeParts(ctypes.Structure):
    """`Moe` of kernels/cpu/moe.h."""

    _fields_ = [("router", RouterParts), ("experts", ctypes.POINTER(ExpertParts)), ("activation_scale", _F32)]

    @classmethod
    def of(cls, router: nn.Module, experts: nn.Module) -> MoeParts | None:
        """Addresses of what must stay where it is; None where not all is in memory and computed by our kernels."""
        if not isinstance(router, NativeRouter) or not isinstance(experts, Int8Experts) or not experts.swiglu:
            return None
        linears = [projections(cast(Expert, expert)) for expert in experts]
        if not all(_is_native(linear) and linear.packed.numel() for three in linears for linear in three):
            return None
        table = (ExpertParts * len(linears))(*(ExpertParts(*map(LinearParts.of, three)) for three in linears))
        scale = 0.0 if experts.input_scale is None else float(experts.input_scale)
        return cls(router.parts, table, scale)


class LayerParts(ctypes.Structure):
    """`Layer` of kernels/cpu/decoder.h. Where not all of a Mixture of Experts is native, its experts are null."""

    _fields_ = [
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim")),
        ("scaling", _F32),
        *((name, NormParts) for name in ("attention", "mlp", "queries", "keys")),
        *((name, LinearParts) for name in ("qkv", "output", "gate_up", "down")),
        ("moe", MoeParts),
    ]

    @classmethod
    def of(cls, layer: nn.Module, groups: Sequence[Group], family: Family) -> LayerParts | None:
        """The parts of a joined layer; None where they are not all there, or not all computed by our kernels."""
        inputs = [group for group in groups if group.kind == "norm" and group.source is not None]
        halves = ("value", "up") if family.moe is None else ("value",)
        outputs = [group for kind in halves for group in groups if group.kind == kind]
        if len(inputs) != 2 or len(outputs) != len(halves):
            return None
        linears: list[Any] = []
        for given, made in zip(inputs, outputs, strict=False):
            linears += [_merged(layer, given), layer.get_submodule(made.consumers[0])]
        sources = [group.source for group in inputs if group.source is not None]
        norms: list[Any] = [layer.get_submodule(name) for name in (*sources, *family.head_norms)]
        attention: Any = layer.get_submodule(inputs[0].consumers[0].rpartition(".")[0])
        usable = (
            all(map(_is_native, linears))
            and all(hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.float32 for norm in norms)
            and hasattr(attention, "scaling")
            and getattr(attention, "sliding_window", None) is None
        )
        if not usable:
            return None
        heads = linears[1].in_features // attention.head_dim
        kv_heads = (linears[0].out_features // attention.head_dim - heads) // 2
        for norm, own in zip(norms[2:], (heads, kv_heads), strict=False):
            if own * attention.head_dim % norm.weight.numel():
                return None
        moe = family.moe and MoeParts.of(*map(layer.get_submodule, (family.moe.router, family.moe.experts)))
        return cls(
            heads,
            kv_heads,
            attention.head_dim,
            attention.scaling,
            **dict(zip(("attention", "mlp", "queries", "keys"), map(NormParts.of, norms), strict=False)),
            **dict(zip(("qkv", "output", "gate_up", "down"), map(LinearParts.of, linears), strict=False)),
            moe=moe or MoeParts(),
        )

    @property
    def whole(self) -> bool:
        """Whether the MLP is here too."""
        return bool(self.gate_up.packed or self.moe.experts)

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Key-value heads, their width, and whether all is here: what layers of one stack have in common."""
        return self.kv_heads, self.head_dim, self.whole


def _merged(layer: nn.Module, group: Group) -> MergedLinear | None:
    """The one joint product of a group's linears."""
    merged = {getattr(layer.get_submodule(name), "merged", None) for name in group.consumers}
    return merged.pop() if len(merged) == 1 else None


def _is_native(linear: Any) -> bool:
    return (
        isinstance(linear, Int8Linear | MergedLinear)
        and linear.backend.native
        and linear.scheme != "tensor"
        and (linear.bias is None or linear.bias.dtype == torch.float32)
    )
