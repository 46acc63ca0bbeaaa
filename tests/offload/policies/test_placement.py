"""Every placement fills its slots. The greedy search for path fragments is close to exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.policies.placement import PLACEMENTS, add_paths, fragments, place, two_stage
from haq_lab.routing.statistics import coverage, drift, entropy, frequencies, hits, jaccard, repeat_rate, transitions
from haq_lab.routing.trace import Trace


@pytest.mark.parametrize("rule", PLACEMENTS)
@given(slots=st.integers(1, 40))
def test_every_rule_fills_exactly_its_slots(make_trace, rule, slots):
    resident = place(rule, make_trace(), slots)
    assert resident.sum() == min(slots, 32)


def test_no_layer_starves(make_trace):
    trace = make_trace(layers=6)
    for slots in (12, 24, 36):
        assert two_stage(trace, slots).sum(1).min() >= 0.8 * slots / 6


@pytest.mark.parametrize(("floor", "residents"), [(0.0, [7, 1]), (0.5, [6, 2]), (1.0, [4, 4])])
def test_the_floor_is_a_part_of_an_equal_share(floor, residents):
    """Layer 1 always uses one expert, so paths alone would give it one slot of eight."""
    tokens = np.arange(70)
    experts = np.stack([tokens % 7, np.zeros(70)], axis=1)[:, :, None].astype(np.uint8)
    gates = np.ones(experts.shape, np.float16)
    trace = Trace(experts, gates, np.ones(70, np.bool_), np.zeros(1, np.int64), 8, "model", "text")
    assert list(two_stage(trace, 8, span=2, floor=floor).sum(1)) == residents


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


def trace_of(experts) -> Trace:
    experts = np.array(experts, np.uint8)
    return Trace(experts, np.ones(experts.shape, np.float16), np.ones(len(experts), bool), np.zeros(1, np.int64), 4)


def test_fragments_are_counted_whatever_the_order_of_choices():
    trace = trace_of([[[0, 1], [2, 3]], [[1, 0], [3, 2]], [[0, 2], [2, 3]]])
    (group,) = fragments(trace, 2)
    assert group.experts.tolist() == [[0, 1, 6, 7], [0, 2, 6, 7]]
    assert group.counts.tolist() == [2, 1]
    assert len(fragments(trace, 1)) == 2


def test_the_most_frequent_path_comes_first_and_only_whole():
    trace = trace_of(5 * [[[0, 1], [2, 3]]] + 2 * [[[2, 3], [0, 1]]])
    chosen = add_paths(trace, slots=5, minimum=0, span=2)
    assert np.argwhere(chosen).tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]
    assert not add_paths(trace, slots=3, minimum=0, span=2).any()


def test_the_minimum_of_every_layer_is_left_room_for(make_trace):
    trace = make_trace(tokens=200, layers=4)
    for slots in (8, 12, 20):
        chosen = add_paths(trace, slots, minimum=2, span=2)
        assert np.maximum(chosen.sum(-1), 2).sum() <= slots


def test_greedy_is_near_the_best_of_all(make_trace):
    trace = make_trace(tokens=120, layers=2, experts=5, k=1)
    ours = coverage(trace, add_paths(trace, 4, 0, 2), 2)
    best = 0.0
    for kept in combinations(range(10), 4):
        resident = np.isin(np.arange(10), kept).reshape(2, 5)
        best = max(best, coverage(trace, resident, 2))
    assert best * 0.8 <= ours <= best
