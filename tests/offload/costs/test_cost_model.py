"""Test the predictor's choice against all others, and the simulator against a timeline computed by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.offload.costs.cost_model import EXACT_UP_TO, Costs, PiecewiseLinear, Predictor, seconds
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import make_policy
from haq_lab.offload.simulate.simulator import Simulator

rate = st.floats(0.1, 10)


def flat(value):
    return PiecewiseLinear([1], [value])


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    fast=rate,
    slow=rate,
    fetch=rate,
    objective=st.sampled_from(["sum", "max"]),
)
def test_the_decision_is_the_best_of_all(tokens, fast, slow, fetch, objective):
    line = [PiecewiseLinear([1, 50], [a, a * b]) for a, b in ((fast, 3), (slow, 20))]
    costs = Costs(*line, flat(fetch), flat(0), flat(0), expert_bytes=1)
    missing = dict(enumerate(tokens))
    in_place = Predictor(costs, objective).decide({9: 3}, missing)

    def price(kept):
        fetched = {e: n for e, n in missing.items() if e not in kept}
        return seconds(costs, {9: 3}, fetched, {e: missing[e] for e in kept}, objective)

    every = [
        [e for e, keep in zip(missing, flags, strict=True) if keep] for flags in product([0, 1], repeat=len(missing))
    ]
    assert price(in_place) == pytest.approx(min(map(price, every)))


def test_overlap_against_a_calculation_by_hand():
    """A resident at 2 s a token hides a fetch of 3 s; the second one is waited for; the CPU takes longer than both."""
    costs = Costs(PiecewiseLinear([1, 2], [2, 4]), flat(9.0), flat(3.0), flat(0), flat(0), expert_bytes=1)
    assert seconds(costs, {0: 2}, {1: 1}, {}, "max") == 4 + 2
    assert seconds(costs, {0: 1}, {1: 1, 2: 1}, {}, "max") == 3 + 2 + 1 + 2
    assert seconds(costs, {0: 1}, {1: 1}, {2: 1}, "max") == 9
    assert seconds(costs, {0: 1}, {1: 1}, {2: 1}, "sum") == 2 + 3 + 2 + 9
    costs.from_disk = True
    assert seconds(costs, {0: 1}, {1: 1}, {2: 1}, "max") == 2 + 9 + 2


def test_requesting_and_taking_over_against_a_calculation_by_hand():
    """Two fetches: the link begins once they are requested and its thread is awake; each is taken over on its own."""
    by_count = [PiecewiseLinear([1, 2], seconds) for seconds in ([0.5, 1.0], [0.25, 4.0], [0.125, 8.0])]
    costs = Costs(flat(1.0), flat(9.0), flat(3.0), flat(0), flat(0), 1, *by_count)
    second_arrives = 1.0 + 0.25 + 2 * 3.0  # later than the first one is computed
    assert seconds(costs, {0: 1}, {1: 1, 2: 1}, {}, "max") == second_arrives + 0.125 + 1.0
    assert seconds(costs, {0: 1}, {1: 1, 2: 1}, {}, "sum") == 1.0 + 1.0 + 4.0 + 2 * (3.0 + 0.125 + 1.0)


def test_curves():
    curve = PiecewiseLinear.fitted([(1, 2.0), (1, 4.0), (1, 3.0), (3, 5.0), (5, 4.0)])
    assert [curve(size) for size in (0, 1, 2, 3, 5)] == [0, 3, 4, 5, 5]
    assert PiecewiseLinear([1, 2], [1, 3])(4) == 7
    for seconds_seen in (8.0, 12.0):
        curve.observe(3, seconds_seen)
    assert curve(3) == pytest.approx(10.0), "the mean of few"
    for _ in range(5000):
        curve.observe(3, 20.0)
    assert curve(3) == pytest.approx(20.0, rel=1e-3), "later of the latest"
    nothing = flat(0)
    nothing.observe(1, 2.0)
    assert nothing(1) == 0


def test_a_timeline_by_hand(make_trace):
    """One token, one layer, two experts of which one is missing: its fetch hides behind the other's computing."""
    trace = make_trace(tokens=1, layers=1, sequences=1)
    present = trace.experts[0, 0, 0]
    resident = np.zeros((1, 8), bool)
    resident[0, present] = True
    costs = Costs(flat(4.0), flat(50.0), flat(3.0), flat(1.0), flat(0.5), expert_bytes=10)
    timeline = Simulator(costs, make_policy("none", resident, trace)).run(trace)
    assert timeline.token_s == [1 + 4 + 4 + 0.5]
    costs.fetch = flat(7.0)
    timeline = Simulator(costs, make_policy("none", resident, trace)).run(trace)
    assert timeline.token_s == [1 + 7 + 4 + 0.5]
    assert timeline.bytes == 10
    assert timeline.busy["link"] == pytest.approx(7 / 12.5)


def test_metrics_are_labelled_simulated(make_trace):
    trace = make_trace(tokens=40, prompt=5)
    policy = make_policy("lru", place("uniform", trace, 12), trace)
    costs = Costs(flat(1.0), flat(5.0), flat(2.0), flat(1.0), flat(1.0), expert_bytes=1)
    policy.decide = Predictor(costs).decide
    timeline = Simulator(costs, policy).run(trace)
    assert len(timeline.prompt_s) == 2
    assert len(timeline.token_s) == 30
    assert all(name.startswith("simulated.test.") for name in timeline.metrics("test"))


def test_the_heaviest_fetched_expert_computes_first():
    """Ten tokens arrive at 3 s and take 10 s; one token arrives meanwhile and takes 1 s."""
    costs = Costs(PiecewiseLinear([1, 10], [1, 10]), flat(99.0), flat(3.0), flat(0), flat(0), expert_bytes=1)
    assert seconds(costs, {}, {0: 1, 1: 10}, {}, "max") == 3 + 10 + 1


def test_of_many_missing_experts_the_lightest_run_in_place():
    missing = {expert: 1 + expert % 7 for expert in range(EXACT_UP_TO + 5)}
    costs = Costs(flat(1.0), PiecewiseLinear([1, 7], [1, 70]), flat(5.0), flat(0), flat(0), expert_bytes=1)
    in_place = Predictor(costs, "sum").decide({}, missing)
    assert 0 < len(in_place) < len(missing)
    assert max(missing[expert] for expert in in_place) <= min(missing[e] for e in missing if e not in in_place)
