"""Calibrate, smooth, quantise and evaluate a model in one pass, one decoder layer at a time.

The pass reads each layer once. It runs the calibration windows through the layer once and the evaluation windows up
to three times: with the original, the smoothed and the quantised weights. So it measures all three perplexities, even
of a model that does not fit in memory. All of them are behind the model's prefix, if it has one. A method that does not
smooth saves the second time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from haq_lab.calibration.calibrator import CALIBRATION, Calibrator
from haq_lab.calibration.channel_ranges import Ranges
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import Backend
from haq_lab.models.experts import Experts
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.bit_pass import choose_bits
from haq_lab.pipeline.evaluation_states import Evaluation
from haq_lab.quantizers.apply import Allocation, LinearReport, quantize_group, smooth_group
from haq_lab.quantizers.base import Quantizer
from haq_lab.quantizers.pass_result import LayerStore, Level, PassResult, PassState
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.malloc import release_memory
from haq_lab.utils.timer import Stopwatch


@dataclass(frozen=True)
class PassInputs:
    """Inputs of `sequential_pass`: the model, the method and the texts.

    Attributes:
        model: The model to quantise.
        quantizer: The method. If None, the model is only evaluated as it is.
        backend: The backend that computes the int8 products.
        calibration: Token windows (n, t), or None if the quantizer needs none.
        policy: How the pass gathers the calibration statistics.
        evaluation: Token windows (n, t) by dataset.
    """

    model: LayeredModel
    quantizer: Quantizer | None
    backend: Backend
    calibration: Tensor | None = None
    policy: CalibrationPolicy = field(default_factory=CalibrationPolicy)
    evaluation: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def sequential_pass(
    inputs: PassInputs,
    on_layer: Callable[[int, nn.Module], None],
    checkpoint: LayerStore | None = None,
    store: Store | None = None,
) -> PassResult:
    """Quantise a model layer by layer and run the evaluation windows through it.

    Args:
        inputs: The model, the method and the texts.
        on_layer: Called with the index and the module of each finished layer. The pass itself keeps no layer.
        checkpoint: Saves the state after each layer, so that a killed pass can resume. `on_layer` is not called for
            layers that an earlier pass finished.
        store: The result cache for intermediate results of the full-precision model.

    Returns:
        Hidden states (n, t, d) by dataset and level, a report for each linear, channel ranges, the routing of the
        calibration tokens (MoE models) and the seconds of each stage.

    Example:
        >>> layers = []
        >>> inputs = PassInputs(model, RTN(), CpuBackend(), evaluation={"text": windows})
        >>> result = sequential_pass(inputs, lambda index, layer: layers.append(layer))
    """
    model, quantizer, backend = inputs.model, inputs.quantizer, inputs.backend
    store, buffer, clock = store or Store(), HiddenStateBuffer(), Stopwatch()
    next_layer: dict[str, int] = {}
    evaluation = Evaluation(model, inputs.evaluation, quantizer, buffer, store, next_layer)
    result = PassResult(evaluation.hidden, stopwatch=clock)
    calibrator = None
    if quantizer is not None:
        calibrator = Calibrator(
            model, quantizer.needs, inputs.calibration, inputs.policy, clock, buffer, store, next_layer
        )
        result.routing = calibrator.routing

    def evaluate(level: Level, layer: nn.Module, index: int) -> None:
        with clock.stage("evaluate"):
            evaluation.advance(level, layer, index)

    allocation = None
    if quantizer is not None:
        allocation = choose_bits(model, quantizer, inputs.calibration, inputs.policy, store, clock)
    state = PassState(_hidden_states(result, calibrator), result, next_layer)
    first = 0 if checkpoint is None else checkpoint.restore(state)
    for index in range(first, model.depth):
        with clock.stage("load"):
            layer = model.load_layer(index)
        for level in evaluation.as_it_is:
            evaluate(level, layer, index)
        if quantizer is not None:
            assert calibrator is not None
            smoothed = _copy_sharing_weights(layer) if inputs.evaluation and quantizer.smooths else None
            states = [layer] if smoothed is None else [layer, smoothed]
            arguments = quantizer, backend, calibrator, result.ranges, allocation
            result.reports += _quantize_layer(model, states, index, *arguments)
            del states
            buffer.release()
            if smoothed is not None:
                evaluate("smoothed", smoothed, index)
            evaluate("quantized", layer, index)
            del smoothed
        if checkpoint is not None:
            with clock.stage("write"):
                checkpoint.keep(index, layer, state)
        on_layer(index, layer)
        del layer  # so that two layers are never in memory at the same time
        release_memory()
    evaluation.store_baselines()
    return result


def _quantize_layer(
    model: LayeredModel,
    states: list[nn.Module],
    index: int,
    quantizer: Quantizer,
    backend: Backend,
    calibrator: Calibrator,
    ranges: Ranges,
    allocation: Allocation | None,
) -> list[LinearReport]:
    """Smooth every copy of a layer and quantise the first copy, group by group."""
    reports: list[LinearReport] = []
    layer, clock = states[0], calibrator.clock
    calibrator.enter(layer, index)
    for group in model.groups_of(index):
        seen = calibrator.statistics(layer, index, group)
        with clock.stage("smooth"):
            statistics, strength = smooth_group(states, group, model.family, quantizer, seen)
        if seen is not None and statistics is not None and group.expert is None:
            ranges.add(group.site, seen.channel_max, statistics.channel_max)
        with clock.stage("solve"):
            reports += quantize_group(layer, index, group, quantizer, statistics, strength, backend, allocation)
    if (moe := model.moe_of(index)) is not None:
        layer.set_submodule(moe.experts, Int8Experts.of(cast(Experts, layer.get_submodule(moe.experts))))
    if moe is not None and calibrator.routing is not None:
        counts = calibrator.routing.counts(index).tolist()
        for report in reports:
            if (expert := expert_of(report.linear)) is not None:
                report.notes["tokens"] = counts[expert]
    calibrator.leave(layer, index)
    return reports


def _hidden_states(result: PassResult, calibrator: Calibrator | None) -> dict[str, Tensor]:
    """Return all hidden states of a pass by name. A resumed pass uses the same names."""
    hidden = {f"{name}/{level}": own for name, levels in result.hidden.items() for level, own in levels.items()}
    if calibrator is not None:
        calibrated = {CALIBRATION: calibrator.hidden, "/calibration_fp": calibrator.hidden_fp}
        hidden |= {name: own for name, own in calibrated.items() if own is not None}
    return hidden


def _copy_sharing_weights(layer: nn.Module) -> nn.Module:
    """Copy a layer's modules but share its weights, because a second set would take gigabytes."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})
