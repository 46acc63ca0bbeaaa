"""Apply a quantizer to one group of a decoder layer: smooth its input, then put int8 linears where linears were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from haq_lab.calibration.statistics import InputStatistics
from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.architectures import Family, Group
from haq_lab.quantizers.base import ActivationChoice, Quantizer, Solution, output_error
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import Channels, fold, stacked


@dataclass
class LinearReport:
    """What was done to one linear, for the per-layer table. Errors are mean squares of the layer's output."""

    layer: int
    linear: str
    activation_scheme: str
    smoothing_strength: float | None = None
    static_scale: float | None = None
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
    """Choose the group's factor by the first of `layers` and fold it into all of them, in place.

    Args:
        layers: States of one layer, which may share tensors.

    Returns:
        The statistics of the smoothed input, and the strength taken (None: not smoothed).
    """
    if group.source is None:
        return statistics, None
    weight = stacked(layers[0], group.readers)
    channels = Channels(group, layers[0], weight.shape[1])
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
) -> list[LinearReport]:
    """Replace the group's linears by `Int8Linear`s, in place; returns a report for each.

    How the input is quantised is one choice for the group, so that experts that share it need it quantised but
    once. The weights are solved by expert, each under its own statistics where it has some.
    """
    activation = quantizer.activation(stacked(layer, group.consumers), statistics)
    reports = []
    for expert, names in group.parts().items():
        own = None if statistics is None else statistics.of(expert)
        solution = quantizer.solve(stacked(layer, names), own, activation)
        done = 0
        for name in names:
            rows = slice(done, done := done + cast(nn.Linear, layer.get_submodule(name)).out_features)
            solved = Solution(solution.levels[rows].clone(), solution.scale[rows].clone(), dict(solution.notes))
            if own is not None and own.stands_in:
                solved.notes.setdefault("fallback", "shared")
            report = LinearReport(index, name, activation.scheme, strength, notes=solved.notes)
            if activation.scale is not None:
                report.static_scale = float(activation.scale)
            _measure_errors(report, cast(Tensor, layer.get_submodule(name).weight), quantizer, own, solved)
            reports.append(report)
            _put(layer, name, solved, activation, backend)
    return reports


def _measure_errors(
    report: LinearReport,
    weight: Tensor,
    quantizer: Quantizer,
    statistics: InputStatistics | None,
    solved: Solution,
) -> None:
    """What the weights' rounding leaves at the output, beside what rounding to nearest would; nothing without H."""
    if statistics is None or statistics.hessian is None:
        return
    scale = row_scale(weight, quantizer.weight_bits)
    nearest = Solution(round_to_nearest(weight, scale, quantizer.weight_bits), scale)
    report.error_rtn = output_error(weight, nearest, statistics.hessian)
    report.output_error = output_error(weight, solved, statistics.hessian)


def _put(layer: nn.Module, name: str, solved: Solution, activation: ActivationChoice, backend: Backend) -> None:
    """An int8 linear where a linear was. The bias is its own: the linear lives on in the layer as smoothed. So is the
    scale: a linear that is read from a file then takes as many bytes."""
    bias = cast(Tensor | None, layer.get_submodule(name).bias)
    int8 = Int8Linear(
        solved.levels,
        solved.scale,
        None if bias is None else bias.detach().clone(),
        activation.scheme,
        None if activation.scale is None else activation.scale.clone(),
        backend,
    )
    layer.set_submodule(name, int8)
