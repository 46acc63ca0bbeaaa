"""Define int8 linears, merged linears (q/k/v, gate/up) and quantised activations.

    layer.q_proj = Int8Linear(levels, weight_scale, bias, "token", None, backend)
    MergedLinear([layer.q_proj, layer.k_proj, layer.v_proj])

Merging linears that read the same tensor changes only the speed: the input is quantised and multiplied once, and every
output is bit-identical. The linears keep their names in the model. Their tensors become views of the merged tensors.
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
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.int8.sequences import sequences_of
from haq_lab.int8.weight_format import INT8, WeightFormat


@dataclass(frozen=True)
class InputForm:
    """How an int8 linear takes its input, beside the static scale.

    Attributes:
        scheme: Activation scheme.
        rotation: Block of the rotation before quantization (`haq_lab.int8.rotation`); 1 for none.
    """

    scheme: ActivationScheme
    rotation: int = NO_ROTATION


class MergedLinear:
    """Several linears with the same input, computed as one product.

    The first member that is called with an input computes all outputs. The other members return their parts of it.

    Args:
        members: Linears for which `can_merge` is True, in the order of their rows.
    """

    def __init__(self, members: Sequence[Int8Linear]):
        first = members[0]
        self.backend, self.scheme, self.input_scale = first.backend, first.scheme, first.input_scale
        self.rotation = first.rotation
        self.members = members
        self.format = first.format
        self.weight_scale = _join([member.weight_scale for member in members], dim=-1)
        self.bias = None if first.bias is None else _join([m.bias for m in members if m.bias is not None])
        self.rows = [member.out_features for member in members]
        self.out_features, self.in_features = sum(self.rows), first.in_features
        self._input: tuple[Tensor | QuantizedRows, int] | None = None
        self._outputs: dict[int, Tensor] = {}  # of the last input, not yet returned
        for place, member in enumerate(members):
            member.weight_scale = self.weight_scale.split(self.rows, dim=-1)[place]
            if self.bias is not None:
                member.bias = self.bias.split(self.rows)[place]
            member.merged, member.place = self, place
        self.hold(_join([member.packed for member in members]))

    def hold(self, packed: Tensor) -> None:
        """Use `packed`, which has the same values, as storage of the weights. The members get views of it."""
        self.packed = packed
        parts = packed.split([len(member.packed) for member in self.members])
        for member, part in zip(self.members, parts, strict=True):
            member.hold(part)

    @property
    def weights(self) -> PackedLinear:
        """The linear's tensors, as `Backend.linear` and `Backend.product` take them."""
        return PackedLinear(self.packed, self.weight_scale, self.bias, self.format)

    def product(self, x: Tensor | QuantizedRows) -> Tensor:
        """Compute the outputs of all members, (..., sum of their rows), for x (..., k)."""
        return multiply(x, self)

    def output(self, place: int, x: Tensor | QuantizedRows) -> Tensor:
        """Return the output of one member.

        Args:
            place: The member's index.
            x: The input, (..., k).

        Returns:
            (..., n of the member), a view of the whole product.
        """
        version = 0 if isinstance(x, QuantizedRows) or x.is_inference() else x._version
        # The outputs can be reused only for the same tensor object, not changed in place since.
        same = self._input is not None and self._input[0] is x and self._input[1] == version
        if not same or place not in self._outputs:
            self._input, self._outputs = (x, version), dict(enumerate(self.product(x).split(self.rows, dim=-1)))
        part = self._outputs.pop(place)
        if not self._outputs:
            self._input = None  # so that the activation can be freed
        return part


def _join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return tensors one after the other along `dim`: a view if they are adjacent in memory, else a copy."""
    first = tensors[0]
    if first.dim() > 1 and dim == -1:  # the scales of groups
        return torch.cat([*tensors], dim=dim)
    adjacent = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(tensors)
    )
    if not adjacent or not all(tensor.is_contiguous() for tensor in tensors):
        return torch.cat([*tensors])
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def can_merge(members: Sequence[Int8Linear]) -> bool:
    """Return whether linears can become one product.

    They must have the same backend, input width, rotation, weight format and activation scheme, all or none must have a
    bias, and the backend must be able to store their rows in one matrix.
    """
    return len(members) > 1 and all(
        a.backend is b.backend
        and a.in_features == b.in_features
        and (a.scheme, a.rotation, a.format) == (b.scheme, b.rotation, b.format)
        and (a.bias is None) == (b.bias is None)
        and (a.input_scale is b.input_scale or (a.scheme == "static" and bool(a.input_scale == b.input_scale)))
        and a.backend.can_merge_rows(a.out_features)
        and a.merged is None is b.merged
        for a, b in pairwise(members)
    )


ROWS = 4096  # rows of a weight matrix that are converted to float32 at a time


class Int8Linear(nn.Module):
    """One linear layer with int8 or int4 weights and int8 activations, y = x W^T + b.

    `haq_lab.int8.numerics` defines the arithmetic. The weights are stored once, in the backend's layout (`packed`).
    The property `weight` and the state dict contain the levels, whatever the backend. The state dict holds 4-bit levels
    as `weight_packed`, two to a byte.

    Args:
        weight: Quantised weights, int8 (n, k).
        weight_scale: One scale per row, float32 (n,); with groups, float32 (groups, n).
        bias: (n,), or None.
        scheme: Activation scheme.
        input_scale: float32 scalar for the static scheme, else None.
        backend: The backend that stores and computes it.
        copied: Whether the model also has these weights in float, as with a tied head. `parameter_count` then
            counts them once.
        rotation: Block of the input's rotation (`haq_lab.int8.rotation`); 1 for none. The weights are rotated already.
        format: Bits of the weights, and columns that share a scale.

    Attributes:
        merged: The product that this linear is part of, or None.
        place: The linear's index in that product.
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
        rotation: int = NO_ROTATION,
        format: WeightFormat = INT8,
    ):
        super().__init__()
        self.copied, self.rotation, self.format = copied, rotation, format
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", backend.pack(weight, format), persistent=False)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.scheme: ActivationScheme = scheme
        self.backend = backend
        self.merged: MergedLinear | None = None
        self.place = 0

    @property
    def weight(self) -> Tensor:
        """The int8 levels (n, k): `packed` itself if the backend does not change the layout, else a copy."""
        return self.backend.unpack(self.packed, self.out_features, self.in_features, self.format)

    @property
    def weights(self) -> PackedLinear:
        """The linear's tensors, as `Backend.linear` and `Backend.product` take them."""
        return PackedLinear(self.packed, self.weight_scale, self.bias, self.format)

    @classmethod
    def rounded(cls, linear: nn.Linear, backend: Backend, copied: bool = False) -> Int8Linear:
        """Quantise a float linear outside the decoder layers, such as the head.

        Weights are rounded to nearest with one scale per row. Activations get one scale per token.

        Args:
            linear: The float linear.
            backend: The backend of the result.
            copied: As for the class.
        """
        weight = linear.weight.detach()
        scale = scale_of(weight.abs().amax(dim=1))
        levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows, row_scale, out in zip(weight.split(ROWS), scale.split(ROWS), levels.split(ROWS), strict=True):
            out.copy_(round_to_grid(rows.float(), row_scale[:, None]))
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(levels, scale, bias, "token", None, backend, copied)

    def on(self, backend: Backend) -> Int8Linear:
        """Return a copy of this linear on another backend."""
        tensors = (self.weight, self.weight_scale, self.bias, self.input_scale)
        levels, scale, bias, static = (None if tensor is None else tensor.to(backend.device) for tensor in tensors)
        assert levels is not None
        assert scale is not None
        how = {"rotation": self.rotation, "format": self.format}
        return Int8Linear(levels, scale, bias, self.scheme, static, backend, **how)  # type: ignore[arg-type]

    @property
    def input_form(self) -> InputForm:
        """The activation scheme and the rotation, as a checkpoint stores them."""
        return InputForm(self.scheme, self.rotation)

    @property
    def input_quantization(self) -> tuple[ActivationScheme, float | None, int]:
        """The activation scheme, static scale and rotation. Linears with equal values can share one quantised input."""
        return self.scheme, None if self.input_scale is None else float(self.input_scale), self.rotation

    def hold(self, packed: Tensor) -> None:
        """Use `packed`, a view with the same values, as storage of the weights."""
        self.packed = packed

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Compute the linear for x (..., k). Returns (..., n)."""
        if self.merged is not None:
            return self.merged.output(self.place, x)
        return multiply(x, self)

    def product(self, qx: Tensor, row_scale: Tensor) -> Tensor:
        """Compute float32 (m, n) for an input (m, k) that the backend has already quantised."""
        return self.backend.product(qx, row_scale, self.weights, torch.float32)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.format.tensor] = self.format.stored(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Raise KeyError if the weights are missing, and ValueError if their shape or type is wrong."""
        name = prefix + self.format.tensor
        stored: Tensor = state_dict[name]
        shape = self.format.stored_shape(self.out_features, self.in_features)
        dtype = torch.int8 if self.format.bits == 8 else torch.uint8
        if tuple(stored.shape) != shape or stored.dtype != dtype:
            raise ValueError(
                f"{name}: {tuple(stored.shape)} {stored.dtype} is not {shape} {dtype}. "
                "Load the state dict of the same model."
            )
        packed = self.backend.pack(self.format.levels(stored, self.in_features), self.format)
        is_view = self.packed.untyped_storage().nbytes() > self.packed.nbytes
        self.packed = self.packed.copy_(packed) if is_view else packed
        others = {key: tensor for key, tensor in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, *arguments)

    def extra_repr(self) -> str:
        size = f"in={self.in_features}, out={self.out_features}"
        rotation = "" if self.rotation == NO_ROTATION else f", rotation={self.rotation}"
        bits = "" if self.format.bits == 8 else f", weight_bits=4, group={self.format.group}"
        return f"{size}, activations={self.scheme}{rotation}{bits}, backend={self.backend.name}"


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers. Tied tensors and views are counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parameter_count(module: nn.Module) -> int:
    """Return the number of weights and biases, without scales. Tied tensors are counted once."""
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
    """Return the dequantised weights, float32 (n, k). They multiply the rotated input if there is a rotation."""
    return linear.weight.to(torch.float32) * linear.format.row_scales(linear.weight_scale, linear.in_features)


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Output of a fused norm or activation kernel that is already quantised and has no float copy.

    It has the shape and type of the float tensor (..., k) for model code that reads them. Torch's functions and
    operators raise TypeError for it, so only int8 linears can read it.

    Attributes:
        levels: int8 (m, k).
        scale: One scale per row, float32 (m,), as the backend's `product` takes it.
        shape: Shape of the float tensor.
        dtype: Type of the float tensor, and of the linears' outputs.
    """

    levels: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def size(self) -> torch.Size:
        """Return the shape, like `Tensor.size`."""
        return self.shape


def multiply(x: Tensor | QuantizedRows, linear: Int8Linear | MergedLinear) -> Tensor:
    """Multiply x (..., k) by an int8 linear or merged linears. Returns (..., n)."""
    if isinstance(x, QuantizedRows):
        y = linear.backend.product(x.levels, x.scale, linear.weights, x.dtype)
    else:
        rows = x.reshape(-1, x.shape[-1])
        sequences = sequences_of(x) if linear.scheme == "tensor" else None
        y = linear.backend.linear(rows, linear.weights, linear.scheme, linear.input_scale, sequences, linear.rotation)
    return y.view(*x.shape[:-1], y.shape[-1])
