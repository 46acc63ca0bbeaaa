"""Placements keep to their slots; the greedy choice of paths against exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.policies.placement import PLACEMENTS, place, two_stage
from haq_lab.routing.statistics import coverage, drift, entropy, frequencies, hits, jaccard, repeat_rate, transitions


@pytest.mark.parametrize("rule", PLACEMENTS)
@given(slots=st.integers(1, 40))
def test_every_rule_fills_exactly_its_slots(make_trace, rule, slots):
    resident = place(rule, make_trace(), slots)
    assert resident.sum() == min(slots, 32)


def test_no_layer_starves(make_trace):
    trace = make_trace(layers=6)
    for slots in (12, 24, 36):
        assert two_stage(trace, slots).sum(1).min() >= 0.8 * slots / 6


def test_greedy_paths_against_exhaustive_search(make_trace):
    """Mean coverage of the greedy choice at least 85 % of the best there is, over small random cases."""
    ratios = []
    for seed in range(12):
        trace = make_trace(tokens=80, layers=2, experts=4, k=1, seed=seed, kinds=3)
        best = 0.0
        for chosen in combinations(range(8), 4):
            resident = np.zeros(8, bool)
            resident[list(chosen)] = True
            best = max(best, coverage(trace, resident.reshape(2, 4), 2))
        ratios.append(coverage(trace, two_stage(trace, 4, span=2, floor=0), 2) / best)
        assert ratios[-1] <= 1 + 1e-9
    assert np.mean(ratios) > 0.85


def test_paths_are_covered_better_than_by_frequency(make_trace):
    trace = make_trace(tokens=2000, layers=6)
    mine, frequent = (coverage(trace, place(rule, trace, 18), 2) for rule in ("two_stage", "frequency"))
    assert mine > frequent


def test_statistics_by_hand(make_trace):
    trace = make_trace(tokens=50, sequences=1)
    share = frequencies(trace)
    assert np.allclose(share.sum(1), 2)
    assert share[1, 3] == np.mean((trace.experts[:, 1] == 3).any(-1))
    table = transitions(trace)
    pairs = [(a, b) for token in trace.experts for a in token[0] for b in token[1]]
    assert table[0, 2, 5] == pairs.count((2, 5))
    assert transitions(trace, 3).shape == (1, 8, 8)
    first, either = repeat_rate(trace)
    assert first[0] == np.mean(trace.experts[1:, 0, 0] == trace.experts[:-1, 0, 0])
    assert (either >= first).all()
    sets = [set(row.tolist()) for row in trace.experts[:, 2]]
    overlap = [len(a & b) / len(a | b) for a, b in zip(sets, sets[3:], strict=False)]
    assert jaccard(trace, [3])[0, 2] == pytest.approx(np.mean(overlap))
    resident = place("random", trace, 16)
    assert coverage(trace, resident, 1) == hits(trace, resident).all(-1).mean()
    assert (entropy(trace) <= 3).all()
    assert np.allclose(drift(trace, trace).distance, 0)
    assert np.allclose(drift(trace, trace).correlation, 1)
