"""LFU eviction: evict the least frequently used expert, and among equals the least recently used (arXiv 2511.05814)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost

USE = 2**34  # what a use is worth in visits: more than there ever are; 500 million uses still fit


class Lfu(NamedTuple):
    """`counts` (layers, E) of uses; `clock` (1,) counts visits."""

    values: np.ndarray
    counts: np.ndarray
    clock: np.ndarray


def lfu(layers: int, experts: int) -> Lfu:
    """Return the state before the first visit."""
    counts, values = (np.zeros((layers, experts), np.int64) for _ in range(2))
    return Lfu(values, counts, np.zeros(1, np.int64))


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    state.clock[0] += 1
    for expert in wanted:
        state.counts[layer, expert] += counts[expert]
        state.values[layer, expert] = USE * state.counts[layer, expert] + state.clock[0]


register(Lfu, _touch)
