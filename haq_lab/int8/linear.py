"""Linears that read one tensor (q/k/v, gate/up) as one product: the input is quantised once and multiplied once.

Nothing changes but the speed: every output has the bits it had. The linears keep their places and names in the model;
their tensors become views of the joint ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from haq_lab.int8.backend import Backend, PackedLinear
from haq_lab.int8.numerics import ActivationScheme, round_to_grid, scale_of


class MergedLinear:
    """The linears' rows on top of each other. The first to be called computes for all; the others take their part.

    Args:
        members: Linears that `can_merge`, in the order in which they shall lie.
    """

    def __init__(self, members: Sequence[Int8Linear]):
        first = members[0]
        self.backend, self.scheme, self.input_scale = first.backend, first.scheme, first.input_scale
        self.members = members
        self.weight_scale = torch.cat([member.weight_scale for member in members])
        self.bias = None if first.bias is None else torch.cat([m.bias for m in members if m.bias is not None])
        self.rows = [member.out_features for member in members]
        self.out_features, self.in_features = sum(self.rows), first.in_features
        self._input: tuple[Tensor | QuantizedRows, int] | None = None
        self._left: dict[int, Tensor] = {}
        for place, member in enumerate(members):
            member.weight_scale = self.weight_scale.split(self.rows)[place]
            if self.bias is not None:
                member.bias = self.bias.split(self.rows)[place]
            member.merged, member.place = self, place
        self.hold(torch.cat([member.packed for member in members]))

    def hold(self, packed: Tensor) -> None:
        """Keep the packed weights in this tensor, of which the members get views."""
        self.packed = packed
        parts = packed.split([len(member.packed) for member in self.members])
        for member, part in zip(self.members, parts, strict=True):
            member.hold(part)

    @property
    def weights(self) -> PackedLinear:
        """As the backend takes it."""
        return PackedLinear(self.packed, self.weight_scale, self.bias)

    def product(self, x: Tensor | QuantizedRows) -> Tensor:
        """x (..., k) -> (..., all rows)."""
        return multiply(x, self)

    def output(self, place: int, x: Tensor | QuantizedRows) -> Tensor:
        """Part `place` of the product for x (..., k): (..., n of that part), a view."""
        written = 0 if isinstance(x, QuantizedRows) or x.is_inference() else x._version
        given = (x, written)  # the very tensor, not written to since
        same = self._input is not None and self._input[0] is x and self._input[1] == given[1]
        if not same or place not in self._left:
            self._input, self._left = given, dict(enumerate(self.product(x).split(self.rows, dim=-1)))
        part = self._left.pop(place)
        if not self._left:
            self._input = None  # keep no activation alive longer than it is needed
        return part


def can_merge(members: Sequence[Int8Linear]) -> bool:
    """Whether the linears differ in nothing but their rows, and their backend packs such rows as one matrix."""
    return len(members) > 1 and all(
        a.backend is b.backend
        and a.in_features == b.in_features
        and a.scheme == b.scheme
        and (a.bias is None) == (b.bias is None)
        and (a.input_scale is b.input_scale or (a.scheme == "static" and bool(a.input_scale == b.input_scale)))
        and a.backend.can_merge_rows(a.out_features)
        and a.merged is None is b.merged
        for a, b in pairwise(members)
    )


ROWS = 4096  # of a table, widened at a time


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and int8 activations (`haq_lab.int8.numerics` has the contract).

    The weights are held once, as the backend packs them (`packed`). `weight` gives the int8 levels back, and the
    state dict holds those, whatever the backend.

    Args:
        weight: int8 (n, k).
        weight_scale: float32 (n,).
        bias: (n,) or None.
        scheme: How activations are quantised.
        input_scale: float32 scalar, for the static scheme.
        backend: What computes it.
        copied: Whether the model holds the weights in float as well, so that they count once (a tied head).
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        scheme: ActivationScheme,
        input_scale: Tensor | None,
        backend: Backend,
        copied: bool = False,
    ):
        super().__init__()
        self.copied = copied
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", backend.pack(weight), persistent=False)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.scheme: ActivationScheme = scheme
        self.backend = backend
        self.merged: MergedLinear | None = None  # with those that read the same tensor, where they have been joined
        self.place = 0  # in the joint product
        self._held = False  # in a tensor that others hold too

    @property
    def weight(self) -> Tensor:
        """The int8 levels (n, k): the held tensor itself where the backend does not pack, else a copy."""
        return self.backend.unpack(self.packed, self.out_features, self.in_features)

    @property
    def weights(self) -> PackedLinear:
        """As the backend takes it."""
        return PackedLinear(self.packed, self.weight_scale, self.bias)

    @classmethod
    def rounded(cls, linear: nn.Linear, backend: Backend, copied: bool = False) -> Int8Linear:
        """A linear rounded to nearest, activations per token: for what lies outside the decoder layers."""
        weight = linear.weight.detach()
        scale = scale_of(weight.abs().amax(dim=1))
        levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows, own, out in zip(weight.split(ROWS), scale.split(ROWS), levels.split(ROWS), strict=True):
            out.copy_(round_to_grid(rows.float(), own[:, None]))
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(levels, scale, bias, "token", None, backend, copied)

    def on(self, backend: Backend) -> Int8Linear:
        """The same linear, held and computed by another backend."""
        given = (self.weight, self.weight_scale, self.bias, self.input_scale)
        levels, scale, bias, static = (None if tensor is None else tensor.to(backend.device) for tensor in given)
        assert levels is not None
        assert scale is not None
        return Int8Linear(levels, scale, bias, self.scheme, static, backend)

    @property
    def input_quantization(self) -> tuple[ActivationScheme, float | None]:
        """How it quantises its input: by scheme and static scale. Linears with the same can share what they read."""
        return self.scheme, None if self.input_scale is None else float(self.input_scale)

    def hold(self, packed: Tensor) -> None:
        """Keep the packed weights in this tensor, which has the same values, from now on."""
        self.packed, self._held = packed, True

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """x (..., k) -> (..., n)."""
        if self.merged is not None:
            return self.merged.output(self.place, x)
        return multiply(x, self)

    def product(self, qx: Tensor, row_scale: Tensor) -> Tensor:
        """An input (m, k) that the backend has quantised already, with its row scales -> float32 (m, n)."""
        return self.backend.product(qx, row_scale, self.weights, torch.float32)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Raises KeyError without the weights, ValueError for levels of another shape or type."""
        levels: Tensor = state_dict[prefix + "weight"]
        shape = (self.out_features, self.in_features)
        if tuple(levels.shape) != shape or levels.dtype != torch.int8:
            raise ValueError(f"{prefix}weight: {tuple(levels.shape)} {levels.dtype}, expected {shape} torch.int8")
        packed = self.backend.pack(levels)
        self.packed = self.packed.copy_(packed) if self._held else packed
        rest = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, *arguments)

    def extra_repr(self) -> str:
        size = f"in={self.in_features}, out={self.out_features}"
        return f"{size}, activations={self.scheme}, backend={self.backend.name}"


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers really take, each storage counted once (ties, views)."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parameter_count(module: nn.Module) -> int:
    """Entries of all weights, scales left out: what the model would hold at full precision."""
    tensors = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if name.rpartition(".")[2] in ("weight", "bias") and tensor is not None
    }
    for linear in module.modules():
        if isinstance(linear, Int8Linear) and not linear.copied:
            tensors[linear.packed.data_ptr()] = linear.out_features * linear.in_features
    return sum(tensors.values())


def to_float(linear: Int8Linear) -> Tensor:
    """The weights it stands for, float32 (n, k)."""
    return linear.weight.to(torch.float32) * linear.weight_scale[:, None]


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Stands for a tensor (..., k) that was quantised where it was computed.

    It has that tensor's shape and type for code that asks for them, and no values: torch's functions and operators
    refuse it with a TypeError, so that a reader which is no int8 linear does not go unnoticed.

    Attributes:
        levels: int8 (m, k).
        scale: Of the rows, float32 (m,) as the backend's `product` takes it.
        shape: Of the tensor it stands for.
        dtype: Of that tensor, and of what linears make of it.
    """

    levels: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def size(self) -> torch.Size:
        """The shape, as tensors tell it."""
        return self.shape


def multiply(x: Tensor | QuantizedRows, by: Int8Linear | MergedLinear) -> Tensor:
    """x (..., k) by an int8 linear, or by joined ones as one -> (..., n)."""
    if isinstance(x, QuantizedRows):
        y = by.backend.product(x.levels, x.scale, by.weights, x.dtype)
    else:
        rows = x.reshape(-1, x.shape[-1])
        y = by.backend.linear(rows, by.weights, by.scheme, by.input_scale)
    return y.view(*x.shape[:-1], y.shape[-1])
