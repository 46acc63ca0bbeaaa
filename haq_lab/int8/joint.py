"""Linears that read one tensor (q/k/v, gate/up) as one product: the input is quantised once and multiplied once.

Nothing changes but the speed: every output has the bits it had. The linears keep their places and names in the model;
their tensors become views of the joint ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from haq_lab.int8.backend import PackedLinear
from haq_lab.int8.quantized_rows import QuantizedRows, multiplied

if TYPE_CHECKING:
    from haq_lab.int8.linear import Int8Linear


class Joint:
    """The linears' rows on top of each other. The first to be called computes for all; the others take their part.

    Args:
        members: Linears that `can_join`, in the order in which they shall lie.
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
            member.joint, member.place = self, place
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
        return multiplied(x, self)

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


def can_join(members: Sequence[Int8Linear]) -> bool:
    """Whether the linears differ in nothing but their rows, and their backend packs such rows as one matrix."""
    return len(members) > 1 and all(
        a.backend is b.backend
        and a.in_features == b.in_features
        and a.scheme == b.scheme
        and (a.bias is None) == (b.bias is None)
        and (a.input_scale is b.input_scale or (a.scheme == "static" and bool(a.input_scale == b.input_scale)))
        and a.backend.joins(a.out_features)
        and a.joint is None is b.joint
        for a, b in pairwise(members)
    )
