"""Path statistics against counting by hand and against what routing at random must give."""

from __future__ import annotations

import numpy as np
import pytest

from haq_lab.routing import statistics as paths
from haq_lab.routing.trace import Trace


def trace_of(experts, starts=(0,), count=4) -> Trace:
    experts = np.array(experts, np.uint8)
    return Trace(experts, np.ones(experts.shape, np.float16), np.ones(len(experts), bool), np.array(starts), count)


SMALL = trace_of([[[0, 1], [2, 3]], [[0, 2], [2, 0]], [[1, 0], [1, 2]]])


def test_frequencies_and_transitions_by_hand():
    np.testing.assert_allclose(3 * paths.frequencies(SMALL), [[3, 2, 1, 0], [1, 1, 3, 1]])
    table = paths.transitions(SMALL)[0]
    assert table.sum() == 3 * 2 * 2
    assert table[0].tolist() == [1, 1, 3, 1]
    assert table[3].tolist() == [0, 0, 0, 0]
    assert paths.transitions(SMALL, 2).shape == (0, 4, 4)


def test_coverage_counts_windows_all_of_whose_experts_are_resident():
    resident = np.array([[True, True, False, False], [False, True, True, True]])
    assert paths.coverage(SMALL, resident, 1) == pytest.approx(4 / 6)
    assert paths.coverage(SMALL, resident, 2) == pytest.approx(2 / 3)
    assert paths.hits(SMALL, resident).sum() == 10


def test_entropy_of_even_and_of_certain_routing():
    even = trace_of([[[0, 1]], [[2, 3]]])
    certain = trace_of([[[0]], [[0]]])
    np.testing.assert_allclose(paths.entropy(even), [2])
    np.testing.assert_allclose(paths.entropy(certain), [0])


def test_repeats_and_overlaps_stay_within_a_sequence():
    trace = trace_of([[[0, 1]], [[0, 1]], [[2, 3]], [[3, 2]]], starts=(0, 2))
    first, either = paths.repeat_rate(trace)
    assert (first.tolist(), either.tolist()) == ([0.5], [1.0])
    near, far = paths.jaccard(trace, [1, 2])
    assert near.tolist() == [1.0]
    assert np.isnan(far).all(), "no sequence is three tokens long"
    assert paths.jaccard(trace_of([[[0, 1]], [[1, 2]]]), [1])[0, 0] == pytest.approx(1 / 3)


def test_drift_is_nothing_from_a_trace_to_itself_and_all_between_strangers():
    assert paths.drift(SMALL, SMALL).distance.tolist() == [0, 0]
    np.testing.assert_allclose(paths.drift(SMALL, SMALL).correlation, 1)
    apart = paths.drift(trace_of([[[0, 1]]]), trace_of([[[2, 3]]]))
    assert apart.distance.tolist() == [1]
    assert apart.correlation.tolist() == [-1]
