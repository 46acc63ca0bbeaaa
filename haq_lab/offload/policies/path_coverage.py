"""Path coverage, stage one of the paper's two-stage placement: a greedy choice of whole paths.

A path fragment is the set of experts that a token visits over `span` neighbouring layers. It counts once all of
them are resident, so experts are added a fragment at a time: always the one whose missing experts complete the
most tokens' fragments per slot. The tests hold this choice against exhaustive search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.jit import compiled
from haq_lab.routing.statistics import Residency
from haq_lab.routing.trace import Trace

MOST = 200  # fragments kept per group of layers, the most frequent ones: few tokens take any other


@dataclass(frozen=True)
class Fragments:
    """The distinct fragments over one group of layers.

    Attributes:
        experts: (n, span * k) int32, layer * E + expert.
        counts: (n,) int64 tokens.
    """

    experts: NDArray[np.int32]
    counts: NDArray[np.int64]


def fragments(trace: Trace, span: int) -> list[Fragments]:
    """The fragments of every group of `span` neighbouring layers, the most frequent first."""
    found = []
    for first in range(trace.layers - span + 1):
        layer = np.arange(first, first + span, dtype=np.int32)[None, :, None]
        experts = np.sort(trace.experts[:, first : first + span], -1) + layer * trace.expert_count
        unique, counts = np.unique(experts.reshape(trace.tokens, -1), axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:MOST]
        found.append(Fragments(unique[order].astype(np.int32), counts[order]))
    return found


def add_paths(trace: Trace, slots: int, minimum: int, span: int) -> Residency:
    """Experts for at most `slots` slots, by path coverage, so that all layers can still reach `minimum`.

    Returns:
        (layers, E) bool. Slots that no further whole fragment fits into are left.
    """
    groups = fragments(trace, span)
    resident = np.zeros(trace.layers * trace.expert_count, np.bool_)
    best = [_best(group.experts, group.counts, resident) for group in groups]
    while True:
        chosen = max(range(len(groups)), key=lambda group: best[group][1])
        fragment, rate = best[chosen]
        if rate <= 0:
            break
        added = resident.copy()
        added[groups[chosen].experts[fragment]] = True
        if _needed(added.reshape(trace.layers, -1), minimum) > slots:
            groups[chosen].counts[fragment] = 0  # does not fit, now or later
            best[chosen] = _best(groups[chosen].experts, groups[chosen].counts, resident)
            continue
        resident = added
        for group in range(max(0, chosen - span + 1), min(len(groups), chosen + span)):
            best[group] = _best(groups[group].experts, groups[group].counts, resident)
    return resident.reshape(trace.layers, -1)


def _needed(resident: Residency, minimum: int) -> int:
    """Slots that these experts take together with what layers lack to their minimum."""
    return int(np.maximum(resident.sum(-1), minimum).sum())


@compiled
def _best(experts, counts, resident):
    """(fragment, tokens that it completes per slot) for the fragment that completes the most; (0, 0.0) if none."""
    present = resident.copy()
    best, best_rate = 0, 0.0
    for one in range(len(experts)):
        cost = 0
        for expert in experts[one]:
            if not present[expert]:
                cost += 1
        if cost == 0 or counts[one] == 0:
            continue
        for expert in experts[one]:
            present[expert] = True
        gain = 0
        for other in range(len(experts)):
            whole, new = True, False
            for expert in experts[other]:
                whole = whole and present[expert]
                new = new or not resident[expert]
            if whole and new:
                gain += counts[other]
        for expert in experts[one]:
            present[expert] = resident[expert]
        if gain / cost > best_rate:
            best, best_rate = one, gain / cost
    return best, best_rate
