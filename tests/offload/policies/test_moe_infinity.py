"""MoE-Infinity's rule: the nearest of the past sequences is found, and what it predicts is kept, near layers first."""

from __future__ import annotations

import numpy as np

from haq_lab.offload.policies import eviction as cache
from haq_lab.offload.policies.moe_infinity import MOST, PIECE, activation_matrices, moe_infinity


def test_matrices_are_shares_of_pieces(make_trace):
    trace = make_trace(tokens=PIECE + 40, layers=2, sequences=1)
    matrices = activation_matrices(trace)
    assert matrices.shape == (2, 2, 8)
    np.testing.assert_allclose(matrices.sum(-1), 1, rtol=1e-6)
    assert matrices[1, 0, 3] * 40 * 2 == np.sum(trace.experts[PIECE:, 0] == 3)
    assert len(activation_matrices(make_trace(tokens=800, layers=1, sequences=200))) == MOST


def test_a_sequence_is_matched_with_itself(make_trace):
    trace = make_trace(tokens=120, sequences=4)
    state = moe_infinity(trace)
    resident, admit, placed = np.ones((4, 8), bool), np.ones(8, bool), np.zeros(8, np.int64)
    for sequence in (2, 0, 3):
        cache.begin(state)
        for token, chosen in enumerate(trace.part(slice(sequence, sequence + 1)).experts):
            for layer in range(4):
                counts = np.bincount(chosen[layer], minlength=8)
                cache.visit(
                    state, resident, layer, np.flatnonzero(counts), counts, 1, token, False, False, admit, placed
                )
        assert state.nearest[0] == sequence


def test_the_nearest_is_the_definitions(make_trace):
    """Kept up to date a choice at a time, it is the one that cosine similarity from scratch finds."""
    trace = make_trace(tokens=2000, layers=3, sequences=20)
    state, past = moe_infinity(trace.part(slice(0, 10))), activation_matrices(trace.part(slice(0, 10)))
    resident, admit, placed = np.ones((3, 8), bool), np.ones(8, bool), np.zeros(8, np.int64)
    seen, found = np.zeros((3, 8)), set()
    cache.begin(state)
    for token, chosen in enumerate(trace.part(slice(10, 11)).experts):
        for layer in range(3):
            counts = np.bincount(chosen[layer], minlength=8)
            seen[layer] += counts
            cache.visit(state, resident, layer, np.flatnonzero(counts), counts, 1, token, False, False, admit, placed)
        lengths = np.linalg.norm(past, axis=-1) * np.linalg.norm(seen, axis=-1)
        similarity = ((past * seen).sum(-1) / lengths).sum(-1)
        assert similarity[state.nearest[0]] > similarity.max() - 1e-6
        found.add(int(state.nearest[0]))
    assert len(found) > 1


def test_nearer_layers_count_more(make_trace):
    """Of three layers, the next one counts 3/4, and the one that was just visited, which comes last, counts 1/4."""
    falloff = moe_infinity(make_trace(tokens=20, layers=3)).falloff.reshape(6, 8)
    np.testing.assert_allclose(falloff, np.repeat([[0.75], [0.5], [0.25]] * 2, 8, axis=1))
