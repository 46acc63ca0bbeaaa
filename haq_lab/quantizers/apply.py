"""Apply a quantizer to one group of a decoder layer: smooth its input, then put int8 linears where linears were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.families import Family, Group
from haq_lab.quantizers.base import Quantizer, Solution, output_error
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import Channels, fold, stacked


@dataclass
class LinearReport:
    """What was done to one linear, for the per-layer table. Errors are mean squares of the layer's output."""

    layer: int
    linear: str
    scheme: str
    strength: float | None = None
    static_scale: float | None = None
    error_rtn: float | None = None
    error: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def smooth_group(
    layers: list[nn.Module],
    group: Group,
    family: Family,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
) -> tuple[InputStatistics | None, float | None]:
    """Choose the group's factor by the first of `layers` and fold it into all of them, in place.

    Returns:
        The statistics of the smoothed input, and the strength taken (None: not smoothed).
    """
    if group.source is None:
        return statistics, None
    weight = stacked(layers[0], group)
    channels = Channels(group, layers[0], weight.shape[1])
    smoothing = quantizer.smoothing(group, family, weight, statistics, channels)
    if smoothing is None:
        return statistics, None
    for layer in layers:
        fold(layer, group, smoothing.factor, channels)
    return None if statistics is None else statistics.divided_by(smoothing.factor), smoothing.strength


def quantize_group(
    layer: nn.Module,
    index: int,
    group: Group,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
    strength: float | None,
    backend: Backend,
) -> list[LinearReport]:
    """Replace the group's linears by `Int8Linear`s, in place; returns a report for each."""
    weight = stacked(layer, group)
    activation = quantizer.activation(weight, statistics)
    solution = quantizer.solve(weight, statistics, activation)
    reports = []
    done = 0
    for name in group.consumers:
        linear = layer.get_submodule(name)
        part: Tensor = linear.weight  # type: ignore[assignment]
        rows = slice(done, done := done + len(part))
        solved = Solution(solution.levels[rows].clone(), solution.scale[rows].clone())
        report = LinearReport(index, name, activation.scheme, strength, notes=solution.notes)
        if activation.scale is not None:
            report.static_scale = float(activation.scale)
        if statistics is not None and statistics.hessian is not None:
            scale = row_scale(part, quantizer.weight_bits)
            nearest = Solution(round_to_nearest(part, scale, quantizer.weight_bits), scale)
            report.error_rtn = output_error(part, nearest, statistics.hessian)
            report.error = output_error(part, solved, statistics.hessian)
        reports.append(report)
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        int8 = Int8Linear(
            solved.levels,
            solved.scale,
            None if bias is None else bias.detach(),
            activation.scheme,
            activation.scale,
            backend,
        )
        layer.set_submodule(name, int8)
    return reports
