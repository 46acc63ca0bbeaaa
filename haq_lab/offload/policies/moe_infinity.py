"""MoE-Infinity eviction (arXiv 2401.14361): the most similar past sequence predicts which experts come next.

An activation matrix (layers, E) counts the tokens that a sequence sent to each expert. Its rows are normalised. The
past matrix with the largest cosine similarity to the current one predicts the next experts. The priority of an expert
is its predicted share times 1 - distance / (layers + 1), where distance is the number of layers until its next visit.
The expert with the lowest priority is evicted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from haq_lab.offload.policies.eviction import register
from haq_lab.offload.policies.jit import innermost
from haq_lab.routing.trace import Trace

MOST = 128  # matrices that are stored
PIECE = 256  # tokens of one matrix, because requests are shorter than calibration sequences
LEAST = 1e-3  # added to every share, so that distance decides between experts that the past sequence never used


class MoeInfinity(NamedTuple):
    """State of the rule. The parts of the similarities are updated at every choice, because each token needs them.

    Attributes:
        values: The bits of `priority` as int32 (layers, E).
        priority: (layers * E,) float32. It is flat because numba reshapes slowly.
        past: (n, layers * E) the normalised past matrices.
        directions: (layers, E, n) their rows as unit vectors.
        current: (layers, E) counts of the current sequence.
        squares: (layers,) squared lengths of the rows of `current`.
        products: (layers, n) products of the rows of `current` and `directions`.
        similarity: (n,) workspace for the sum over the layers.
        nearest: (1,) index of the most similar past matrix.
        falloff: (2 * layers * E,) factors by distance. Seen from `layer`, they begin at row layers - 1 - layer.
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
    """Return the state with the activation matrices of a calibration trace."""
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
    """Return at most `MOST` normalised activation matrices (n, layers, E), spread over the trace."""
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
    """Return the past matrix with the largest cosine similarity, summed over the layers."""
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
