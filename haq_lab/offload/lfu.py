"""Least frequently used, ties to the least recently used. It can beat LRU on Mixtral (arXiv 2511.05814)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haq_lab.offload.cache import teach
from haq_lab.offload.compiled import compiled

RECENT = 2.0**-30  # a visit's share of the value: float64 holds it beside 4 million uses, and 2^30 visits are no use


class Lfu(NamedTuple):
    """`counts` (layers, E) of uses; `clock` (1,) counts visits."""

    values: np.ndarray
    counts: np.ndarray
    clock: np.ndarray


def lfu(layers: int, experts: int) -> Lfu:
    """The rule before anything was used."""
    return Lfu(np.zeros((layers, experts)), np.zeros((layers, experts)), np.zeros(1))


@compiled
def _begin(state):
    pass


@compiled
def _touch(state, layer, counts, tokens, now):
    state.clock[0] += 1
    for expert in range(len(counts)):
        if counts[expert] > 0:
            state.counts[layer, expert] += counts[expert]
            state.values[layer, expert] = state.counts[layer, expert] + RECENT * state.clock[0]


@compiled
def _refresh(state, layer):
    pass


teach(Lfu, _begin, _touch, _refresh)
