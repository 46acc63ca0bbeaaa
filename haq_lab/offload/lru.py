"""Least recently used: mixtral-offloading's rule (arXiv 2312.17238), there with a cache for each layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haq_lab.offload.cache import teach
from haq_lab.offload.compiled import compiled


class Lru(NamedTuple):
    """`values` is the time of an expert's last use; `clock` (1,) counts visits."""

    values: np.ndarray
    clock: np.ndarray


def lru(layers: int, experts: int) -> Lru:
    """The rule before anything was used."""
    return Lru(np.zeros((layers, experts)), np.zeros(1))


@compiled
def _begin(state):
    pass


@compiled
def _touch(state, layer, counts, tokens, now):
    state.clock[0] += 1
    for expert in range(len(counts)):
        if counts[expert] > 0:
            state.values[layer, expert] = state.clock[0]


@compiled
def _refresh(state, layer):
    pass


teach(Lru, _begin, _touch, _refresh)
