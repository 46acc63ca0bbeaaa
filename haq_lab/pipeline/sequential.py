"""One pass through the weights: calibrate, smooth, quantise and evaluate, a decoder layer at a time.

Each layer is read once. While it is there, the calibration tokens and the evaluation tokens go through it, the
latter three times: as it is, smoothed, and quantised. So the three perplexities of a model that does not fit
in memory are all measured, none is quoted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from haq_lab.pipeline.evaluation_states import Evaluation
from haq_lab.quantizers.apply import LinearReport, quantize_group, smooth_group
from haq_lab.quantizers.base import Quantizer
from haq_lab.quantizers.pass_result import LayerStore, Level, PassResult, PassState
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.storage.tensor_names import expert_of
from haq_lab.utils.malloc import release_memory
from haq_lab.utils.timer import Stopwatch


@torch.no_grad()
def sequential_pass(
    model: LayeredModel,
    quantizer: Quantizer | None,
    backend: Backend,
    calibration: Tensor | None,
    policy: CalibrationPolicy,
    evaluation: dict[str, Tensor],
    finished: Callable[[int, nn.Module], None],
    keeper: LayerStore | None = None,
    store: Store | None = None,
) -> PassResult:
    """Quantise `model` and carry the evaluation windows through it.

    Args:
        quantizer: None leaves the model at full precision; only the level `fp` is then evaluated.
        calibration: Token windows (n, t), or None where the quantizer needs none.
        policy: How the statistics are gathered.
        evaluation: Token windows (n, t) by dataset.
        finished: Called with each layer once it is in its final form; the pass keeps none of them.
        keeper: Where a killed pass goes on from; `finished` is not called for layers that were done before.
        store: Stages of the full-precision model that other runs have computed, and where this one's go.
    """
    store, spool, clock = store or Store(), HiddenStateBuffer(), Stopwatch()
    at: dict[str, int] = {}
    texts = Evaluation(model, evaluation, quantizer is not None, spool, store, at)
    result = PassResult(texts.hidden, stopwatch=clock)
    calibrator = None
    if quantizer is not None:
        calibrator = Calibrator(model, quantizer.needs, calibration, policy, clock, spool, store, at)
        result.routing = calibrator.routing

    def evaluate(level: Level, layer: nn.Module, index: int) -> None:
        with clock.stage("evaluate"):
            texts.advance(level, layer, index)

    state = PassState(_hidden(result, calibrator), result, at)
    done = 0 if keeper is None else keeper.restore(state)
    for index in range(done, model.depth):
        with clock.stage("load"):
            layer = model.load_layer(index)
        evaluate(texts.first, layer, index)
        if quantizer is not None:
            assert calibrator is not None
            smoothed = _sharing(layer) if evaluation else None  # it keeps the float weights
            states = [layer] if smoothed is None else [layer, smoothed]
            result.reports += _quantize_layer(model, states, index, quantizer, backend, calibrator, result.ranges)
            del states
            spool.release()
            if smoothed is not None:
                evaluate("smoothed", smoothed, index)
                evaluate("quantized", layer, index)
            del smoothed
        if keeper is not None:
            with clock.stage("write"):
                keeper.keep(index, layer, state)
        finished(index, layer)
        del layer  # or it would stay while the next one is read
        release_memory()
    texts.keep()
    return result


def _quantize_layer(
    model: LayeredModel,
    states: list[nn.Module],
    index: int,
    quantizer: Quantizer,
    backend: Backend,
    calibrator: Calibrator,
    ranges: Ranges,
) -> list[LinearReport]:
    """Smooth all states of a layer and quantise the first, group by group."""
    reports: list[LinearReport] = []
    layer, clock = states[0], calibrator.clock
    calibrator.enter(layer, index)
    for group in model.groups:
        seen = calibrator.statistics(layer, index, group)
        with clock.stage("smooth"):
            statistics, strength = smooth_group(states, group, model.family, quantizer, seen)
        if seen is not None and statistics is not None and group.expert is None:
            ranges.add(group.site, seen.channel_max, statistics.channel_max)
        with clock.stage("solve"):
            reports += quantize_group(layer, index, group, quantizer, statistics, strength, backend)
    if (moe := model.family.moe) is not None:
        layer.set_submodule(moe.experts, Int8Experts.of(cast(Experts, layer.get_submodule(moe.experts))))
    if calibrator.routing is not None:
        counts = calibrator.routing.counts(index).tolist()
        for report in reports:
            if (expert := expert_of(report.linear)) is not None:
                report.notes["tokens"] = counts[expert]
    calibrator.leave(layer, index)
    return reports


def _hidden(result: PassResult, calibrator: Calibrator | None) -> dict[str, Tensor]:
    """All hidden states of a pass, by names that stay the same from one start to the next."""
    hidden = {f"{name}/{level}": own for name, levels in result.hidden.items() for level, own in levels.items()}
    if calibrator is not None:
        calibrated = {CALIBRATION: calibrator.hidden, "/calibration_fp": calibrator.hidden_fp}
        hidden |= {name: own for name, own in calibrated.items() if own is not None}
    return hidden


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of the modules on the very same weights: a second set of a layer's would be gigabytes."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})
