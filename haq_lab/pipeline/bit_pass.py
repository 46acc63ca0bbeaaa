"""Choose the bits of each linear before a model is quantised (`quantizer.weight_bits=auto`).

A first pass through the full-precision layers smooths each layer as the quantizer would, and predicts what rounding
its weights to 4 and to 8 bits adds to the KL divergence. With `calibration.inputs=fp`, the result cache shares its
statistics with the pass that quantises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from haq_lab.calibration.calibrator import Calibrator
from haq_lab.calibration.statistics import CalibrationPolicy, InputStatistics
from haq_lab.int8.rotation import rotate
from haq_lab.models.families.family import Group
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.apply import Allocation, smooth_group
from haq_lab.quantizers.base import Quantizer
from haq_lab.quantizers.bit_allocation import Choice, allocate
from haq_lab.quantizers.smoothing import stack_weights
from haq_lab.result_cache.store import Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.malloc import release_memory
from haq_lab.utils.timer import Stopwatch


def choose_bits(
    model: LayeredModel,
    quantizer: Quantizer,
    windows: Tensor | None,
    policy: CalibrationPolicy,
    store: Store,
    clock: Stopwatch,
) -> Allocation | None:
    """Choose the bits of all linears.

    Args:
        model: The full-precision model.
        quantizer: The quantizer.
        windows: Calibration windows (n, t).
        policy: How the statistics are gathered. Here they always come from the full-precision model.
        store: The result cache.
        clock: Records the time as the stage `bits`.

    Returns:
        The bits, or None if the quantizer does not ask for them.
    """
    if quantizer.average_bits is None:
        return None
    own_clock = Stopwatch()
    with clock.stage("bits"):
        calibrator = Calibrator(
            model, quantizer.needs, windows, replace(policy, inputs="fp"), own_clock, HiddenStateBuffer(), store, {}
        )
        choices: dict[tuple[int, tuple[str, ...]], Choice] = {}
        for index in range(model.depth):
            layer = model.load_layer(index)
            calibrator.enter(layer, index)
            for group in model.groups_of(index):
                statistics = calibrator.statistics(layer, index, group)
                statistics, _ = smooth_group([layer], group, model.family, quantizer, statistics)
                assert statistics is not None
                choices |= {
                    (index, names): choice for names, choice in _choices(layer, group, quantizer, statistics).items()
                }
            calibrator.leave(layer, index)
            del layer
            release_memory()
        return allocate(choices, quantizer.average_bits)


def _choices(
    layer: nn.Module, group: Group, quantizer: Quantizer, statistics: InputStatistics
) -> dict[tuple[str, ...], Choice]:
    """Return what 8 bits save for the linears of a smoothed group that are solved together, by their names."""
    assert statistics.sensitivity is not None
    rotation = quantizer.rotation_of(stack_weights(layer, group.consumers).shape[1])
    statistics = statistics.rotated(rotation)
    assert statistics.sensitivity is not None
    rows = [len(cast(Tensor, layer.get_submodule(name).weight)) for name in group.consumers]
    costs = dict(zip(group.consumers, statistics.sensitivity.outputs.split(rows), strict=True))
    choices = {}
    for expert, names in group.consumers_by_expert().items():
        weight, own = rotate(stack_weights(layer, names), rotation), statistics.of(expert)
        cost = torch.cat([costs[name] for name in names])
        narrow, wide = (quantizer.with_bits(bits).weight_error(weight, own, cost) for bits in (4, 8))
        choices[names] = Choice(weight.numel(), narrow - wide)
    return choices
