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

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost
from haq_lab.routing.trace import Trace

MOST = 128  # matrices kept
PIECE = 256  # tokens: a calibration sequence is remembered in pieces of this length, as requests would be
LEAST = 1e-3  # share: it lets distance decide between experts that the nearest sequence never used


class MoeInfinity(NamedTuple):
    """What similarities follow from is kept up to date, a choice at a time: they are wanted at every token.

    priority: (layers * E,) float32, whose bits `values` are; flat, as numba takes long to reshape.
    past: (n, layers * E) row-normalised; directions: (layers, E, n) its rows as unit vectors.
    current: (layers, E) counts of this sequence; squares: (layers,) of their rows' lengths.
    products: (layers, n) of current rows and directions; similarity: (n,) room for their sum.
    nearest: (1,) index of the most similar.
    falloff: (2 * layers * E,): from row layers - 1 - layer on, what distance leaves of a share, seen from `layer`.
    """

    values: np.ndarray
    priority: np.ndarray
    past: np.ndarray
    directions: np.ndarray
    current: np.ndarray
    squares: np.ndarray
    products: np.ndarray
    similarity: np.ndarray
    nearest: np.ndarray
    falloff: np.ndarray


def moe_infinity(trace: Trace) -> MoeInfinity:
    """The rule with the activation matrices of a calibration trace."""
    past = activation_matrices(trace)
    shape = layers, count = trace.layers, trace.expert_count
    priority = np.zeros(shape, np.float32)
    lengths = np.linalg.norm(past.astype(np.float64), axis=-1, keepdims=True)
    left = 1 - np.arange(1, layers + 1) / (layers + 1)
    return MoeInfinity(
        values=priority.view(np.int32),
        priority=priority.reshape(-1),
        past=past.reshape(len(past), -1),
        directions=np.ascontiguousarray((past / lengths).transpose(1, 2, 0)),
        current=np.zeros(shape),
        squares=np.zeros(layers),
        products=np.zeros((layers, len(past))),
        similarity=np.zeros(len(past)),
        nearest=np.zeros(1, np.int64),
        falloff=np.repeat(np.tile(left, 2), count),
    )


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
    state.squares[:] = 0
    state.products[:] = 0
    state.nearest[0] = 0


@innermost
def _touch(state, layer, wanted, counts, tokens, now):
    products = state.products[layer]
    for expert in wanted:
        count, before = np.float64(counts[expert]), state.current[layer, expert]
        state.current[layer, expert] = before + count
        state.squares[layer] += count * (2 * before + count)
        direction = state.directions[layer, expert]
        for index in range(len(products)):
            products[index] += count * direction[index]
    if layer == len(state.values) - 1:
        state.nearest[0] = _match(state.squares, state.products, state.similarity)


@innermost
def _match(squares, products, similarity):
    """The past matrix with the largest cosine similarity, summed over the layers."""
    similarity[:] = 0
    for layer in range(len(squares)):
        if squares[layer] > 0:
            scale, row = 1 / np.sqrt(squares[layer]), products[layer]
            for index in range(len(similarity)):
                similarity[index] += scale * row[index]
    best = 0
    for index in range(1, len(similarity)):
        if similarity[index] > similarity[best]:
            best = index
    return best


@innermost
def _refresh(state, layer):
    layers, count = state.values.shape
    priority, predicted = state.priority, state.past[state.nearest[0]]
    falloff = state.falloff[(layers - 1 - layer) * count :]
    for index in range(len(priority)):
        priority[index] = (predicted[index] + LEAST) * falloff[index]


register(MoeInfinity, _touch, _begin, _refresh)
