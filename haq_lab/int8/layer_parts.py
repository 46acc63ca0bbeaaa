"""What a decoder layer is made of, as the native kernels need it: found by the family's groups, not by names."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from haq_lab.int8.cpu import CpuBackend
from haq_lab.int8.joint import Joint
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.families import Group

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class LinearParts(ctypes.Structure):
    """`Linear` of kernels/cpu/decoder.h."""

    _fields_ = [("packed", _PTR), ("scale", _PTR), ("bias", _PTR), ("n", _I64), ("k", _I64), ("activation_scale", _F32)]

    @classmethod
    def of(cls, linear: Int8Linear | Joint) -> LinearParts:
        """Addresses of a linear's tensors, which must stay where they are."""
        bias = None if linear.bias is None else linear.bias.data_ptr()
        static = 0.0 if linear.input_scale is None else float(linear.input_scale)
        shape = linear.out_features, linear.in_features
        return cls(linear.packed.data_ptr(), linear.weight_scale.data_ptr(), bias, *shape, static)


class LayerParts(ctypes.Structure):
    """`Layer` of kernels/cpu/decoder.h."""

    _fields_ = [
        *((name, _I64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, _PTR) for name in ("attention_norm", "mlp_norm")),
        *((name, _F32) for name in ("attention_eps", "mlp_eps", "scaling")),
        *((name, LinearParts) for name in ("qkv", "output", "gate_up", "down")),
    ]

    @classmethod
    def of(cls, layer: nn.Module, groups: Sequence[Group]) -> LayerParts | None:
        """The parts of a joined layer; None where they are not all there, or not all computed by our kernels."""
        norms = [group for group in groups if group.kind == "norm" and group.source is not None]
        others = [[group for group in groups if group.kind == kind] for kind in ("value", "up")]
        if len(norms) != 2 or [len(some) for some in others] != [1, 1]:
            return None
        linears: list[Any] = [
            _joint(layer, norms[0]),
            layer.get_submodule(others[0][0].consumers[0]),
            _joint(layer, norms[1]),
            layer.get_submodule(others[1][0].consumers[0]),
        ]
        sources: list[Any] = [layer.get_submodule(norm.source) for norm in norms if norm.source is not None]
        attention: Any = layer.get_submodule(norms[0].consumers[0].rpartition(".")[0])
        usable = (
            all(map(_is_native, linears))
            and all(hasattr(norm, "variance_epsilon") and norm.weight.dtype == torch.float32 for norm in sources)
            and hasattr(attention, "scaling")
            and getattr(attention, "sliding_window", None) is None
        )
        if not usable:
            return None
        heads = linears[1].in_features // attention.head_dim
        return cls(
            heads,
            (linears[0].out_features // attention.head_dim - heads) // 2,
            attention.head_dim,
            *(norm.weight.data_ptr() for norm in sources),
            *(norm.variance_epsilon for norm in sources),
            attention.scaling,
            *map(LinearParts.of, linears),
        )

    @property
    def heads_of(self) -> tuple[int, int]:
        """Key-value heads and their width: what layers of one stack have in common."""
        return self.kv_heads, self.head_dim


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
