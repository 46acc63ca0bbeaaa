"""Placement: which experts are in the fast tier to begin with. Each rule gives a residency map (layers, E) bool.

The paper's three schemes (arXiv 2508.07329): 1 = `frequency` (most used over all layers), 2 = `uniform` (the most
used of each layer, equally many), 3 = `two_stage` (path coverage, then a minimum for each layer). Beside them
KTransformers' `random` and `front`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.path_coverage import add_paths
from haq_lab.routing.statistics import Residency, frequencies
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError, invalid

Placement = Literal["random", "uniform", "frequency", "front", "two_stage"]
PLACEMENTS = get_args(Placement)
SPAN = 2  # layers of a path that stage one counts: a fetch can hide behind about one layer's computing
FLOOR = 0.9  # of an equal share of the slots: what stage two gives every layer at least


def place(rule: str, trace: Trace, slots: int, seed: int = 0) -> Residency:
    """The residency map (layers, E) of `slots` experts by a rule, profiled on a trace.

    Raises:
        UserError: Unknown rule, or no slots.
    """
    shape = trace.layers, trace.expert_count
    if slots < 1:
        raise UserError("offload.budget: it resolves to 0 expert slots; give it more, or switch off with offload=none")
    slots = min(slots, shape[0] * shape[1])
    match rule:
        case "random":
            return _highest(np.random.default_rng(seed).random(shape), slots)
        case "uniform":
            return _per_layer(frequencies(trace), slots)
        case "frequency":
            return _highest(frequencies(trace), slots)
        case "front":
            return _highest(frequencies(trace) - 2.0 * np.arange(shape[0])[:, None], slots)
        case "two_stage":
            return two_stage(trace, slots)
    raise invalid("offload.placement", rule, PLACEMENTS)


def two_stage(trace: Trace, slots: int, span: int = SPAN, floor: float = FLOOR) -> Residency:
    """Scheme 3: first the experts that add most path coverage, then every layer up to a minimum.

    Stage one may use what stage two does not need: it stops where the slots left are those that layers lack to
    their minimum of `floor` times an equal share.

    Args:
        span: Neighbouring layers that make a path.
        floor: Of an equal share of the slots, 0 to 1.
    """
    usage = frequencies(trace)
    layers, count = usage.shape
    slots = min(slots, usage.size)
    minimum = min(math.ceil(floor * slots / layers), slots // layers, count)
    resident = add_paths(trace, slots, minimum, min(span, layers))
    for layer in range(layers):
        lacking = minimum - int(resident[layer].sum())
        if lacking > 0:
            absent = np.where(resident[layer], -1.0, usage[layer])
            resident[layer, np.argsort(-absent, kind="stable")[:lacking]] = True
    left = slots - int(resident.sum())
    return resident | _highest(np.where(resident, -1.0, usage), left)


def _highest(values: NDArray[np.float64], slots: int) -> Residency:
    resident = np.zeros(values.shape, np.bool_)
    resident.ravel()[np.argsort(-values, axis=None, kind="stable")[:slots]] = True
    return resident


def _per_layer(usage: NDArray[np.float64], slots: int) -> Residency:
    layers = len(usage)
    shares = [slots * (layer + 1) // layers - slots * layer // layers for layer in range(layers)]
    return np.stack([_highest(row, share) for row, share in zip(usage, shares, strict=True)])
