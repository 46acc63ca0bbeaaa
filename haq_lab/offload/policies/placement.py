"""Choose the experts that are in the fast tier at the start.

The paper (arXiv 2508.07329) has three schemes: `frequency` (scheme 1), `uniform` (scheme 2) and `two_stage` (scheme 3).
KTransformers has two more: `random` and `front`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.jit import compiled
from haq_lab.routing.statistics import Residency, frequencies
from haq_lab.routing.trace import Trace
from haq_lab.utils.errors import UserError, invalid

Placement = Literal["random", "uniform", "frequency", "front", "two_stage"]
PLACEMENTS = get_args(Placement)
SPAN = 2  # layers in a fragment: a fetch can overlap with about one layer's computation
FLOOR = 0.9  # minimum of every layer in stage two, as a part of an equal share of the slots
MAX_FRAGMENTS = 200  # most frequent fragments that are kept per group of layers; few tokens take another


def place(rule: str, trace: Trace, slots: int, seed: int = 0) -> Residency:
    """Return the experts that a placement rule puts into the fast tier.

    Args:
        rule: `random`: random experts. `frequency`: the most used experts of all layers. `uniform`: the most used
            experts of each layer, the same number in each. `front`: the experts of the first layers. `two_stage`: path
            coverage, then a minimum for each layer.
        trace: Calibration trace of the model.
        slots: Number of experts to place.
        seed: Seed of `random`.

    Returns:
        (layers, E) bool, true for `slots` experts, or for all experts if there are fewer.

    Raises:
        UserError: There is no such rule, or no slot.

    Example:
        resident = place("two_stage", trace, slots=96)
    """
    layers, experts = trace.layers, trace.expert_count
    if slots < 1:
        raise UserError("offload.budget: it holds no expert. Raise it, or choose offload=none.")
    slots = min(slots, layers * experts)
    match rule:
        case "random":
            return _highest(np.random.default_rng(seed).random((layers, experts)), slots)
        case "uniform":
            return _per_layer(frequencies(trace), slots)
        case "frequency":
            return _highest(frequencies(trace), slots)
        case "front":
            return _highest(frequencies(trace) - 2.0 * np.arange(layers)[:, None], slots)
        case "two_stage":
            return two_stage(trace, slots)
    raise invalid("offload.placement", rule, PLACEMENTS)


def two_stage(trace: Trace, slots: int, span: int = SPAN, floor: float = FLOOR) -> Residency:
    """Place experts by path coverage, then fill every layer up to a minimum (scheme 3 of arXiv 2508.07329).

    Stage one stops when the remaining slots are needed to fill the layers up to the minimum.

    Args:
        trace: Calibration trace of the model.
        slots: Number of experts to place.
        span: Number of neighbouring layers in a path fragment.
        floor: Minimum of every layer, as a part (0 to 1) of an equal share of the slots.

    Returns:
        (layers, E) bool, the placed experts.
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
    free = slots - int(resident.sum())
    return resident | _highest(np.where(resident, -1.0, usage), free)


def _highest(values: NDArray[np.float64], slots: int) -> Residency:
    resident = np.zeros(values.shape, np.bool_)
    resident.ravel()[np.argsort(-values, axis=None, kind="stable")[:slots]] = True
    return resident


def _per_layer(usage: NDArray[np.float64], slots: int) -> Residency:
    layers = len(usage)
    shares = [slots * (layer + 1) // layers - slots * layer // layers for layer in range(layers)]
    return np.stack([_highest(row, share) for row, share in zip(usage, shares, strict=True)])


@dataclass(frozen=True)
class Fragments:
    """The distinct path fragments of one group of neighbouring layers.

    A path fragment is the set of experts that one token visits in these layers.

    Attributes:
        experts: (n, span * k) int32, layer * E + expert.
        counts: (n,) int64, number of tokens that take each fragment.
    """

    experts: NDArray[np.int32]
    counts: NDArray[np.int64]


def fragments(trace: Trace, span: int) -> list[Fragments]:
    """Return the fragments of every group of `span` neighbouring layers, the most frequent first."""
    groups = []
    for first in range(trace.layers - span + 1):
        layer = np.arange(first, first + span, dtype=np.int32)[None, :, None]
        experts = np.sort(trace.experts[:, first : first + span].astype(np.int32), -1) + layer * trace.expert_count
        unique, counts = np.unique(experts.reshape(trace.tokens, -1), axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:MAX_FRAGMENTS]
        groups.append(Fragments(unique[order].astype(np.int32), counts[order]))
    return groups


def add_paths(trace: Trace, slots: int, minimum: int, span: int) -> Residency:
    """Place experts by path coverage, which is stage one of `two_stage`.

    A fragment counts once all its experts are resident. So the search is greedy over whole fragments. It always adds
    the fragment whose missing experts complete the most tokens' fragments per slot.

    Args:
        trace: Calibration trace of the model.
        slots: Number of experts that may be placed.
        minimum: Number of experts that every layer must still be able to reach with the remaining slots.
        span: Number of neighbouring layers in a fragment.

    Returns:
        (layers, E) bool. Slots that are too few for any further fragment stay free.
    """
    groups = fragments(trace, span)
    resident = np.zeros(trace.layers * trace.expert_count, np.bool_)
    best = [_best_fragment(group.experts, group.counts, resident) for group in groups]
    while True:
        chosen = max(range(len(groups)), key=lambda group: best[group][1])
        fragment, rate = best[chosen]
        if rate <= 0:
            break
        added = resident.copy()
        added[groups[chosen].experts[fragment]] = True
        if _needed_slots(added.reshape(trace.layers, -1), minimum) > slots:
            groups[chosen].counts[fragment] = 0  # it does not fit now, so it never will
            best[chosen] = _best_fragment(groups[chosen].experts, groups[chosen].counts, resident)
            continue
        resident = added
        for group in range(max(0, chosen - span + 1), min(len(groups), chosen + span)):
            best[group] = _best_fragment(groups[group].experts, groups[group].counts, resident)
    return resident.reshape(trace.layers, -1)


def _needed_slots(resident: Residency, minimum: int) -> int:
    """Return the slots of the residents, plus the slots that layers lack to their minimum."""
    return int(np.maximum(resident.sum(-1), minimum).sum())


@compiled
def _best_fragment(experts, counts, resident):
    """Return the fragment that completes the most tokens per slot, and this number; (0, 0.0) if there is none."""
    present = resident.copy()
    best, best_rate = 0, 0.0
    for candidate in range(len(experts)):
        cost = 0
        for expert in experts[candidate]:
            if not present[expert]:
                cost += 1
        if cost == 0 or counts[candidate] == 0:
            continue
        for expert in experts[candidate]:
            present[expert] = True
        gain = 0
        for other in range(len(experts)):
            complete, new = True, False
            for expert in experts[other]:
                complete = complete and present[expert]
                new = new or not resident[expert]
            if complete and new:
                gain += counts[other]
        for expert in experts[candidate]:
            present[expert] = resident[expert]
        if gain / cost > best_rate:
            best, best_rate = candidate, gain / cost
    return best, best_rate
