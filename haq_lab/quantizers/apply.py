"""Apply a quantizer to one group of a decoder layer: smooth its input, then replace its linears by int8 linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.rotation import rotate
from haq_lab.models.families.family import Family, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Solution, nearest_solution, output_errors
from haq_lab.quantizers.bit_allocation import Bits
from haq_lab.quantizers.smoothing import ChannelMap, fold, stack_weights

# The bits of linears that are solved together, by the index of their layer and their names.
Allocation = Mapping[tuple[int, tuple[str, ...]], Bits]


@dataclass
class LinearReport:
    """One row of the per-layer table: how one linear was quantised.

    Attributes:
        layer: Index of the decoder layer.
        linear: Name of the linear within the layer.
        activation_scheme: Activation scheme of its input.
        smoothing_strength: Smoothing strength, or None if the input was not smoothed.
        static_scale: Scale of the input if the activation scheme is static.
        weight_bits: Bits of a weight.
        weight_group: Columns that share a scale, or None if each row has one scale.
        weights: Number of weights.
        error_rtn: Mean squared output error of rounding to nearest; None without a Hessian.
        output_error: Mean squared output error of the weights as rounded; None without a Hessian.
        notes: What the quantizer reports, such as its dampening.
    """

    layer: int
    linear: str
    activation_scheme: str
    smoothing_strength: float | None = None
    static_scale: float | None = None
    weight_bits: int = 8
    weight_group: int | None = None
    weights: int = 0
    error_rtn: float | None = None
    output_error: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def smooth_group(
    layers: list[nn.Module],
    group: Group,
    family: Family,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
) -> tuple[InputStatistics | None, float | None]:
    """Choose the smoothing factor of a group and fold it into the layer, in place.

    Args:
        layers: The same decoder layer in several states (as smoothed, as quantised). The factor is chosen for the first
            and folded into all. They may share tensors.
        group: The linears that read the input.
        family: The model's architecture.
        quantizer: Chooses the factor.
        statistics: Statistics of the input, or None.

    Returns:
        The statistics of the smoothed input, and the smoothing strength (None if the group is not smoothed).
    """
    if group.source is None:
        return statistics, None
    weight = stack_weights(layers[0], group.readers)
    channels = ChannelMap(group, layers[0], weight.shape[1])
    smoothing = quantizer.smoothing(group, family, weight, statistics, channels)
    if smoothing is None:
        return statistics, None
    fold(layers, group, smoothing.factor, channels)
    return None if statistics is None else statistics.divided_by(smoothing.factor), smoothing.strength


def quantize_group(
    layer: nn.Module,
    index: int,
    group: Group,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
    strength: float | None,
    backend: Backend,
    allocation: Allocation | None = None,
) -> list[LinearReport]:
    """Replace the linears of a group by `Int8Linear`s, in place.

    All linears of the group share one activation choice, so an input that experts share is quantised only once. The
    weights are solved expert by expert, with the expert's own statistics if there are any. If the quantizer rotates the
    input, weights and statistics are rotated first.

    Args:
        layer: Decoder layer, already smoothed.
        index: Its index, for the reports.
        group: The linears to replace.
        quantizer: Chooses the activation scheme and rounds the weights.
        statistics: Statistics of the smoothed input, or None.
        strength: Smoothing strength, for the reports.
        backend: Computes the new linears.
        allocation: Bits of the linears, if they have been chosen.

    Returns:
        One report for each linear.
    """
    rotation = quantizer.rotation_of(cast(nn.Linear, layer.get_submodule(group.consumers[0])).in_features)
    if statistics is not None:
        statistics = statistics.rotated(rotation)
    weights = {name: rotate(cast(Tensor, layer.get_submodule(name).weight), rotation) for name in group.consumers}
    activation = quantizer.activation(torch.cat([*weights.values()]), statistics)
    reports = []
    for expert, names in group.consumers_by_expert().items():
        own = None if statistics is None else statistics.of(expert)
        chosen = quantizer if allocation is None else quantizer.with_bits(allocation[index, names])
        weight = torch.cat([weights[name] for name in names])
        solution = chosen.solve(weight, own, activation)
        errors = None
        if own is not None and own.hessian is not None:
            nearest = nearest_solution(weight, solution.format)
            errors = [output_errors(weight, rounded, own.hessian) for rounded in (nearest, solution)]
        first = 0
        for name in names:
            rows = slice(first, first := first + cast(nn.Linear, layer.get_submodule(name)).out_features)
            solved = solution.rows(rows)
            if own is not None and own.stands_in:
                solved.notes.setdefault("fallback", "shared")
            report = LinearReport(index, name, activation.scheme, strength, notes=solved.notes)
            if activation.scale is not None:
                report.static_scale = float(activation.scale)
            report.weight_bits, report.weight_group = solved.format.bits, solved.format.group
            report.weights = solved.levels.numel()
            if errors is not None:
                report.error_rtn, report.output_error = (float(error[rows].mean()) for error in errors)
            reports.append(report)
            _replace_linear(layer, name, solved, activation, rotation, backend)
    return reports


def _replace_linear(
    layer: nn.Module, name: str, solved: Solution, activation: ActivationChoice, rotation: int, backend: Backend
) -> None:
    """Replace a linear by an int8 linear.

    The bias is copied because the original linear stays in the smoothed state of the layer. The scale is copied so that
    the linear has as many bytes as one that is read from a checkpoint.
    """
    bias = cast(Tensor | None, layer.get_submodule(name).bias)
    int8 = Int8Linear(
        solved.levels,
        solved.scale,
        None if bias is None else bias.detach().clone(),
        activation.scheme,
        None if activation.scale is None else activation.scale.clone(),
        backend,
        rotation=rotation,
        format=solved.format,
    )
    layer.set_submodule(name, int8)
