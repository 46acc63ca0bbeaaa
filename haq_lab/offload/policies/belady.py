"""Belady's rule: evict the expert whose next use is furthest in the future.

It needs the future, so only a replay can use it. Its hit rate is an upper bound for every cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost
from haq_lab.routing.trace import Trace

NEVER = np.iinfo(np.int64).max // 2


class Belady(NamedTuple):
    """`values` is `NEVER` minus the time (token * layers + layer) of an expert's next use.

    `ahead` (tokens, layers, E) would be large, so next uses are kept as a list for each expert: `uses` holds the
    tokens that choose it, in order, from `cursor` (layers, E) on to `end` (layers, E).
    """

    values: np.ndarray
    uses: np.ndarray
    cursor: np.ndarray
    end: np.ndarray


def belady(trace: Trace) -> Belady:
    """Return the state for one trace, which must be replayed from its beginning."""
    layers, count = trace.layers, trace.expert_count
    moments = _moments(trace)
    order = [np.argsort(trace.experts[:, layer].ravel(), kind="stable") for layer in range(layers)]
    uses = np.concatenate([moments[each // trace.k] for each in order])
    sizes = np.stack([np.bincount(trace.experts[:, layer].ravel(), minlength=count) for layer in range(layers)])
    end = np.cumsum(sizes.ravel()).reshape(sizes.shape)
    cursor = end - sizes
    values = np.zeros(sizes.shape, np.int64)
    for layer, expert in zip(*np.nonzero(sizes), strict=True):
        values[layer, expert] = NEVER - (uses[cursor[layer, expert]] * layers + layer)
    return Belady(values, uses, cursor, end)


def _moments(trace: Trace) -> NDArray[np.int64]:
    """(tokens,) when each token is computed: a prompt's tokens together, when its last one is."""
    moment = np.arange(trace.tokens)
    last = trace.ends() - 1
    sequence = np.repeat(np.arange(len(last)), trace.ends() - trace.starts)
    closes = trace.decode | np.append(trace.decode[1:], True) | (moment == last[sequence])
    positions = np.where(closes, moment, trace.tokens)
    return np.minimum.accumulate(positions[::-1])[::-1]


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    layers = len(state.values)
    for expert in wanted:
        at = state.cursor[layer, expert]
        while at < state.end[layer, expert] and state.uses[at] <= now:
            at += 1
        state.cursor[layer, expert] = at
        ahead = state.uses[at] * layers + layer if at < state.end[layer, expert] else NEVER
        state.values[layer, expert] = NEVER - ahead


register(Belady, _touch)
