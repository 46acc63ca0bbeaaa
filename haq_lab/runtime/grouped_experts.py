"""The experts of a deployed layer without a loop: one launch a projection, and no question to the GPU.

Which expert has which tokens is known on the device only. Asking for it, as the loop over experts does, stops the
host until everything before is computed; here tokens are sorted and counted where they lie.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor

from haq_lab.int8.cuda.kernels import K_MULTIPLE, Kernels
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.numerics import round_to_grid, swiglu
from haq_lab.models.experts import Expert, Experts, combined
from haq_lab.models.int8_experts import Int8Experts, projections


class GroupedExperts(Int8Experts):
    """Int8 experts whose weights lie side by side. The linears keep their places; their tensors are views.

    Where the activation is SiLU and all down projections quantise alike, it is one kernel with the quantizing; else
    torch computes it. The result has the loop's bits either way.
    """

    _kernels: Kernels
    _gate_up: tuple[Tensor, Tensor]  # packed (E, 2 f, d), scales (E, 2 f)
    _down: tuple[Tensor, Tensor]
    _first: Tensor  # 0 to E
    _scales: Tensor | None  # (E,), of the down projections' input where it is static
    _fused: bool

    @classmethod
    def of(cls, experts: Experts) -> Self:
        """The same experts, which `can_group`."""
        made = super().of(experts)
        made.swiglu = cast(Int8Experts, experts).swiglu
        parts = [projections(cast(Expert, expert)) for expert in made]
        assert made.backend.fused_kernels is not None
        made._kernels = made.backend.fused_kernels
        made._gate_up = _side_by_side([part[:2] for part in parts])
        made._down = _side_by_side([part[2:] for part in parts])
        made._first = torch.arange(len(made) + 1, device=made.backend.device)
        scales = [down.input_scale for _, _, down in parts if down.input_scale is not None]
        made._scales = torch.stack(scales).float().to(made.backend.device) if scales else None
        made._fused = made.swiglu and len({down.input_quantization for _, _, down in parts}) == 1
        return made

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (t, d), expert numbers (t, k) and gate weights (t, k) -> (t, d)."""
        levels, scale = self.backend.quantize(hidden, self.scheme, self.input_scale)
        flat = chosen.flatten()
        pairs = flat.argsort(stable=True)  # of a token and one of its experts, by expert
        owners, tokens = flat[pairs], pairs // chosen.shape[1]
        # Where each expert's rows begin. Not `bincount`, which asks the device for the largest number.
        offsets = torch.searchsorted(owners, self._first, out_int32=True)
        both = self._grouped(levels[tokens], scale[tokens], offsets, self._gate_up)
        results = hidden.new_empty(len(flat), hidden.shape[1])
        results[pairs] = self._grouped(*self._activated(both, owners), offsets, self._down).to(hidden.dtype)
        return combined(results.view(*chosen.shape, hidden.shape[1]), weights)

    def _grouped(self, rows: Tensor, scale: Tensor, offsets: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
        """Quantised rows (m, k), sorted by expert, by the experts' weights (E, n, k) -> float32 (m, n)."""
        packed, weight_scale = by
        return self._kernels.grouped(rows, packed, offsets, scale, weight_scale, None, torch.float32)

    def _activated(self, both: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """act(gate) * up of (m, 2 f), quantised for the down projections of the experts `owners` (m,)."""
        if self._fused:
            return self._kernels.swiglu_quantize(both, None if self._scales is None else self._scales[:1])
        gate, up = both.chunk(2, dim=1)
        inner = swiglu(gate, up) if self.swiglu else cast(Expert, self[0]).act_fn(gate) * up
        if self._scales is None:
            return self.backend.quantize(inner, "token", None)
        scale = self._scales[owners]
        return round_to_grid(inner, scale[:, None]).to(torch.int8), scale


def can_group(experts: Int8Experts) -> bool:
    """Whether all experts' weights are in memory (none offloaded), and each down projection's input can be quantised
    for all rows at once: not with one scale for an expert's rows of the moment."""
    parts = [projections(cast(Expert, expert)) for expert in experts]
    downs = [down for _, _, down in parts]
    return (
        all(linear.packed.numel() and linear.bias is None for part in parts for linear in part)
        and len({down.scheme for down in downs}) == 1
        and downs[0].scheme != "tensor"
        and downs[0].in_features % K_MULTIPLE == 0
    )


def _side_by_side(experts: list[tuple[Int8Linear, ...]]) -> tuple[Tensor, Tensor]:
    """Each expert's linears on top of each other: packed weights (E, n, k), scales (E, n), of which they get views.

    One linear after the other: what is held twice meanwhile is at most a projection of one layer.
    """
    rows = [linear.out_features for linear in experts[0]]
    first = experts[0][0]
    packed = first.packed.new_empty(len(experts), sum(rows), first.packed.shape[1])
    scales = first.weight_scale.new_empty(len(experts), sum(rows))
    for linears, *own in zip(experts, packed, scales, strict=True):
        for linear, part, scale in zip(linears, *(tensor.split(rows) for tensor in own), strict=True):
            linear.hold(part.copy_(linear.packed))
            linear.weight_scale = scale.copy_(linear.weight_scale)
    return packed, scales
