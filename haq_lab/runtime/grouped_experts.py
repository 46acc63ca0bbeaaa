"""Run the experts of a deployed layer on a GPU with one launch per projection and no synchronisation.

Only the device knows which expert has which tokens. A loop over experts must ask the device, so the host waits until
all earlier work is done. Here the tokens are sorted and counted on the device.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor

from haq_lab.int8.cuda.four_bit import BLOCK
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import K_MULTIPLE, padded
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.numerics import round_to_grid, swiglu
from haq_lab.int8.rotation import rotate
from haq_lab.int8.sequences import sequences_of
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.experts import Expert, Experts, combine
from haq_lab.models.int8_experts import Int8Experts, projections


class GroupedExperts(Int8Experts):
    """Quantised experts whose weights are in one tensor per projection. The linears' tensors are views of it.

    If the activation is SiLU and all down projections quantise their input in the same way, activation and
    quantization are one kernel. Otherwise torch computes the activation. Both are bit-identical to the loop.
    """

    _kernels: Kernels
    _gate_up: tuple[Tensor, Tensor, WeightFormat]  # packed (E, 2 f, ...), scales (E, ..., 2 f)
    _down: tuple[Tensor, Tensor, WeightFormat]
    _first: Tensor  # the numbers 0 to E, to find where each expert's rows begin
    _scales: Tensor | None  # (E,), static scales of the down projections' inputs; None for one scale per token
    _down_rotation: int  # block of the rotation of the down projections' inputs
    _fused: bool  # whether activation and quantization are one kernel

    @classmethod
    def of(cls, experts: Experts) -> Self:
        """Group experts for which `can_group` is True."""
        grouped = super().of(experts)
        grouped.swiglu = cast(Int8Experts, experts).swiglu
        parts = [projections(cast(Expert, expert)) for expert in grouped]
        assert grouped.backend.fused_kernels is not None
        grouped._kernels = grouped.backend.fused_kernels
        grouped._gate_up = _stack_weights([part[:2] for part in parts])
        grouped._down = _stack_weights([part[2:] for part in parts])
        grouped._first = torch.arange(len(grouped) + 1, device=grouped.backend.device)
        scales = [down.input_scale for _, _, down in parts if down.input_scale is not None]
        grouped._scales = torch.stack(scales).float().to(grouped.backend.device) if scales else None
        grouped._down_rotation = parts[0][2].rotation
        same = len({down.input_quantization for _, _, down in parts}) == 1
        inner, rotation = parts[0][2].in_features, grouped._down_rotation
        grouped._fused = grouped.swiglu and same and grouped._kernels.can_rotate(inner, rotation)
        return grouped

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the weighted sum of each token's experts.

        Args:
            hidden: Hidden states (t, d).
            chosen: Expert numbers (t, k).
            weights: Gate weights (t, k).

        Returns:
            (t, d).
        """
        sequences = sequences_of(hidden) if self.scheme == "tensor" else None
        levels, scale = self.backend.quantize(hidden, self.scheme, self.input_scale, sequences, self.rotation)
        flat = chosen.flatten()
        pairs = flat.argsort(stable=True)  # pairs of a token and one of its experts, sorted by expert
        experts, tokens = flat[pairs], pairs // chosen.shape[1]
        # Where each expert's rows begin. `bincount` would synchronise, because it reads the largest number.
        offsets = torch.searchsorted(experts, self._first, out_int32=True)
        gate_up = self._multiply(levels[tokens], scale[tokens], offsets, self._gate_up)
        results = hidden.new_empty(len(flat), hidden.shape[1])
        results[pairs] = self._multiply(*self._activate(gate_up, experts), offsets, self._down).to(hidden.dtype)
        return combine(results.view(*chosen.shape, hidden.shape[1]), weights)

    def _multiply(
        self, rows: Tensor, scale: Tensor, offsets: Tensor, experts: tuple[Tensor, Tensor, WeightFormat]
    ) -> Tensor:
        """Multiply quantised rows (m, k), sorted by expert, by the experts' weights (E, n, k): float32 (m, n)."""
        packed, weight_scale, format = experts
        if format.bits == 8:
            return self._kernels.grouped(rows, packed, offsets, scale, weight_scale, None, torch.float32)
        rows, scales = padded(rows, BLOCK), weight_scale.view(len(packed), -1, packed.shape[1])
        group = format.group or rows.shape[1]
        return self._kernels.four_bit.grouped(rows, packed, offsets, scale, scales, None, torch.float32, group)

    def _activate(self, gate_up: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Compute act(gate) * up of (m, 2 f) and quantise it for the down projections of the rows' experts (m,)."""
        if self._fused:
            scale = None if self._scales is None else self._scales[:1]
            return self._kernels.swiglu_quantize(gate_up, scale, self._down_rotation)
        gate, up = gate_up.chunk(2, dim=1)
        inner = swiglu(gate, up) if self.swiglu else cast(Expert, self[0]).gating(gate, up)
        if self._scales is None:
            return self.backend.quantize(inner, "token", None, rotation=self._down_rotation)
        scale = self._scales[experts]
        return round_to_grid(rotate(inner, self._down_rotation), scale[:, None]).to(torch.int8), scale


def can_group(experts: Int8Experts) -> bool:
    """Return whether experts can be grouped.

    All weights must be in memory, those of a projection in one format. The inputs of all down projections must be
    quantised for all rows at once. That excludes the `tensor` scheme, whose scale depends on the rows of one expert and
    one sequence.
    """
    parts = [projections(cast(Expert, expert)) for expert in experts]
    downs = [down for _, _, down in parts]
    return (
        all(linear.packed.numel() and linear.bias is None for part in parts for linear in part)
        and len({linear.format for part in parts for linear in part[:2]}) == 1
        and len({down.format for down in downs}) == 1
        and len({(down.scheme, down.rotation) for down in downs}) == 1
        and downs[0].scheme != "tensor"
        and downs[0].in_features % K_MULTIPLE == 0
    )


def _stack_weights(experts: list[tuple[Int8Linear, ...]]) -> tuple[Tensor, Tensor, WeightFormat]:
    """Move the experts' linears into one tensor, of which they become views.

    Linears move one at a time, so at most one projection of the layer is in memory twice.

    Returns:
        Packed weights (E, n, ...), scales (E, n) or (E, groups, n), and their format. An expert's linears follow each
        other along n.
    """
    rows = [linear.out_features for linear in experts[0]]
    first = experts[0][0]
    packed = first.packed.new_empty(len(experts), sum(rows), first.packed.shape[1])
    scales = first.weight_scale.new_empty(len(experts), *first.weight_scale.shape[:-1], sum(rows))
    for linears, own, own_scales in zip(experts, packed, scales, strict=True):
        for linear, part, scale in zip(linears, own.split(rows), own_scales.split(rows, dim=-1), strict=True):
            linear.hold(part.copy_(linear.packed))
            linear.weight_scale = scale.copy_(linear.weight_scale)
    return packed, scales, first.format
