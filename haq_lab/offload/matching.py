"""MoE-Infinity's rule (arXiv 2401.14361): the past sequence whose experts are nearest tells which come next.

An activation matrix (layers, E) counts the tokens that a sequence sent to each expert; rows are normalised. The
nearest of a collection of past ones, by cosine similarity to the sequence's own so far, predicts the rest; an
expert's priority is its predicted share times 1 - distance / (layers + 1), distance in layers until its next visit.
The same priority protects the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.cache import teach
from haq_lab.offload.compiled import innermost
from haq_lab.offload.trace import Trace

MOST = 128  # matrices kept
PIECE = 256  # tokens: a calibration sequence is remembered in pieces of this length, as requests would be
LEAST = 1e-3  # share: it lets distance decide between experts that the nearest sequence never used


class Matching(NamedTuple):
    """`current` (layers, E) counts of this sequence; `past` (n, layers, E) row-normalised; `nearest` (1,) its index;
    `priority` (layers, E) float32, whose bits `values` are."""

    values: np.ndarray
    priority: np.ndarray
    current: np.ndarray
    past: np.ndarray
    nearest: np.ndarray


def matching(trace: Trace) -> Matching:
    """The rule with the activation matrices of a calibration trace."""
    past = activation_matrices(trace)
    shape = trace.layers, trace.expert_count
    priority, current = (np.zeros(shape, np.float32) for _ in range(2))
    return Matching(priority.view(np.int32), priority, current, past, np.zeros(1, np.int64))


def activation_matrices(trace: Trace) -> NDArray[np.float32]:
    """(n, layers, E) row-normalised matrices of the trace's sequences, at most `MOST`, spread over the trace."""
    edges = [at for start, end in zip(trace.starts, trace.ends(), strict=True) for at in range(start, end, PIECE)]
    pieces = list(zip(edges, [*edges[1:], trace.tokens], strict=True))
    chosen = np.linspace(0, len(pieces) - 1, min(MOST, len(pieces))).astype(int)
    matrices = np.zeros((len(chosen), trace.layers, trace.expert_count), np.float32)
    for index, piece in enumerate(chosen):
        experts = trace.experts[slice(*pieces[piece])]
        for layer in range(trace.layers):
            matrices[index, layer] = np.bincount(experts[:, layer].ravel(), minlength=trace.expert_count)
    return matrices / matrices.sum(-1, keepdims=True)


@innermost
def _begin(state):
    state.current[:] = 0
    state.nearest[0] = 0


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    for expert in wanted:
        state.current[layer, expert] += counts[expert]
    if layer == len(state.values) - 1:
        state.nearest[0] = _match(state.current, state.past)


@innermost
def _match(current, past):
    """The past matrix with the largest mean cosine similarity over the layers."""
    best, best_similarity = 0, -1.0
    for index in range(len(past)):
        similarity = 0.0
        for layer in range(current.shape[0]):
            product, one, other = 0.0, 0.0, 0.0
            for expert in range(current.shape[1]):
                product += current[layer, expert] * past[index, layer, expert]
                one += current[layer, expert] ** 2
                other += past[index, layer, expert] ** 2
            if one > 0 and other > 0:
                similarity += product / np.sqrt(one * other)
        if similarity > best_similarity:
            best, best_similarity = index, similarity
    return best


@innermost
def _refresh(state, layer):
    layers, count = state.values.shape
    predicted = state.past[state.nearest[0]]
    for row in range(layers):
        distance = row - layer if row > layer else row - layer + layers
        for expert in range(count):
            state.priority[row, expert] = (predicted[row, expert] + LEAST) * (1 - distance / (layers + 1))


teach(Matching, _touch, _begin, _refresh)
