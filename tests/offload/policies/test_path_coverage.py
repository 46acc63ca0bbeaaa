"""Path fragments counted by hand; the greedy choice keeps its promises and comes near exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from haq_lab.offload.policies.path_coverage import add_paths, fragments
from haq_lab.routing.statistics import coverage
from haq_lab.routing.trace import Trace


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
