"""LRU eviction: evict the least recently used expert, as mixtral-offloading does in each layer (arXiv 2312.17238)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost


class Lru(NamedTuple):
    """`values` is the time of an expert's last use; `clock` (1,) counts visits."""

    values: np.ndarray
    clock: np.ndarray


def lru(layers: int, experts: int) -> Lru:
    """Return the state before the first visit."""
    return Lru(np.zeros((layers, experts), np.int64), np.zeros(1, np.int64))


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    state.clock[0] += 1
    for expert in wanted:
        state.values[layer, expert] = state.clock[0]


register(Lru, _touch)
