"""One pass through the weights: calibrate, smooth, quantise and evaluate, a decoder layer at a time.

Each layer is read once. While it is there, the calibration tokens and the evaluation tokens go through it, the
latter three times: as it is, smoothed, and quantised. So the three perplexities of a model that does not fit
in memory are all measured, none is quoted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from haq_lab.calibration.calibrator import Calibrator
from haq_lab.int8.backend import Backend
from haq_lab.models.layered import LayeredModel
from haq_lab.quantizers.apply import LinearReport, quantize_group, smooth_group
from haq_lab.quantizers.base import Quantizer
from haq_lab.stopwatch import Stopwatch

Level = Literal["fp", "smoothed", "quantized"]


@dataclass
class PassResult:
    """Hidden states after the last layer, by dataset and level, and what was done to each linear."""

    hidden: dict[str, dict[Level, Tensor]]
    reports: list[LinearReport] = field(default_factory=list)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


@torch.no_grad()
def one_pass(
    model: LayeredModel,
    quantizer: Quantizer | None,
    backend: Backend,
    calibration: Tensor | None,
    propagate: Literal["fp", "quantized"],
    evaluation: dict[str, Tensor],
    finished: Callable[[int, nn.Module], None],
) -> PassResult:
    """Quantise `model` and carry the evaluation windows through it.

    Args:
        quantizer: None leaves the model at full precision; only the level `fp` is then evaluated.
        calibration: Token windows (n, t), or None where the quantizer needs none.
        propagate: Whose hidden states the statistics are taken from, the full-precision model's or those of
            the model as quantised so far.
        evaluation: Token windows (n, t) by dataset.
        finished: Called with each layer once it is in its final form.
    """
    levels: tuple[Level, ...] = ("fp",) if quantizer is None else ("fp", "smoothed", "quantized")
    embedded = {name: model.embed(windows) for name, windows in evaluation.items()}
    result = PassResult({name: {level: hidden.clone() for level in levels} for name, hidden in embedded.items()})
    clock = result.stopwatch
    calibrator = None if quantizer is None else Calibrator(model, quantizer.needs, calibration, propagate, clock)

    def evaluate(level: Level, layer: nn.Module, index: int) -> None:
        with clock.stage("evaluate"):
            for hidden in result.hidden.values():
                model.run(layer, index, hidden[level])

    for index in range(model.depth):
        with clock.stage("load"):
            layer = model.load_layer(index)
        evaluate("fp", layer, index)
        if quantizer is not None:
            assert calibrator is not None
            smoothed = copy.deepcopy(layer)
            calibrator.enter(layer, index)
            for group in model.groups:
                statistics = calibrator.statistics(layer, index, group)
                with clock.stage("smooth"):
                    statistics, strength = smooth_group([layer, smoothed], group, model.family, quantizer, statistics)
                with clock.stage("solve"):
                    result.reports += quantize_group(layer, index, group, quantizer, statistics, strength, backend)
            calibrator.leave(layer, index)
            evaluate("smoothed", smoothed, index)
            evaluate("quantized", layer, index)
        finished(index, layer)
    return result
